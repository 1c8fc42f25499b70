"""Dense attention in the layout of the neighborhood operators, and the merging of partial attentions."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .backends import default_scale


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query to every key.

    Args:
        query: ``[B, N, heads, dim]``.
        key: ``[B, M, heads_kv, dim]``, where ``heads_kv`` divides ``heads``: consecutive query heads share one.
        value: ``[B, M, heads_kv, dim_v]``.
        is_causal: Whether query i sees only keys up to i.
        scale: Factor on the scores; ``dim ** -0.5`` by default.
        return_lse: Whether to return the log-sum-exp of the scores too; then all scores are held in memory.

    Returns:
        ``[B, N, heads, dim_v]``; with ``return_lse`` also ``[B, N, heads]``, natural logarithm, at least float32.

    Raises:
        ValueError: If the shapes don't fit.
    """
    if (
        {query.ndim, key.ndim, value.ndim} != {4}
        or query.shape[-1] != key.shape[-1]
        or key.shape[:-1] != value.shape[:-1]
        or query.shape[0] != key.shape[0]
        or query.shape[2] % max(key.shape[2], 1)
    ):
        raise ValueError(
            "attention takes query [B, N, heads, dim], key [B, M, heads_kv, dim] and value [B, M, heads_kv, dim_v]; "
            f"got {list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    group = query.shape[2] // max(key.shape[2], 1)
    scale = default_scale(query) if scale is None else scale
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    if not return_lse:
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale).transpose(1, 2)
    scores = (query * scale @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32))
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    output = scores.softmax(-1).to(value.dtype) @ value
    return output.transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)


def without_cudnn(x: Tensor) -> AbstractContextManager:
    """Return a context in which `F.scaled_dot_product_attention` of tensors like ``x`` leaves cuDNN out.

    cuDNN's backward pass gives NaN for the strided windows of cross-shaped attention in bfloat16: seen with torch 2.11
    on an H200, where torch's other paths are right.
    """
    if not x.is_cuda:
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attentions of the same queries to disjoint sets of keys into the attention to their union.

    Args:
        outputs: Two or more tensors ``[..., heads, dim]``.
        lses: Their log-sum-exps ``[..., heads]``, natural logarithm.

    Returns:
        The merged output, in the dtype of the first, and its log-sum-exp.

    Raises:
        ValueError: If there are fewer than two, or the shapes don't fit.
    """
    if len(outputs) < 2 or len(outputs) != len(lses):
        raise ValueError(
            f"merge_attentions takes two or more outputs, each with its lse; got {len(outputs)}, {len(lses)}"
        )
    for output, lse in zip(outputs, lses, strict=True):
        if output.shape != outputs[0].shape or lse.shape != output.shape[:-1]:
            raise ValueError(
                f"merge_attentions needs outputs of one shape {list(outputs[0].shape)} and lses without its last axis; "
                f"got {list(output.shape)} and {list(lse.shape)}"
            )
    stacked = torch.stack([lse.to(torch.promote_types(lse.dtype, torch.float32)) for lse in lses])
    weights = stacked.softmax(0)
    merged = sum(weight[..., None] * output for weight, output in zip(weights, outputs, strict=True))
    return merged.to(outputs[0].dtype), stacked.logsumexp(0)
