"""Mixture of heads: each position weighs the heads of its attention, and drops some (MoH, arXiv 2410.11842)."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels.precision import full_precision
from .losses import report_loss
from .plain import is_plain
from .record import Given, Operator, Recorded, Rows, exact, heads_to_map


class HeadRouter(nn.Module):
    """The weight of each head at each position: of heads that all share, and of the best few of the others.

    The first ``shared_heads`` heads are shared: their weights are a softmax, times their number. Of the other ones a
    position keeps the ``routed_heads`` with the largest gates, whose weights add up to that number. A second softmax
    of two, times 2, weighs the shared against the routed part.

    Logits and gates are computed in float32 at least, also under autocast and in a half-precision model: in half
    precision, gates that differ by less than their rounding would choose other heads, and with them change the output
    by more than any rounding. The weights are returned in the input's dtype. Only a layer that must be called as it is
    (hooked, adapted, scripted) computes its logits in its own dtype.

    Args:
        dim: Channels of the attention's input.
        num_heads: Heads of the attention.
        shared_heads: Heads that every position uses; all, if none is routed.
        routed_heads: Heads that a position chooses of the others.

    Shape:
        ``[..., dim]`` to ``[..., num_heads]``.

    Raises:
        ValueError: If there are fewer heads than that, or nothing to weigh.

    Example:
        >>> weights = HeadRouter(64, num_heads=4, shared_heads=1, routed_heads=2)(torch.randn(1, 5, 7, 64))
        >>> (weights > 0).sum(-1).unique().tolist()
        [3]
    """

    def __init__(self, dim: int, num_heads: int, shared_heads: int = 1, routed_heads: int = 1, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype, "bias": False}
        candidates = num_heads - shared_heads
        if min(shared_heads, routed_heads) < 0 or routed_heads > candidates or (not routed_heads and candidates):
            raise ValueError(
                f"HeadRouter divides {num_heads} heads into shared and candidates, of which it routes 1 to all, or 0 "
                f"of none; got shared_heads {shared_heads}, routed_heads {routed_heads}"
            )
        if not routed_heads and shared_heads < 2:
            raise ValueError(f"HeadRouter has nothing to weigh with shared_heads {shared_heads} and no routed ones")
        self.shared_heads = shared_heads
        self.routed_heads = routed_heads
        self.wg = nn.Linear(dim, candidates, **dd) if routed_heads else None
        self.wg_0 = nn.Linear(dim, 2, **dd) if routed_heads and shared_heads else None
        self.wg_1 = nn.Linear(dim, shared_heads, **dd) if shared_heads > 1 else None

    def extra_repr(self) -> str:
        """Return the settings that `print(model)` shows."""
        return f"shared_heads={self.shared_heads}, routed_heads={self.routed_heads}"

    def forward(self, x: Tensor) -> Tensor:
        """Return the weights of the heads at each position of ``x``."""
        if torch.jit.is_scripting():
            gates: Tensor | None = None
            parts: Tensor | None = None
            shared: Tensor | None = None
            if self.wg is not None:
                gates = self.wg(x)
            if self.wg_0 is not None:
                parts = self.wg_0(x)
            if self.wg_1 is not None:
                shared = self.wg_1(x)
            return weigh_scripted(x, gates, parts, shared, self.shared_heads, self.routed_heads)
        else:
            return self.route(x)[0]

    @torch.jit.ignore
    def route(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the weights, and the balance loss of this call: None unless heads are routed.

        The loss is ``E * sum(P * f)`` over the E candidates: P is the mean gate of a head, f the share of positions
        that chose it, which has no gradient. Perfect balance makes it ``routed_heads``.
        """
        with full_precision(x):
            logits = [None if layer is None else _exact(layer, x) for layer in (self.wg, self.wg_0, self.wg_1)]
            return _weigh(x, *logits, self.shared_heads, self.routed_heads)


def _weigh(
    x: Tensor, gates: Tensor | None, parts: Tensor | None, shared: Tensor | None, shared_heads: int, routed_heads: int
) -> tuple[Tensor, Tensor | None]:
    """Return what `HeadRouter.route` does, from the logits of its layers."""
    if shared is not None:
        shared = shared.softmax(-1) * shared_heads
    elif shared_heads:
        shared = x.new_ones(*x.shape[:-1], 1, dtype=torch.promote_types(x.dtype, torch.float32))
    if gates is None:
        return shared.to(x.dtype), None
    gates = gates.softmax(-1)
    mask = torch.zeros_like(gates).scatter(-1, gates.topk(routed_heads, dim=-1).indices, 1.0)
    loss = gates.shape[-1] * (gates.flatten(0, -2).mean(0) * mask.flatten(0, -2).mean(0)).sum()
    routed = gates * mask
    least = torch.finfo(gates.dtype).eps
    routed = routed / routed.sum(-1, keepdim=True).clamp(min=least) * routed_heads
    if parts is None:
        return routed.to(x.dtype), loss
    parts = 2 * parts.softmax(-1)
    weights = torch.cat([parts[..., :1] * shared, parts[..., 1:] * routed], -1)
    return weights.to(x.dtype), loss


