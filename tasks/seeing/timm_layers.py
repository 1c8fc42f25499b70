"""How calls of timm's attention classes are recorded: recomputed by their own layers, as their forwards do.

A reader gets the `Site` of an attention, what its parent was called with, the image's size, and the call's inputs.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, SEModule, apply_rot_embed_cat
from timm.layers.cbam import CbamModule
from timm.layers.halo_attn import HaloAttn
from timm.models import davit, eva, maxxvit, pvt_v2, swin_transformer, twins
from torch import Tensor, nn

from ...blocks.cbam import gate_of
from ...blocks.record import (
    Landing,
    Recorded,
    Softmax,
    Windows,
    axis_blocks,
    exact,
    heads_to_map,
    land_by_axes,
    number_box,
    pooling_axis,
    tell_gate,
)
from ...blocks.window import cut_windows
from ...zoo.hosts.deit import TokenBlock
from .. import TaskError


class Site(NamedTuple):
    """An attention in a model.

    Attributes:
        module: The attention.
        parent: The module around it that knows the map, if there is one of `PARENTS`.
        owner: The model that it belongs to.
    """

    module: nn.Module
    parent: nn.Module | None
    owner: nn.Module


Around = tuple[tuple, dict] | None
Size = tuple[int, int] | None


def map_size_of_tokens(count: int, image_size: Size) -> tuple[int, int]:
    """Return height and width of a map of ``count`` tokens: the factors nearest to the image's shape."""
    height, width = image_size or (1, 1)
    pairs = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    return min(pairs, key=lambda pair: abs(math.log(pair[0] / pair[1] * width / height)))


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _join(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)


def _mask_rows(mask: Tensor | None, is_causal: bool, tokens: int) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """Return what a mask adds to the scores of queries, as `Softmax` takes it."""
    if is_causal:
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
    return lambda queries, _: exact(mask).to(queries.device)[..., queries if mask.shape[-2] > 1 else slice(None), :]


def _tokens(
    site: Site,
    around: Around,
    image_size: Size,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    project: Callable[[Tensor], Tensor],
    bias: Callable[[Tensor, Tensor | None], Tensor] | None,
) -> Recorded:
    """Tell of an attention from all tokens to all; ``[B, heads, N, d]`` each, the queries scaled."""
    tokens, owner = q.shape[2], site.owner
    if isinstance(site.parent, TokenBlock):
        map_size = tuple(map(int, around[0][1:3]))
        prefix = tokens - map_size[0] * map_size[1]
    else:
        prefix = getattr(owner, "num_prefix_tokens", 0)
        dropped = getattr(owner, "patch_drop", None)
        if owner.training and isinstance(dropped, nn.Module) and not isinstance(dropped, nn.Identity):
            raise TaskError("patches are dropped in training, so that tokens are no map; call model.eval() first")
        map_size = map_size_of_tokens(tokens - prefix, image_size)
    return Recorded("global", map_size, Softmax(q, k, bias=bias), exact(v), project, prefix=prefix)


