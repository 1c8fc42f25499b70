"""Published backbones as hosts of an attention: the network is theirs, a family says what attends where.

A host's first argument is a function ``attention(stage, block, dim, num_heads, map_size)``, which returns the attention
of a block, or None for the host's own. ``map_size`` is the height and width of the stage's map for images of
``img_size``, for attentions with tables of positions.
"""

from collections.abc import Callable

from torch import nn

ChooseAttention = Callable[[int, int, int, int, tuple[int, int]], nn.Module | None]
