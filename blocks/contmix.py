"""Context-mixing dynamic convolution (ContMix): kernels for every position from how it relates to the whole map.

OverLoCK, Lou and Yu, CVPR 2025, arXiv 2502.20087, sec. 3.3. After github.com/LMMMEng/OverLoCK (Apache-2.0).
"""

import re

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, SEModule, register_notrace_function, register_notrace_module
from torch import Tensor, nn

from ..kernels.neighborhood import na2d_av, na2d_bias
from ..kernels.neighborhood.window import Axis, neighbors
from .depthwise import apply_depthwise
from .dilated_reparam import DilatedReparamConv, rename_branches
from .plain import is_plain
from .record import Given, Recorded, Rows, exact, heads_to_map, land_by_axes, map_to_heads, pooling_axis, spread_rows

# Cells of the grid that stands for the whole map, each way.
_GRID = 7


@register_notrace_module
class ContextMixing(nn.Module):
    """Average each position's window of values by two softmaxed kernels, a small and a large one; NCHW.

    The kernels of a position are a linear map, one for all, of its query's products with the means of the context over
    a grid of 7x7 cells, and a relative position bias. The first half of the value's channels goes to the small kernel,
    the second to the large one. Windows are those of neighborhood attention (`kernels.na2d`): they shift at borders.

    A map smaller than the large kernel is stretched to it, bilinearly, and the result averaged back.

    Args:
        dim: Channels of query and value.
        context_dim: Channels of the context.
        groups: Kernels of a position, each for as many consecutive channels of each half.
        kernel_size: Of the large kernel; odd.
        small_kernel: Of the small one; odd.

    Shape:
        Query ``[B, dim, H, W]``, context ``[B, context_dim, H, W]``, value ``[B, dim, H, W]`` to ``[B, dim, H, W]``;
        any H and W.

    Raises:
        ValueError: If the groups don't divide half of the channels, or a kernel is even or the small one the larger.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        groups: int,
        kernel_size: int = 7,
        small_kernel: int = 5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if dim % (2 * groups):
            raise ValueError(f"each half of the channels is divided into groups; got {dim} channels, {groups} groups")
        if kernel_size % 2 == 0 or small_kernel % 2 == 0 or not 3 <= small_kernel <= kernel_size:
            raise ValueError(
                f"kernels are odd, at least 3, and the small one is not the larger; got {kernel_size} and "
                f"{small_kernel}"
            )
        dd = {"device": device, "dtype": dtype}
        self.grid = _GRID  # TorchScript knows no globals
        self.groups = groups
        self.kernel_size = kernel_size
        self.small_kernel = small_kernel
        # The authors' scale is that of twice the channels which a group's query has.
        self.scale = (dim // groups) ** -0.5
        self.query = nn.Sequential(nn.Conv2d(dim, dim // 2, 1, bias=False, **dd), nn.BatchNorm2d(dim // 2, **dd))
        self.key = nn.Sequential(nn.Conv2d(context_dim, dim // 2, 1, bias=False, **dd), nn.BatchNorm2d(dim // 2, **dd))
        self.weights = nn.Conv2d(_GRID**2, small_kernel**2 + kernel_size**2, 1, **dd)
        self.rpb1 = nn.Parameter(torch.empty(groups, 2 * small_kernel - 1, 2 * small_kernel - 1, **dd))
        self.rpb2 = nn.Parameter(torch.empty(groups, 2 * kernel_size - 1, 2 * kernel_size - 1, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the biases to zero."""
        nn.init.zeros_(self.rpb1)
        nn.init.zeros_(self.rpb2)

    def forward(self, query: Tensor, context: Tensor, value: Tensor) -> Tensor:
        """Map query ``[B, dim, H, W]``, context ``[B, context_dim, H, W]`` and value ``[B, dim, H, W]`` to the last."""
        height, width = value.shape[2], value.shape[3]
        query, key, value = self._project(query, context, value)
        rows, columns = value.shape[2], value.shape[3]
        logits = self._logits(query, key).transpose(1, 2).unflatten(1, [rows, columns])
        out = mix_windows(logits, value, self.rpb1, self.rpb2, self.small_kernel, self.kernel_size)
        stretched = rows != height or columns != width
        return F.adaptive_avg_pool2d(out, [height, width]) if stretched else out

    def _project(self, query: Tensor, context: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries ``[B, groups, N, d]``, keys ``[B, groups, d, 49]`` and the value, stretched if need be."""
        height, width = value.shape[2], value.shape[3]
        rows, columns = stretched_size(height, width, self.kernel_size)
        if rows != height or columns != width:
            query = F.interpolate(query, size=[rows, columns], mode="bilinear")
            context = F.interpolate(context, size=[rows, columns], mode="bilinear")
            value = F.interpolate(value, size=[rows, columns], mode="bilinear")
        query = self.query(query) * self.scale
        key = self.key(F.adaptive_avg_pool2d(context, [self.grid, self.grid]))
        query = query.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, [self.groups, -1]).transpose(1, 2)
        return query, key.flatten(2).unflatten(1, [self.groups, -1]), value

    def _logits(self, query: Tensor, key: Tensor) -> Tensor:
        """Return ``[B, groups, HW, both windows]`` of query ``[B, groups, HW, d]`` and key ``[B, groups, d, 49]``."""
        if not torch.jit.is_scripting():  # noqa: SIM102 (with more beside it, TorchScript compiles the rest)
            if is_plain(self.weights):
                # A linear map of products is a product with mapped keys, which are few.
                return query @ (key @ self.weights.weight.flatten(1).mT) + self.weights.bias
        affinity = (query @ key).permute(0, 3, 1, 2)
        return self.weights(affinity).permute(0, 2, 3, 1)

    @torch.jit.ignore
    def recorded(self, query: Tensor, context: Tensor, value: Tensor) -> Recorded:
        """Tell what a call did; see `blocks.record`. Heads are the groups' small kernels, then their large ones."""
        size = tuple(value.shape[2:])
        query, key, value = self._project(query, context, value)
        inner = tuple(value.shape[2:])
        tables = [exact(rpb).flatten(1) for rpb in (self.rpb1, self.rpb2)]
        kernels = self.small_kernel, self.kernel_size

        def rows(queries: Tensor) -> Rows:
            logits = exact(self._logits(query[:, :, queries], key)).split([kernel**2 for kernel in kernels], -1)
            keys, weights = [], []
            for part, table, kernel in zip(logits, tables, kernels, strict=True):
                arrays = neighbors([Axis(length, kernel) for length in inner], queries.cpu().numpy())
                tokens, entries = (torch.from_numpy(array).to(value.device) for array in arrays)
                missing = kernels[1] ** 2 - kernel**2
                keys.append(F.pad(tokens, (0, missing), value=-1).expand(1, self.groups, -1, -1))
                weights.append(F.pad((part + table[:, entries]).softmax(-1), (0, missing)))
            return Rows(torch.cat(keys, 1), torch.cat(weights, 1))

        def project(heads: Tensor) -> Tensor:
            return heads_to_map(heads, size).permute(0, 3, 1, 2)

        heads, tokens = 2 * self.groups, inner[0] * inner[1]
        operator = Given(rows, heads, tokens, tokens, heads * kernels[1] ** 2 * 3, value.device)
        values, note, landing = exact(map_to_heads(value.permute(0, 2, 3, 1), heads)), "", None
        if inner != size:
            whole = spread_rows(rows(torch.arange(tokens, device=value.device)), tokens)
            down, across = (pooling_axis(*axis, value.device) for axis in zip(inner, size, strict=True))
            whole = torch.einsum("pr,qc,bhrck->bhpqk", down, across, whole.unflatten(2, inner)).flatten(2, 3)
            operator = Given(
                lambda queries: Rows(None, whole[:, :, queries]), heads, whole.shape[2], tokens, tokens, value.device
            )
            landing = land_by_axes(*(_stretching(*axis, value.device) for axis in zip(size, inner, strict=True)))
            note = "the map is smaller than the kernel: values are those of a stretched one"
        return Recorded("neighborhood", size, operator, values, project, landing=landing, note=note)


def _stretching(length: int, target: int, device: torch.device) -> Tensor:
    """Return the matrix ``[target, length]`` of stretching a line, linear."""
    return F.interpolate(torch.eye(length, device=device)[:, None], size=target, mode="linear")[:, 0].T


@register_notrace_function
@torch.jit.ignore
def stretched_size(height: int, width: int, kernel_size: int) -> tuple[int, int]:
    """Return the size that a map is stretched to: its own, unless a side is below the kernel's.

    In the authors' floating-point arithmetic, which may give a pixel less than the exact quotient; but never less than
    the kernel.
    """
    if min(height, width) >= kernel_size:
        return height, width
    if height < width:
        return kernel_size, max(kernel_size, int(kernel_size / height * width))
    return max(kernel_size, int(kernel_size / width * height)), kernel_size


@register_notrace_function
@torch.jit.ignore
def mix_windows(
    logits: Tensor, value: Tensor, small_rpb: Tensor, large_rpb: Tensor, small_kernel: int, large_kernel: int
) -> Tensor:
    """Return ``[B, C, H, W]``: of the halves of a value of that shape, averages of windows by softmaxed logits.

    Args:
        logits: ``[B, H, W, groups, small window + large window]``.
        value: ``[B, C, H, W]``.
        small_rpb: ``[groups, 2k - 1, 2k - 1]`` of the small window.
        large_rpb: The same of the large one.
        small_kernel: Length of the small window, k.
        large_kernel: Of the large one.
    """
    size, groups = (value.shape[2], value.shape[3]), logits.shape[3]
    kernels = (small_kernel, large_kernel)
    parts = logits.split([kernel**2 for kernel in kernels], -1)
    outs = []
    for part, half, rpb, kernel in zip(parts, value.chunk(2, 1), (small_rpb, large_rpb), kernels, strict=True):
        weights = (part + na2d_bias(rpb, size, kernel)).softmax(-1)
        half = half.permute(0, 2, 3, 1).unflatten(3, (groups, -1))
        outs.append(na2d_av(weights, half, kernel).flatten(3))
    return torch.cat(outs, 3).permute(0, 3, 1, 2)


class ChannelAffine(nn.Module):
    """A factor and a summand for each channel; NCHW.

    The weight has the shape of a depthwise 1x1 convolution's, as published, so that optimizers decay it as there.
    """

    def __init__(self, dim: int, scale: float = 1.0, device=None, dtype=None):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(dim, 1, 1, 1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the factors to the initial scale, the summands to zero."""
        nn.init.constant_(self.weight, self.scale)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias.view(-1, 1, 1), x, self.weight.view(-1, 1, 1))


class GlobalResponseNorm(nn.Module):
    """Scale channels by their share of the map's energy (ConvNeXt V2, arXiv 2301.00808, eq. 1 to 3); NCHW.

    timm's, but the factors are added up before the map is touched, which then is read once, not three times.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(1, dim, 1, 1, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(1, dim, 1, 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin as the identity."""
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        energy = torch.linalg.vector_norm(x, 2, [2, 3], True)
        share = energy / (energy.mean(1, keepdim=True) + 1e-6)
        return torch.addcmul(self.beta, x, torch.addcmul(torch.ones_like(share), self.gamma, share))


class ResidualDepthwise(nn.Module):
    """A map plus its depthwise 3x3 convolution; NCHW."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if torch.jit.is_scripting() else apply_depthwise(self.conv, x, residual=True)


class ResponseMlp(nn.Module):
    """Two 1x1 convolutions around a GELU, a depthwise convolution and a global response norm; NCHW."""

    def __init__(self, dim: int, hidden: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Conv2d(dim, hidden, 1, **dd)
        self.act = nn.GELU()
        self.dw = ResidualDepthwise(hidden, **dd)
        self.grn = GlobalResponseNorm(hidden, **dd)
        self.fc2 = nn.Conv2d(hidden, out_dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.grn(self.dw(self.act(self.fc1(x)))))


def squeeze_excite(dim: int, device=None, dtype=None) -> SEModule:
    """Return the squeeze-and-excitation of OverLoCK: an eighth of the channels, at least 16, and GELU."""
    return SEModule(dim, rd_channels=max(16, dim // 8), act_layer=nn.GELU, device=device, dtype=dtype)


class GatedContextMixing(nn.Module):
    """`ContextMixing`, a large kernel beside it, squeeze-and-excitation, and a gate (arXiv 2502.20087, fig. 4); NCHW.

    Args:
        dim: Channels of source, query and value.
        context_dim: Channels of the context.
        out_dim: Channels of the output.
        groups: As in `ContextMixing`.
        kernel_size: Of the large dynamic kernel and of the static one.
        small_kernel: Of the small dynamic kernel.
        inference_mode: Whether the static kernel is one convolution.

    Shape:
        Source, query, value ``[B, dim, H, W]`` and context ``[B, context_dim, H, W]`` to ``[B, out_dim, H, W]``.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        out_dim: int,
        groups: int,
        kernel_size: int,
        small_kernel: int = 5,
        inference_mode: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.gate = nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False, **dd), nn.BatchNorm2d(dim, **dd), nn.SiLU())
        self.lepe = nn.Sequential(DilatedReparamConv(dim, kernel_size, inference_mode, **dd), nn.BatchNorm2d(dim, **dd))
        self.mix = ContextMixing(dim, context_dim, groups, kernel_size, small_kernel, **dd)
        self.mix_proj = nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False, **dd), nn.BatchNorm2d(dim, **dd))
        self.se = squeeze_excite(dim, **dd)
        self.proj = nn.Sequential(nn.BatchNorm2d(dim, **dd), nn.Conv2d(dim, out_dim, 1, **dd))

    def forward(self, source: Tensor, query: Tensor, context: Tensor, value: Tensor) -> Tensor:
        """Map ``source``, which gate and static kernel see, and what `ContextMixing` takes, to the output."""
        mixed = self.mix_proj(self.mix(query, context, value)) + self.lepe(source)
        return self.proj(self.gate(source) * self.se(mixed))