def _finish(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what timm's token attentions do with their heads: norm, gate, projection."""
    gate = module.gate(x).sigmoid() if getattr(module, "gate", None) is not None else None

    def project(heads: Tensor) -> Tensor:
        out = module.norm(_join(heads))
        return module.proj(out if gate is None else out * gate)

    return project


def read_attention(
    site: Site, around: Around, image_size: Size, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Recorded:
    """Read timm's `Attention`: ViT, DeiT and many others."""
    module = site.module
    q, k, v = (_heads(part, module.num_heads) for part in module.qkv(x).chunk(3, -1))
    q, k = module.q_norm(q) * module.scale, module.k_norm(k)
    bias = _mask_rows(attn_mask, is_causal, x.shape[1])
    return _tokens(site, around, image_size, q, k, v, _finish(module, x), bias)


def read_rotary(
    site: Site,
    around: Around,
    image_size: Size,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Recorded:
    """Read timm's `EvaAttention` and `AttentionRope`: EVA, DINOv3."""
    module = site.module
    if module.qkv is not None:
        qkv = module.qkv(x)
        if getattr(module, "q_bias", None) is not None:
            qkv = qkv + torch.cat((module.q_bias, module.k_bias, module.v_bias))
        q, k, v = (_heads(part, module.num_heads) for part in qkv.chunk(3, -1))
    else:
        groups = module.num_heads // getattr(module, "num_kv_heads", module.num_heads)
        q = _heads(module.q_proj(x), module.num_heads)
        k, v = (_heads(layer(x), module.num_heads // groups) for layer in (module.k_proj, module.v_proj))
    q, k = module.q_norm(q), module.k_norm(k)
    if rope is not None:
        first, half = module.num_prefix_tokens, getattr(module, "rotate_half", False)
        q, k = (
            torch.cat([part[:, :, :first], apply_rot_embed_cat(part[:, :, first:], rope, half=half)], 2).type_as(v)
            for part in (q, k)
        )
    repeats = module.num_heads // k.shape[1]
    k, v = (part.repeat_interleave(repeats, 1) for part in (k, v))
    bias = _mask_rows(attn_mask, is_causal, x.shape[1])
    return _tokens(site, around, image_size, q * module.scale, k, v, _finish(module, x), bias)


def _windows(
    module: nn.Module,
    numbers: Tensor,
    window: Sequence[int],
    map_size: tuple[int, int],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    hidden: Tensor | None = None,
    project: Callable[[Tensor], Tensor] | None = None,
    cut: Callable[[Tensor], Tensor] | None = None,
) -> Recorded:
    """Tell of an attention within windows, whose module is given windows and returns them.

    Args:
        module: The attention.
        numbers: Of the padded, rolled map's tokens ``[H', W']``.
        window: Height and width of a window.
        map_size: Height and width of the map.
        q: Scaled queries ``[B * windows, heads, n, d]``.
        k: Keys of that shape.
        v: Values of that shape.
        bias: Of a window's places ``[heads, n, n]``.
        hidden: Which places of each window don't see which, ``[windows, n, n]``.
        project: As in `Recorded`; the module's ``proj`` of the map's tokens by default.
        cut: How windows are cut, if not into blocks: from ``[1, H', W', 1]`` to ``[windows, n, 1]``.
    """
    numbers = numbers.to(q.device)[None, :, :, None]
    tokens = cut_windows(numbers, *window, 0, 0) if cut is None else cut(numbers)
    windows = Windows(tokens.squeeze(-1), hidden)
    count = map_size[0] * map_size[1]
    q, k, v = (windows.join(part) for part in (q, k, v))
    operator = Softmax(q[:, :, :count], k, windows.keys, None if bias is None else windows.bias(bias))

    def arrange(out: Tensor) -> Tensor:
        return windows.join(out.flatten(1, -2)[:, None])[:, 0, :count].unflatten(1, map_size)

    if project is None:
        return Recorded(
            "window", map_size, operator, exact(v), lambda x: module.proj(heads_to_map(x, map_size)), arrange=arrange
        )
    return Recorded("window", map_size, operator, exact(v), project)


def _padded(length: int, window: int) -> int:
    return -(-length // window) * window


def read_swin(site: Site, around: Around, image_size: Size, x: Tensor, mask: Tensor | None = None) -> Recorded:
    """Read Swin's windows; timm rolls the map first and pads it then."""
    module, block, source = site.module, site.parent, around[0][0]
    height, width = source.shape[1:3]
    (high, wide), shift = block.window_size, block.shift_size
    numbers = number_box((height, width), (_padded(height, high), _padded(width, wide)))
    numbers[:height, :width] = numbers[:height, :width].roll((-shift[0], -shift[1]), (0, 1))
    q, k, v = (_heads(part, module.num_heads) for part in module.qkv(x).chunk(3, -1))
    hidden = None if mask is None else mask != 0
    bias = module._get_rel_pos_bias()[0]
    return _windows(module, numbers, (high, wide), (height, width), q * module.scale, k, v, bias, hidden)


def read_davit_windows(site: Site, around: Around, image_size: Size, x: Tensor) -> Recorded:
    """Read DaViT's windows."""
    module, window, map_size = site.module, site.parent.window_size, tuple(around[0][0].shape[2:])
    numbers = number_box(map_size, [_padded(*axis) for axis in zip(map_size, window, strict=True)])
    q, k, v = (_heads(part, module.num_heads) for part in module.qkv(x).chunk(3, -1))
    return _windows(module, numbers, window, map_size, q * module.scale, k, v)


def read_davit_channels(site: Site, around: Around, image_size: Size, x: Tensor) -> Recorded:
    """Read DaViT's groups of channels, of either version."""
    module, second = site.module, isinstance(site.module, davit.ChannelAttentionV2)
    groups = module.groups if second else module.num_heads
    q, k, v = (_heads(part, groups) for part in module.qkv(x).chunk(3, -1))
    if second:
        left, right, mixed = q * (x.shape[1] ** -0.5 if module.dynamic_scale else module.head_dim**-0.5), k, v
    else:
        left, right, mixed = k * module.scale, v, q
    operator = Softmax(left.mT, right.mT)
    map_size = tuple(around[0][0].shape[2:])
    return Recorded("channel", map_size, operator, exact(mixed.mT), lambda out: module.proj(_join(out.mT)))


def read_twins_windows(site: Site, around: Around, image_size: Size, x: Tensor, size: tuple[int, int]) -> Recorded:
    """Read Twins' windows."""
    module, map_size = site.module, tuple(map(int, size))
    window = (module.ws, module.ws)
    padded = [_padded(length, module.ws) for length in map_size]
    windows = cut_windows(x.unflatten(1, map_size), *window, 0, 0)
    q, k, v = (_heads(part, module.num_heads) for part in module.qkv(windows).chunk(3, -1))
    numbers = number_box(map_size, padded)
    project = lambda heads: module.proj(_join(heads))  # noqa: E731 (one of two)
    return _windows(module, numbers, window, map_size, q * module.scale, k, v, project=project)


def read_reduced(site: Site, around: Around, image_size: Size, x: Tensor, size: tuple[int, int]) -> Recorded:
    """Read attention to a reduced map: Twins' and PVTv2's, with strided convolution or pooling."""
    module, map_size = site.module, tuple(map(int, size))
    q, landing, device = _heads(module.q(x), module.num_heads) * module.scale, None, x.device
    if module.sr is not None:
        image = x.mT.unflatten(2, map_size)
        if getattr(module, "pool", None) is not None:
            image = module.pool(image)
            rows, columns = (pooling_axis(*axis, device) for axis in zip(map_size, image.shape[2:], strict=True))
            x = module.act(module.norm(module.sr(image).flatten(2).mT))
        else:
            image, step = module.sr(image), module.sr.stride[0]
            rows, columns = (axis_blocks(n, step, m, device) for n, m in zip(map_size, image.shape[2:], strict=True))
            x = module.norm(image.flatten(2).mT)
        landing = land_by_axes(rows, columns)
    k, v = (_heads(part, module.num_heads) for part in module.kv(x).chunk(2, -1))
    return Recorded(
        "global", map_size, Softmax(q, k), exact(v), lambda heads: module.proj(_join(heads)), landing=landing
    )


def read_maxvit(
    site: Site, around: Around, image_size: Size, x: Tensor, shared_rel_pos: Tensor | None = None
) -> Recorded:
    """Read MaxViT's and CoAtNet's attention: in blocks, in grids, or over the whole map."""
    module, parent, source = site.module, site.parent, around[0][0]
    first = isinstance(module, maxxvit.Attention2d)
    tokens = x.flatten(2).mT if first else x.flatten(1, -2)
    qkv = module.qkv(x).flatten(2).mT if first else module.qkv(tokens)
    if module.head_first:
        q, k, v = qkv.unflatten(-1, (module.num_heads, -1)).transpose(1, 2).chunk(3, -1)
    else:
        q, k, v = qkv.unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q = q * module.scale
    bias = shared_rel_pos if module.rel_pos is None else module.rel_pos.get_bias()
    if isinstance(parent, maxxvit.TransformerBlock2d):
        map_size = tuple(x.shape[2:])
        rows = None if bias is None else lambda queries, _: exact(bias)[..., queries, :]
        operator = Softmax(q, k, bias=rows)
        return Recorded("global", map_size, operator, exact(v), lambda out: module.proj(_to_nchw(out, map_size)))
    map_size = tuple(source.shape[2:] if first else source.shape[1:3])
    size = parent.partition_size
    block = parent.partition_block if hasattr(parent, "partition_block") else module is parent.attn_block
    cut = None if block else lambda numbers: maxxvit.grid_partition(numbers, size).flatten(1, 2)
    bias = None if bias is None else bias[0] if bias.ndim == 4 else bias
    recorded = _windows(module, number_box(map_size, map_size), size, map_size, q, k, v, bias, cut=cut)
    if first:
        arrange = recorded.arrange
        recorded.project = lambda out: module.proj(_to_nchw(out, map_size))
        recorded.arrange = lambda out: arrange(out.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if not block:
        recorded.note = "a window is a grid of positions that are spread evenly over the map"
    return recorded


def read_halo(site: Site, around: Around, image_size: Size, x: Tensor) -> Recorded:
    """Read HaloNet's blocks of queries, which see the block and a halo of cells around it."""
    module, map_size = site.module, tuple(x.shape[2:])
    heads, halo, window, block = module.num_heads, module.halo_size, module.win_size, module.block_size_ds
    numbers = number_box(map_size, [length + 2 * halo for length in map_size], [halo, halo]).to(x.device)
    q = module.q(x).unflatten(1, (heads, -1))
    # What lies around the map is zero and has its share of the softmax.
    kv = F.pad(module.kv(x), [halo] * 4).unflatten(1, (heads, -1)).flatten(3).mT[:, :, numbers.flatten().argsort()]
    k, v = kv.split([module.dim_head_qk, module.dim_head_v], -1)

    rows, columns = query_size = tuple(q.shape[3:])
    cells = torch.arange(rows * columns, device=x.device).view(1, rows, columns, 1)
    in_blocks = Windows(cut_windows(cells, block, block, 0, 0).squeeze(-1))
    windows = numbers.unfold(0, window, module.block_size).unfold(1, window, module.block_size).flatten(2).flatten(0, 1)
    queries = cut_windows(q.flatten(0, 1).permute(0, 2, 3, 1), block, block, 0, 0)
    position = module.pos_embed(queries.unflatten(0, (len(x) * heads, -1))).unflatten(0, (-1, heads))
    if module.scale_pos_embed:
        position = position * module.scale

    def project(out: Tensor) -> Tensor:
        return module.pool(_to_nchw(out, query_size))

    operator = Softmax(
        q.flatten(3).mT * module.scale,
        k,
        lambda queries: windows[in_blocks.window[queries]][None, None],
        lambda queries, _: exact(position)[:, :, in_blocks.window[queries], in_blocks.place[queries]],
    )
    landing = None
    if query_size != map_size:
        tokens = torch.arange(map_size[0] * map_size[1], device=x.device)
        step = module.block_stride
        coarse = tokens // map_size[1] // step * columns + tokens % map_size[1] // step
        landing = Landing(tokens, coarse[None], torch.ones_like(coarse, dtype=v.dtype)[None])
    return Recorded("window", query_size, operator, exact(v), project, landing=landing)


def read_cbam(site: Site, around: Around, image_size: Size, x: Tensor) -> Recorded:
    """Read CBAM's gate."""
    return tell_gate(x, gate_of(site.module, x))


def read_squeeze_excite(site: Site, around: Around, image_size: Size, x: Tensor) -> Recorded:
    """Read squeeze-and-excitation's gate of channels."""
    module = site.module
    pooled = x.mean((2, 3), keepdim=True)
    if module.add_maxpool:
        pooled = 0.5 * pooled + 0.5 * x.amax((2, 3), keepdim=True)
    return tell_gate(x, module.gate(module.fc2(module.act(module.bn(module.fc1(pooled))))))


def _to_nchw(heads: Tensor, map_size: tuple[int, int]) -> Tensor:
    return heads_to_map(heads, map_size).permute(0, 3, 1, 2)


# How to read a class of timm's, and those derived from it.
READERS: dict[type[nn.Module], Callable[..., Recorded]] = {
    Attention: read_attention,
    AttentionRope: read_rotary,
    eva.EvaAttention: read_rotary,
    swin_transformer.WindowAttention: read_swin,
    davit.WindowAttention: read_davit_windows,
    davit.ChannelAttention: read_davit_channels,
    davit.ChannelAttentionV2: read_davit_channels,
    twins.LocallyGroupedAttn: read_twins_windows,
    twins.GlobalSubSampleAttn: read_reduced,
    pvt_v2.Attention: read_reduced,
    maxxvit.Attention2d: read_maxvit,
    maxxvit.AttentionCl: read_maxvit,
    HaloAttn: read_halo,
    CbamModule: read_cbam,
    SEModule: read_squeeze_excite,
}
# Blocks that know the map which their attention, an attribute of theirs, is given pieces of.
PARENTS: dict[type[nn.Module], tuple[str, ...]] = {
    TokenBlock: ("attn",),
    swin_transformer.SwinTransformerBlock: ("attn",),
    davit.SpatialBlock: ("attn",),
    davit.ChannelBlock: ("attn",),
    maxxvit.PartitionAttention2d: ("attn",),
    maxxvit.PartitionAttentionCl: ("attn",),
    maxxvit.ParallelPartitionAttention: ("attn_block", "attn_grid"),
    maxxvit.TransformerBlock2d: ("attn",),
}
NEED_PARENTS = (
    swin_transformer.WindowAttention,
    davit.WindowAttention,
    davit.ChannelAttention,
    davit.ChannelAttentionV2,
    maxxvit.Attention2d,
    maxxvit.AttentionCl,
)