@torch.jit.ignore
def weigh_scripted(
    x: Tensor, gates: Tensor | None, parts: Tensor | None, shared: Tensor | None, shared_heads: int, routed_heads: int
) -> Tensor:
    """Return the weights that `HeadRouter` gives heads, from logits that TorchScript computed in the layers' dtype."""
    with full_precision(x):
        exact = torch.promote_types(x.dtype, torch.float32)
        logits = [None if part is None else part.to(exact) for part in (gates, parts, shared)]
        return _weigh(x, *logits, shared_heads, routed_heads)[0]


def _exact(layer: nn.Module, x: Tensor) -> Tensor:
    """Return a linear layer's output in float32 at least; of one that is more than its weights, as it comes."""
    exact = torch.promote_types(x.dtype, torch.float32)
    if is_plain(layer):
        return F.linear(x.to(exact), layer.weight.to(exact))
    # Under autocast a layer of float32 gets inputs of half precision.
    parameter = next(layer.parameters(), x)
    return layer(x.to(parameter.dtype) if parameter.is_floating_point() else x).to(exact)


# What it reports is no part of a traced graph.
@register_notrace_module
class MixtureOfHeads2d(nn.Module):
    """An attention whose heads each position weighs by a `HeadRouter` before their projection.

    It takes the attention's output projection over, to put the weights before it.

    Args:
        attention: Any multi-head attention from maps ``[B, H, W, dim]`` to the same shape, whose last step is a linear
            layer ``proj`` of the heads one after another (a dropout ``proj_drop`` may follow).
        num_heads: Its heads.
        shared_heads: As in `HeadRouter`, like ``routed_heads``.
        routed_heads: Heads that a position chooses of the others.
        balance_weight: Factor on `HeadRouter.route`'s loss, which is reported as ``"balance"`` in training (see
            `blocks.losses`); the published trainings have 0.01, divided by the number of routed attentions.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H, W, dim]``.

    Raises:
        ValueError: If the attention has no such layer, or the numbers of heads don't fit.

    Example:
        >>> from foveate.blocks import NeighborhoodAttention2d
        >>> attention = MixtureOfHeads2d(NeighborhoodAttention2d(64, 4), 4, shared_heads=1, routed_heads=2)
        >>> attention(torch.randn(1, 20, 30, 64)).shape
        torch.Size([1, 20, 30, 64])
    """

    def __init__(
        self,
        attention: nn.Module,
        num_heads: int,
        shared_heads: int = 1,
        routed_heads: int = 1,
        balance_weight: float = 0.01,
        device=None,
        dtype=None,
    ):
        super().__init__()
        proj = getattr(attention, "proj", None)
        if type(proj) is not nn.Linear or proj.in_features % num_heads:
            raise ValueError(
                f"MixtureOfHeads2d needs an attention whose last layer is a linear one, proj, of {num_heads} heads; "
                f"{type(attention).__name__} has {proj}"
            )
        self.attention = attention
        self.proj = proj
        self.proj_drop = getattr(attention, "proj_drop", nn.Identity())
        attention.proj = nn.Identity()
        if hasattr(attention, "proj_drop"):
            attention.proj_drop = nn.Identity()
        self.num_heads = num_heads
        self.router = HeadRouter(proj.in_features, num_heads, shared_heads, routed_heads, device=device, dtype=dtype)
        self.balance_weight = balance_weight

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``x`` ``[B, H, W, dim]``."""
        weights = self.router(x) if torch.jit.is_scripting() else self._route(x)
        heads = self.attention(x).unflatten(-1, (self.num_heads, -1))
        return self.proj_drop(self.proj((heads * weights.unsqueeze(-1)).flatten(-2)))

    @torch.jit.ignore
    def _route(self, x: Tensor) -> Tensor:
        weights, loss = self.router.route(x)
        if loss is not None and self.training:
            report_loss("balance", self.balance_weight * loss)
        return weights

    @torch.jit.ignore
    def recorded(self, x: Tensor) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`: the inner attention's weights times the heads'."""
        inner = self.attention.recorded(x)
        gates = exact(self.router.route(x)[0]).flatten(1, -2).transpose(1, 2)  # [B, heads, N]
        local = inner.local

        def project(heads: Tensor) -> Tensor:
            return self.proj(heads_to_map(heads, inner.map_size))

        return replace(
            inner,
            operator=_weigh_rows(inner.operator, gates),
            softmax=None if inner.softmax is None else _weigh_rows(inner.softmax, gates),
            local=None if local is None else lambda: local() * gates.unsqueeze(3),
            project=project,
            normalised=False,
            note=f"a position's weights add up to its weight of the head; {inner.note}".removesuffix("; "),
            details={**(inner.details or {}), "gates": gates},
        )


def _weigh_rows(operator: Operator, gates: Tensor) -> Given:
    def rows(queries: Tensor) -> Rows:
        keys, weights = operator.rows(queries)
        return Rows(keys, weights * gates[:, :, queries, None])

    return Given(rows, operator.heads, operator.queries, operator.keys, operator.row_size, operator.device)