class ContextMixing2d(nn.Module):
    """Context-mixing dynamic convolution as an attention of a map on itself.

    What `ContMixBlock` adds to its shortcut, for hosts with norms, shortcuts and MLPs of their own.

    Args:
        dim: Channels; divisible by ``2 * num_heads``.
        num_heads: Groups of channels with kernels of their own. The authors' ``num_heads`` is half of it.
        kernel_size: Of the large kernels: a key of `dilated_reparam.BRANCHES`.
        small_kernel: Of the small dynamic kernel.
        inference_mode: Whether the static large kernel is one convolution.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H, W, dim]``; any H and W.

    Raises:
        ValueError: If dim and heads, or the kernels, don't fit; see `ContextMixing`.

    Example:
        >>> ContextMixing2d(32, num_heads=2)(torch.randn(1, 9, 12, 32)).shape
        torch.Size([1, 9, 12, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        small_kernel: int = 5,
        inference_mode: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.value = nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False, **dd), nn.BatchNorm2d(dim, **dd))
        self.gated = GatedContextMixing(dim, dim, dim, num_heads, kernel_size, small_kernel, inference_mode, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, dim]`` to the same shape."""
        x = x.permute(0, 3, 1, 2)
        return self.gated(x, x, x, self.value(x)).permute(0, 2, 3, 1)


