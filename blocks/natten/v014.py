"""NATTEN 0.14: operators on lines and maps with a relative position bias; modules of its two argument orders.

Up to 0.14.4 there was no ``kernel_size`` among an operator's arguments: it was read off the bias, or off the weights.
The number of arguments tells the two forms apart, so both are taken.
"""

import warnings
from collections.abc import Callable

from torch import Tensor

from .heads_first import av, function_class, named, qk
from .modules import NeighborhoodModule


def _qkrpb(rank: int) -> Callable:
    name = f"natten{rank}dqkrpb"

    def natten_qkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size=None, dilation=None) -> Tensor:
        if dilation is None:
            kernel_size, dilation = None, kernel_size
        if dilation is None:
            raise TypeError(f"{name} needs a dilation: {name}(query, key, rpb, kernel_size, dilation)")
        if kernel_size is None:
            if rpb is None:
                raise ValueError(f"{name} without a bias needs a kernel_size before the dilation")
            kernel_size = (rpb.shape[1] + 1) // 2
        return qk(name, query, key, kernel_size, dilation, rpb=rpb)

    return named(name, __name__, natten_qkrpb)


def _qk(rank: int) -> Callable:
    name = f"natten{rank}dqk"

    def natten_qk(query: Tensor, key: Tensor, kernel_size: int, dilation: int) -> Tensor:
        return qk(name, query, key, kernel_size, dilation)

    return named(name, __name__, natten_qk)


def _av(rank: int) -> Callable:
    name = f"natten{rank}dav"

    def natten_av(attn: Tensor, value: Tensor, kernel_size=None, dilation=None) -> Tensor:
        if dilation is None:
            kernel_size, dilation = None, kernel_size
        if dilation is None:
            raise TypeError(f"{name} needs a dilation: {name}(attn, value, kernel_size, dilation)")
        if kernel_size is None:
            kernel_size = round(attn.shape[-1] ** (1 / rank))
        return av(name, attn, value, kernel_size, dilation)

    return named(name, __name__, natten_av)


natten1dqkrpb, natten2dqkrpb = _qkrpb(1), _qkrpb(2)
natten1dqk, natten2dqk = _qk(1), _qk(2)
natten1dav, natten2dav = _av(1), _av(2)
NATTEN1DQKRPBFunction = function_class("NATTEN1DQKRPBFunction", __name__, natten1dqkrpb)
NATTEN2DQKRPBFunction = function_class("NATTEN2DQKRPBFunction", __name__, natten2dqkrpb)
NATTEN1DAVFunction = function_class("NATTEN1DAVFunction", __name__, natten1dav)
NATTEN2DAVFunction = function_class("NATTEN2DAVFunction", __name__, natten2dav)


class _NeighborhoodAttention(NeighborhoodModule):
    pads = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int | None = 1,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        dilation = dilation or 1
        self._refuse_even(kernel_size)
        super().__init__(dim, num_heads, kernel_size, dilation, bias, qkv_bias, qk_scale, attn_drop, proj_drop)
        self.kernel_size, self.dilation = kernel_size, dilation
        self.window_size = kernel_size * dilation

    def _refuse_even(self, kernel_size: int) -> None:
        if kernel_size % 2 == 0 or kernel_size < 3:
            raise ValueError(
                f"{type(self).__name__} needs an odd kernel_size greater than 1; got {kernel_size}. It comes after "
                "num_heads from NATTEN 0.14.5 on, and came before it until 0.14.4"
            )


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """Neighborhood attention on lines ``[B, L, dim]``, as in 0.14.5 to 0.15.1; see `modules.NeighborhoodModule`."""

    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """Neighborhood attention on maps ``[B, H, W, dim]``, as in 0.14.5 to 0.15.1; see `modules.NeighborhoodModule`."""

    rank = 2


class _EarlyNeighborhoodAttention(_NeighborhoodAttention):
    def __init__(
        self,
        dim: int,
        kernel_size: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        dilation: int | str | None = None,
    ):
        greatest = isinstance(dilation, str)
        super().__init__(
            dim, num_heads, kernel_size, 1 if greatest else dilation, True, qkv_bias, qk_scale, attn_drop, proj_drop
        )
        if greatest:
            self.dilation, self.window_size = dilation, None

    def windows(self, size: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """Return kernel size and dilation for each axis; a dilation that is text is the greatest that fits the map."""
        if not isinstance(self.dilation, str):
            return super().windows(size)
        return [self.kernel_size] * self.rank, [max(min(size) // self.kernel_size, 1)] * self.rank


class EarlyNeighborhoodAttention1D(_EarlyNeighborhoodAttention):
    """`NeighborhoodAttention1D` as in 0.14.1 to 0.14.4: ``kernel_size`` before ``num_heads``, always with a bias."""

    rank = 1


class EarlyNeighborhoodAttention2D(_EarlyNeighborhoodAttention):
    """`NeighborhoodAttention2D` as in 0.14.1 to 0.14.4: ``kernel_size`` before ``num_heads``, always with a bias.

    ``dilation`` may be any text: then it is the greatest that fits the map at hand.
    """

    rank = 2


class NeighborhoodAttention(EarlyNeighborhoodAttention2D):
    """The two-dimensional module under the name that it had until 0.14.4."""

    def __init__(self, *args, **options):
        warnings.warn("NeighborhoodAttention is NeighborhoodAttention2D", DeprecationWarning, stacklevel=2)
        super().__init__(*args, **options)
