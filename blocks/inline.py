"""InLine attention (Han et al., NeurIPS 2024, arXiv 2412.06590): linear attention whose weights add up to one."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from ..kernels.backends import is_transforming
from .initialize import init_linear
from .pointwise import apply_linear
from .record import Given, Recorded, Rows, exact, heads_to_map, map_to_heads


def attend_linearly(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Attend with the weights ``(1 + s * q_i.(k_j - mean of k)) / N``, linear in the tokens (Eq. 6, identity kernel).

    That is the mean of the values and, for each query, a product with the covariance of keys and values.

    Args:
        q: Queries ``[B, N, C]``.
        k: Keys ``[B, N, C]``.
        v: Values ``[B, N, C]``.
        num_heads: Heads.

    Returns:
        What the queries add to the mean ``[B, N, C]``, and the mean ``[B, C]``.
    """
    batch, tokens = k.shape[0], k.shape[1]
    scale = (k.shape[2] // num_heads) ** -0.5
    mean = v.mean(1)
    means = k.mean(1).unflatten(1, (num_heads, -1)).unsqueeze(3) * mean.unflatten(1, (num_heads, 1, -1))
    q, k, v = [x.unflatten(2, (num_heads, -1)).transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    # The factors belong to the product: sums over large maps pass the largest number of float16.
    covariance = torch.baddbmm(means.flatten(0, 1), k.transpose(1, 2), v, beta=-scale, alpha=scale / tokens)
    return torch.bmm(q, covariance).unflatten(0, (batch, num_heads)).transpose(1, 2).flatten(2), mean


def filter_maps(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """Convolve each channel of each image with a kernel of its own, zeros around.

    Args:
        x: Maps ``[B, H, W, C]``.
        kernels: ``[B, C, 3, 3]``.
        bias: ``[B, C]``.

    Returns:
        ``[B, H, W, C]``.
    """
    batch, dim = x.shape[0], x.shape[3]
    image = x.permute(0, 3, 1, 2)
    if batch > 1:
        image = image.flatten(0, 1)[None]
    out = F.conv2d(image, kernels.flatten(0, 1)[:, None], bias.flatten(), padding=1, groups=batch * dim)
    if batch > 1:
        out = out[0].unflatten(0, (batch, dim))
    return out.permute(0, 2, 3, 1)


def takes_images_one_by_one(x: Tensor) -> bool:
    """Return whether each image is computed for itself: on a CPU its heads and kernels then need no copies."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return x.is_cpu and x.shape[0] > 1 and not is_transforming()


@register_notrace_function
def attend_and_filter(qkv: Tensor, kernels: Tensor, height: int, width: int, num_heads: int) -> Tensor:
    """Add the attention of all tokens and the convolution of a map's values, which are the last tokens.

    Args:
        qkv: Queries, keys and values ``[B, N, 3 * C]``.
        kernels: ``[B, C, 3, 3]``.
        height: Height H of the map.
        width: Width W of the map; N is at least ``H * W``.
        num_heads: Heads.

    Returns:
        ``[B, N, C]``.
    """
    if torch.jit.is_scripting():
        return _attend_and_filter(qkv, kernels, height, width, num_heads)
    else:
        if not takes_images_one_by_one(qkv):
            return _attend_and_filter(qkv, kernels, height, width, num_heads)
        images = zip(qkv.split(1), kernels.split(1), strict=True)
        return torch.cat([_attend_and_filter(*image, height, width, num_heads) for image in images])


def _attend_and_filter(qkv: Tensor, kernels: Tensor, height: int, width: int, num_heads: int) -> Tensor:
    q, k, v = qkv.chunk(3, dim=-1)
    out, mean = attend_linearly(q, k, v, num_heads)
    before = v.shape[1] - height * width
    local = filter_maps(v[:, before:].unflatten(1, (height, width)), kernels, mean).flatten(1, 2)
    if before > 0:
        local = torch.cat([mean[:, None].expand(-1, before, -1), local], dim=1)
    return out + local


class InLineAttention2d(nn.Module):
    """Multi-head linear attention over a map, and a convolution of the values with kernels made from the map.

    The weights of a query add up to one and may be negative; queries that differ have different weights, as in softmax
    attention, but not in other linear attention. The kernels, a 3x3 one for each image and channel, are made from the
    mean of the map. Nothing depends on the size of the map, and the cost is linear in its positions.

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide ``dim``.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        lepe: Whether a learned depthwise convolution of the values is added too, as in InLine-CSWin.
        takes_input: Whether the kernels are made from a second argument, which a block fills with its input before the
            norm, as in InLine-CSWin.
        proj_drop: Dropout rate of the output.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H, W, dim]``, any H and W.

    Raises:
        ValueError: If ``num_heads`` does not divide ``dim``.

    Example:
        >>> attention = InLineAttention2d(64, num_heads=2)
        >>> attention(torch.randn(1, 20, 30, 64)).shape
        torch.Size([1, 20, 30, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        lepe: bool = False,
        takes_input: bool = False,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"InLine attention needs num_heads to divide dim; got dim {dim}, heads {num_heads}")
        self.num_heads = num_heads
        self.takes_input = takes_input
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if lepe else None
        self.residual = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=num_heads, **dd),
            nn.GELU(),
            nn.Conv1d(dim, 9 * dim, 1, groups=num_heads, **dd),
        )
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the projections as published: truncated normal, std 0.02."""
        init_linear(self.qkv, self.proj)

    def extra_repr(self) -> str:
        """Return the settings that `print(model)` shows."""
        return f"num_heads={self.num_heads}"

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """Attend over ``x`` ``[B, H, W, dim]``.

        Args:
            x: The map.
            source: The map ``[B, H, W, dim]`` whose mean the kernels are made from; ``x`` by default.
        """
        height, width = x.shape[1], x.shape[2]
        kernels = self._kernels((x if source is None else source).mean((1, 2)))
        qkv = self.qkv(x) if torch.jit.is_scripting() else apply_linear(self.qkv, x)
        out = attend_and_filter(qkv.flatten(1, 2), kernels, height, width, self.num_heads)
        out = out.unflatten(1, (height, width))
        lepe = self.lepe
        if lepe is not None:
            out = out + lepe(qkv.chunk(3, dim=-1)[2].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj_drop(self.proj(out) if torch.jit.is_scripting() else apply_linear(self.proj, out))

    def _kernels(self, mean: Tensor) -> Tensor:
        """Return the kernels ``[B, dim, 3, 3]`` made from a mean ``[B, dim]``."""
        return self.residual(mean.unsqueeze(2)).reshape(mean.shape[0], -1, 3, 3)

    @torch.jit.ignore
    def recorded(self, x: Tensor, source: Tensor | None = None) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`."""
        size = tuple(x.shape[1:3])
        qkv = self.qkv(x)
        kernels = self._kernels((x if source is None else source).mean((1, 2)))

        def local() -> Tensor:
            v = qkv.chunk(3, dim=-1)[2]
            out = filter_maps(v, kernels, torch.zeros_like(v[:, 0, 0]))
            if self.lepe is not None:
                out = out + self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return map_to_heads(out, self.num_heads)

        return _tell(qkv, self.num_heads, size, lambda heads: self.proj(heads_to_map(heads, size)), local)


def _tell(
    qkv: Tensor,
    num_heads: int,
    size: tuple[int, int],
    project: Callable[[Tensor], Tensor],
    local: Callable[[], Tensor],
    prefix: int = 0,
) -> Recorded:
    """Tell of an attention whose weights are those of `attend_linearly`; other arguments as in `Recorded`."""
    q, k, v = (exact(map_to_heads(part, num_heads)) for part in qkv.chunk(3, dim=-1))
    tokens, scale = k.shape[2], q.shape[3] ** -0.5
    centred = (k - k.mean(2, keepdim=True)).mT * scale

    def rows(queries: Tensor) -> Rows:
        return Rows(None, (1 + q[:, :, queries] @ centred) / tokens)

    operator = Given(rows, num_heads, tokens, tokens, 2 * num_heads * tokens, qkv.device)
    note = "linear attention: weights add up to 1 and may be negative"
    return Recorded("global", size, operator, v, project, local, prefix=prefix, signed=True, note=note)


class InLineTokenAttention(InLineAttention2d):
    """InLine attention over a map and a class token before it (InLine-DeiT).

    The class token takes part in the attention and in the mean from which the kernels are made; the convolution sees
    the map alone.

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide ``dim``.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_drop: Dropout rate of the output.

    Shape:
        Tokens ``[B, 1 + H * W, dim]``, class token first, with H and W as arguments; to the same shape.

    Example:
        >>> attention = InLineTokenAttention(64, num_heads=2)
        >>> attention(torch.randn(1, 1 + 20 * 30, 64), 20, 30).shape
        torch.Size([1, 601, 64])
    """

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = True, proj_drop: float = 0.0, device=None, dtype=None
    ):
        super().__init__(dim, num_heads, qkv_bias, proj_drop=proj_drop, device=device, dtype=dtype)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Attend over tokens ``x`` ``[B, 1 + height * width, dim]``."""
        qkv = self.qkv(x) if torch.jit.is_scripting() else apply_linear(self.qkv, x)
        out = attend_and_filter(qkv, self._kernels(x.mean(1)), height, width, self.num_heads)
        return self.proj_drop(self.proj(out) if torch.jit.is_scripting() else apply_linear(self.proj, out))

    @torch.jit.ignore
    def recorded(self, x: Tensor, height: int, width: int) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`."""
        qkv, kernels = self.qkv(x), self._kernels(x.mean(1))

        def local() -> Tensor:
            v = qkv.chunk(3, dim=-1)[2]
            out = filter_maps(v[:, 1:].unflatten(1, (height, width)), kernels, torch.zeros_like(v[:, 0]))
            return map_to_heads(F.pad(out.flatten(1, 2), (0, 0, 1, 0)), self.num_heads)

        size = height, width
        return _tell(qkv, self.num_heads, size, lambda heads: self.proj(heads.transpose(1, 2).flatten(2)), local, 1)