class ContMixBlock(nn.Module):
    """The authors' plug-and-play block: depthwise convolutions, context mixing of a map with itself, an MLP; NCHW.

    Args:
        dim: Channels; divisible by ``4 * num_heads``.
        kernel_size: Of the large kernels: a key of `dilated_reparam.BRANCHES`.
        smk_size: Of the small dynamic kernel.
        num_heads: Half the groups of channels with kernels of their own, as the authors count.
        mlp_ratio: Hidden channels of the MLP over ``dim``.
        res_scale: Whether the scales are on the shortcuts instead of the branches.
        ls_init_value: Initial scales; None for no scales.
        drop_path: Rate of stochastic depth.
        deploy: Whether the static large kernel is one convolution.

    Shape:
        ``[B, dim, H, W]`` to the same shape; any H and W.

    Raises:
        ValueError: If dim and heads, or the kernels, don't fit; see `ContextMixing`.

    Example:
        >>> ContMixBlock(32)(torch.randn(2, 32, 5, 9)).shape
        torch.Size([2, 32, 5, 9])
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        smk_size: int = 5,
        num_heads: int = 2,
        mlp_ratio: float = 4.0,
        res_scale: bool = False,
        ls_init_value: float | None = None,
        drop_path: float = 0.0,
        deploy: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.res_scale = res_scale
        self.dwconv1 = ResidualDepthwise(dim, **dd)
        self.norm1 = LayerNorm2d(dim, eps=1e-6, **dd)
        self.mixer = ContextMixing2d(dim, 2 * num_heads, kernel_size, smk_size, deploy, **dd)
        self.ls1 = nn.Identity() if ls_init_value is None else ChannelAffine(dim, ls_init_value, **dd)
        self.dwconv2 = ResidualDepthwise(dim, **dd)
        self.norm2 = LayerNorm2d(dim, eps=1e-6, **dd)
        self.mlp = ResponseMlp(dim, int(dim * mlp_ratio), dim, **dd)
        self.ls2 = nn.Identity() if ls_init_value is None else ChannelAffine(dim, ls_init_value, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, dim, H, W]`` to the same shape."""
        x = self.dwconv1(x)
        mixed = self.mixer(self.norm1(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self._add(x, mixed, self.ls1)
        x = self.dwconv2(x)
        return self._add(x, self.mlp(self.norm2(x)), self.ls2)

    def _add(self, x: Tensor, branch: Tensor, scale: nn.Module) -> Tensor:
        if self.res_scale:
            return scale(x) + self.drop_path(branch)
        return x + self.drop_path(scale(branch))


# From the authors' names within a block to ours, in order; each is tried on what those before it made.
_RENAMES = (
    (r"\b(dwconv\d?)\.(weight|bias)$", r"\1.conv.\2"),
    (r"\bweight_query\.", "mix.query."),
    (r"\bweight_key\.1\.", "mix.key.0."),
    (r"\bweight_key\.2\.", "mix.key.1."),
    (r"\bweight_proj\.", "mix.weights."),
    (r"\b(rpb[12])$", r"mix.\1"),
    (r"\b(dyconv|fusion)_proj\.", "mix_proj."),
    (r"\bse_layer\.proj\.1\.", "se.fc1."),
    (r"\bse_layer\.proj\.3\.", "se.fc2."),
    (r"\bmlp\.0\.", "mlp.fc1."),
    (r"\bmlp\.2\.", "mlp.dw.conv."),
    (r"\bmlp\.3\.", "mlp.grn."),
    (r"\bmlp\.4\.", "mlp.fc2."),
)
_GATED = re.compile(r"\b(gate|lepe|mix|mix_proj|se|proj)\.")


def rename_published(key: str, owner: str) -> str:
    """Return our name of an entry of the authors' dynamic blocks, whose `GatedContextMixing` is called ``owner``."""
    for pattern, name in _RENAMES:
        key = re.sub(pattern, name, key)
    return _GATED.sub(rf"{owner}.\g<0>", key, count=1) if "mlp." not in key else key


def convert_contmix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of the authors' stand-alone block (``models/contmix.py``) to `ContMixBlock`'s names."""
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^weight_value\.", "mixer.value.", key)
        renamed[key if key.startswith("mixer.") else rename_published(key, "mixer.gated")] = value
    return rename_branches(renamed)
