"""QuadTree attention's operator: four sibling queries attend to the children of the tokens chosen for their parent."""

from .api import quadtree_backends, quadtree_scores, quadtree_values
from .level import quadtree_level, quadtree_level_backends

__all__ = ["quadtree_backends", "quadtree_level", "quadtree_level_backends", "quadtree_scores", "quadtree_values"]
