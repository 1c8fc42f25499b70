"""Large depthwise kernels, trained as several dilated ones beside each other (UniRepLKNet, arXiv 2311.15599)."""

import re

import torch
from torch import Tensor, nn

from .depthwise import apply_depthwise

# Of each large kernel, the sizes and dilations of those beside it.
BRANCHES = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


class DilatedReparamConv(nn.Module):
    """A large depthwise convolution: the sum of batch-normed smaller ones and itself, or what they amount to; NCHW.

    `reparameterize` turns the first form, in which it trains, into the second, one convolution with a bias; what it
    computes in evaluation stays the same. `timm.utils.reparameterize_model` finds it.

    Args:
        dim: Channels.
        kernel_size: One of `BRANCHES`.
        inference_mode: Whether to begin as one convolution.

    Shape:
        ``[B, dim, H, W]`` to the same shape; any H and W.

    Raises:
        ValueError: If there are no branches for the kernel size.

    Example:
        >>> conv = DilatedReparamConv(8, 7).eval()
        >>> x = torch.randn(1, 8, 5, 9)
        >>> before = conv(x)
        >>> conv.reparameterize()
        >>> torch.allclose(conv(x), before, atol=1e-5)
        True
    """

    def __init__(self, dim: int, kernel_size: int, inference_mode: bool = False, device=None, dtype=None):
        super().__init__()
        if kernel_size not in BRANCHES:
            raise ValueError(f"there are branches for kernels of {', '.join(map(str, BRANCHES))}; got {kernel_size}")
        dd = {"device": device, "dtype": dtype}
        self.lk_origin = nn.Conv2d(
            dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=inference_mode, **dd
        )
        self.origin_bn = nn.Identity() if inference_mode else nn.BatchNorm2d(dim, **dd)
        convs, norms = [], []
        for size, dilation in () if inference_mode else BRANCHES[kernel_size]:
            padding = dilation * (size - 1) // 2
            convs.append(nn.Conv2d(dim, dim, size, padding=padding, dilation=dilation, groups=dim, bias=False, **dd))
            norms.append(nn.BatchNorm2d(dim, **dd))
        self.dil_convs = nn.ModuleList(convs)
        self.dil_bns = nn.ModuleList(norms)

    def forward(self, x: Tensor) -> Tensor:
        out = self.origin_bn(self.lk_origin(x) if torch.jit.is_scripting() else apply_depthwise(self.lk_origin, x))
        for conv, norm in zip(self.dil_convs, self.dil_bns):  # noqa: B905 (TorchScript knows no strict)
            out = out + norm(conv(x) if torch.jit.is_scripting() else apply_depthwise(conv, x))
        return out

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Become one convolution, with the statistics of the batch norms as they are; a second call does nothing."""
        if isinstance(self.origin_bn, nn.Identity):
            return
        old = self.lk_origin
        parts = [(old, self.origin_bn), *zip(self.dil_convs, self.dil_bns, strict=True)]
        with torch.no_grad():
            weight, bias = merge_branches(
                [
                    (conv.weight, conv.dilation[0], norm.weight, norm.bias, norm.running_mean, norm.running_var)
                    for conv, norm in parts
                ],
                self.origin_bn.eps,
            )
        new = nn.Conv2d(
            old.in_channels,
            old.in_channels,
            old.kernel_size,
            padding=old.padding,
            groups=old.groups,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        new.weight.data.copy_(weight)
        new.bias.data.copy_(bias)
        self.lk_origin = new.train(self.training).requires_grad_(old.weight.requires_grad)
        self.origin_bn = nn.Identity()
        self.dil_convs, self.dil_bns = nn.ModuleList(), nn.ModuleList()


def merge_branches(
    branches: list[tuple[Tensor, int, Tensor, Tensor, Tensor, Tensor]], eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Return the kernel ``[C, 1, K, K]`` and bias ``[C]`` that branches amount to, computed in float64.

    Args:
        branches: Of each, the largest first: kernel ``[C, 1, s, s]``, dilation, and its batch norm's weight, bias,
            mean and variance ``[C]``.
        eps: Of the batch norms.
    """
    dtype = branches[0][0].dtype
    total = torch.zeros_like(branches[0][0], dtype=torch.float64)
    shift = total.new_zeros(len(total))
    for kernel, dilation, *statistics in branches:
        weight, bias, mean, variance = (value.double() for value in statistics)
        scale = weight / (variance + eps).sqrt()
        extent = dilation * (kernel.shape[-1] - 1) + 1
        start = (total.shape[-1] - extent) // 2
        place = slice(start, start + extent, dilation)
        total[:, :, place, place] += kernel.double() * scale.view(-1, 1, 1, 1)
        shift += bias - mean * scale
    return total.to(dtype), shift.to(dtype)


def rename_branches(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict whose branches have, instead of the names that tell size and dilation, their numbers."""
    renamed = {}
    for key, value in state.items():
        if match := re.match(r"(.*\.)?dil_(conv|bn)_k(\d+)_(\d+)\.(.*)", key):
            prefix, kind, size, dilation, leaf = match.groups()
            prefix = prefix or ""
            pairs = BRANCHES.get(state[f"{prefix}lk_origin.weight"].shape[-1], ())
            pair = (int(size), int(dilation))
            if pair in pairs:
                key = f"{prefix}dil_{kind}s.{pairs.index(pair)}.{leaf}"
        renamed[key] = value
    return renamed


def merge_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict, in our names, whose `DilatedReparamConv` are all re-parameterised; others stay.

    So does what lacks a branch: it is for the strict loading to say so.
    """
    merged = dict(state)
    for stem in [key.removesuffix("origin_bn.weight") for key in state if key.endswith("origin_bn.weight")]:
        pairs = BRANCHES.get(state[f"{stem}lk_origin.weight"].shape[-1], ())
        parts = [("lk_origin", "origin_bn", 1)]
        parts += [(f"dil_convs.{i}", f"dil_bns.{i}", dilation) for i, (_, dilation) in enumerate(pairs)]
        leaves = ("weight", "bias", "running_mean", "running_var")
        needed = [f"{conv}.weight" for conv, _, _ in parts]
        needed += [f"{norm}.{leaf}" for _, norm, _ in parts for leaf in leaves]
        if not state.keys() >= {stem + key for key in needed}:
            continue
        branches = [
            (state[f"{stem}{conv}.weight"], dilation, *(state[f"{stem}{norm}.{leaf}"] for leaf in leaves))
            for conv, norm, dilation in parts
        ]
        weight, bias = merge_branches(branches)
        merged = {key: value for key, value in merged.items() if not key.startswith((f"{stem}dil_", f"{stem}origin_"))}
        merged |= {f"{stem}lk_origin.weight": weight, f"{stem}lk_origin.bias": bias}
    return merged
