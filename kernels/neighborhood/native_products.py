"""stub"""

from . import tiled_products

scores, values, scatter = tiled_products.scores, tiled_products.values, tiled_products.scatter
