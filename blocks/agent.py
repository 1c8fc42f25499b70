"""Agent attention (Han et al., ECCV 2024, arXiv 2312.08874): queries reach the keys through a few pooled queries."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, to_2tuple, trunc_normal_
from torch import Tensor, nn

from .initialize import init_linear
from .pointwise import apply_linear
from .record import Recorded, Through, Windows, exact, heads_to_map, map_to_heads
from .token_attention import attend_tokens
from .token_merging import match_tokens
from .window import cut_windows, join_windows, number_windows

# The block biases have this height and width at every resolution.
_BLOCK = 7


@register_notrace_function
def resize_agents(bias: Tensor, agents_height: int, agents_width: int) -> Tensor:
    """Resample a bias ``[heads, p * p, h, w]`` of a square of agents to another grid of them, bilinear."""
    heads, agents, height, width = bias.shape
    side = int(agents**0.5)
    bias = bias.reshape(heads, side, side, height * width).permute(0, 3, 1, 2)
    bias = F.interpolate(bias, size=[agents_height, agents_width], mode="bilinear", align_corners=False)
    return bias.permute(0, 2, 3, 1).reshape(heads, agents_height * agents_width, height, width)


@register_notrace_function
def agent_bias(block: Tensor, row: Tensor, column: Tensor, height: int, width: int) -> Tensor:
    """Return the sum of the three biases on a map: each is resampled to its size, bilinear.

    Args:
        block: ``[heads, agents, 7, 7]``.
        row: ``[heads, agents, h, 1]``.
        column: ``[heads, agents, 1, w]``.
        height: Height H of the map.
        width: Width W of the map.

    Returns:
        ``[heads, agents, H, W]``.
    """
    block = F.interpolate(block, size=[height, width], mode="bilinear", align_corners=False)
    # Bilinear resampling is separable: rows and columns may be resampled before they are added.
    row = F.interpolate(row, size=[height, 1], mode="bilinear", align_corners=False)
    column = F.interpolate(column, size=[1, width], mode="bilinear", align_corners=False)
    return block + row + column


@register_notrace_function
def pool_agents(q: Tensor, agents_height: int, agents_width: int) -> Tensor:
    """Average queries ``[B, H, W, C]`` to agents ``[B, agents_height * agents_width, C]``."""
    agents = F.adaptive_avg_pool2d(q.permute(0, 3, 1, 2), [agents_height, agents_width])
    return agents.flatten(2).transpose(1, 2)


def attend_through_agents(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, gather_bias: Tensor, spread_bias: Tensor, num_heads: int
) -> Tensor:
    """Let agents gather from keys, and queries read from agents: two softmax attentions, linear in the tokens (Eq. 6).

    Args:
        q: Queries ``[B, N, C]``.
        k: Keys ``[B, M, C]``.
        v: Values ``[B, M, C]``.
        agents: Agents ``[B, n, C]``.
        gather_bias: Added to the agents' scores over keys, ``[heads, n, M]``.
        spread_bias: Added to the queries' scores over agents, ``[heads, N, n]``.
        num_heads: Heads.

    Returns:
        ``[B, N, C]``.
    """
    q, k, v, agents = [tokens.unflatten(2, (num_heads, -1)).transpose(1, 2) for tokens in (q, k, v, agents)]
    gathered = attend_tokens(agents, k, v, gather_bias.to(q.dtype)[None])
    x = attend_tokens(q, agents, gathered, spread_bias.to(q.dtype)[None])
    return x.transpose(1, 2).flatten(2)


def attend_untrained(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, num_heads: int, spread_power: float = 0.3, shortcut: float = 0.075
) -> Tensor:
    """Read from agents where no network was trained to: ``softmax(q a^T d^-0.15) softmax(a k^T d^-0.5) v + 0.075 v``.

    It replaces softmax attention without new weights (the paper's section on image generation): queries' scores are
    sharpened by a scale nearer to 1, and the values of the tokens themselves stand for the missing convolution.

    Args:
        q: Queries ``[B, N, C]``.
        k: Keys ``[B, N, C]``.
        v: Values ``[B, N, C]``.
        agents: Queries of the agents ``[B, n, C]``.
        num_heads: Heads, of d channels each.
        spread_power: The queries' scores over agents are scaled by ``d^-0.5`` to this power.
        shortcut: Of the values.

    Returns:
        ``[B, N, C]``.
    """
    q, k, values, agents = [tokens.unflatten(2, (num_heads, -1)).transpose(1, 2) for tokens in (q, k, v, agents)]
    gathered = attend_tokens(agents, k, values)
    x = attend_tokens(q, agents, gathered, scale=q.shape[3] ** (-0.5 * spread_power))
    return x.transpose(1, 2).flatten(2) + shortcut * v


def agent_attention_untrained(
    x: Tensor,
    map_size: Sequence[int],
    num_heads: int,
    to_q: Callable[[Tensor], Tensor],
    to_k: Callable[[Tensor], Tensor],
    to_v: Callable[[Tensor], Tensor],
    ratio: float = 0.5,
    agent_ratio: float = 0.8,
    cell: tuple[int, int] = (2, 2),
    spread_power: float = 0.3,
    shortcut: float = 0.075,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Replace a network's trained self-attention by agent attention, without training it (arXiv 2312.08874, AgentSD).

    Tokens are merged with those that they are like (`match_tokens`), and more of them by the same order into agents;
    the merged tokens attend through the agents (`attend_untrained`), or to each other where the agents are half as many
    as they, or more. Each token then has what became of the one that it was merged into.
    The defaults are the authors'. What multiplies the output afterwards is the network's own.

    Args:
        x: What the attention would get, the tokens of a map ``[B, H * W, C]``, row by row.
        map_size: H and W.
        num_heads: Heads.
        to_q: Projection to queries, of tokens ``[B, n, C]``.
        to_k: Projection to keys.
        to_v: Projection to values.
        ratio: Share of the tokens that are merged.
        agent_ratio: Share of the tokens that are merged into the agents; the agents are the rest.
        cell: See `match_tokens`: of each such cell at least one token stays.
        spread_power: See `attend_untrained`.
        shortcut: See `attend_untrained`.
        generator: See `match_tokens`.

    Returns:
        ``[B, H * W, C]``.

    Raises:
        ValueError: If the map has another number of tokens or is smaller than a cell, or a ratio isn't of 0 to 1.

    Example:
        >>> x = torch.randn(1, 16 * 16, 64)
        >>> projections = [torch.nn.Linear(64, 64) for _ in range(3)]
        >>> agent_attention_untrained(x, (16, 16), 4, *projections, ratio=0.4, agent_ratio=0.95, cell=(4, 4)).shape
        torch.Size([1, 256, 64])
    """
    if not (0 <= ratio <= 1 and 0 <= agent_ratio <= 1):
        raise ValueError(f"ratio and agent_ratio are shares of the tokens, of 0 to 1; got {ratio} and {agent_ratio}")
    matching = match_tokens(x, map_size, cell, generator)
    tokens, most = x.shape[1], matching.ranked.shape[1]
    count, agent_count = (min(most, int(tokens * share)) for share in (ratio, agent_ratio))
    merged = matching.merge(x, count)
    q, k, v = to_q(merged), to_k(merged), to_v(merged)
    if 2 * (tokens - agent_count) < tokens - count:
        out = attend_untrained(q, k, v, to_q(matching.merge(x, agent_count)), num_heads, spread_power, shortcut)
    else:
        heads = [part.unflatten(2, (num_heads, -1)).transpose(1, 2) for part in (q, k, v)]
        out = attend_tokens(*heads).transpose(1, 2).flatten(2)
    return matching.unmerge(out, count)


def _through_agents(
    q: Tensor,
    k: Tensor,
    agents: Tensor,
    gather_bias: Tensor,
    spread_bias: Tensor,
    num_heads: int,
    windows: Windows | None = None,
) -> Through:
    """Return the weights of `attend_through_agents`, whose arguments these are, as an operator."""
    q, k, agents = [exact(map_to_heads(tokens, num_heads)) for tokens in (q, k, agents)]
    scale = q.shape[3] ** -0.5
    read = (q @ agents.mT * scale + exact(spread_bias)).softmax(-1)
    gathered = (agents @ k.mT * scale + exact(gather_bias)).softmax(-1)
    return Through(read, gathered, windows)


class AgentAttention2d(nn.Module):
    """Multi-head agent attention over a map, or within windows of it.

    A few agents, queries averaged over a grid of cells, gather from all keys; every query then reads from the agents.
    Both attentions have learned biases, and a depthwise convolution of the values is added. The cost is linear in the
    positions of the map.

    The biases belong to maps of ``map_size`` and are resampled to every other size, as in the published dense models.
    Their names are the published ones: ``a`` stands for agents, ``n`` for positions, ``h`` and ``w`` for rows and
    columns, so that ``ah_bias`` is the bias of agents towards rows and ``ha_bias`` that of rows towards agents.

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide ``dim``.
        agents: The biases are learned for ``agents x agents`` agents.
        map_size: Height and width of the maps, or windows, that the biases are learned for.
        agent_shape: Rows and columns of agents, the biases being resampled to them; ``agents x agents`` by default.
        window_size: Height and width of windows that attend each for itself, with agents of its own; None for the whole
            map. A map that does not divide into windows is padded with zeros at the bottom and right before the
            projection to queries, keys and values.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_drop: Dropout rate of the output.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H, W, dim]``, any H and W.

    Example:
        >>> attention = AgentAttention2d(64, num_heads=2, agents=7, map_size=(14, 14))
        >>> attention(torch.randn(1, 20, 30, 64)).shape
        torch.Size([1, 20, 30, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        agents: int,
        map_size: int | tuple[int, int],
        agent_shape: int | tuple[int, int] | None = None,
        window_size: int | tuple[int, int] | None = None,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"agent attention needs num_heads to divide dim; got dim {dim}, heads {num_heads}")
        self.num_heads = num_heads
        self.agents = agents
        self.agents_height, self.agents_width = (agents, agents) if agent_shape is None else to_2tuple(agent_shape)
        self.window_height, self.window_width = (0, 0) if window_size is None else to_2tuple(window_size)
        height, width = to_2tuple(map_size)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.an_bias = nn.Parameter(torch.empty(num_heads, agents**2, _BLOCK, _BLOCK, **dd))
        self.na_bias = nn.Parameter(torch.empty(num_heads, agents**2, _BLOCK, _BLOCK, **dd))
        self.ah_bias = nn.Parameter(torch.empty(1, num_heads, agents**2, height, 1, **dd))
        self.aw_bias = nn.Parameter(torch.empty(1, num_heads, agents**2, 1, width, **dd))
        self.ha_bias = nn.Parameter(torch.empty(1, num_heads, height, 1, agents**2, **dd))
        self.wa_bias = nn.Parameter(torch.empty(1, num_heads, 1, width, agents**2, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the projections and the biases as published: truncated normal, std 0.02."""
        init_linear(self.qkv, self.proj)
        for bias in self.parameters(recurse=False):
            trunc_normal_(bias, std=0.02)

    def _apply(self, fn, recurse=True):
        # `Module.to` would give the biases of five axes a layout for four, or refuse.
        def apply(x: Tensor) -> Tensor:
            return fn(x[0])[None] if x.ndim == 5 else fn(x)

        return super()._apply(apply, recurse)

    def extra_repr(self) -> str:
        """Return the settings that `print(model)` shows."""
        text = f"num_heads={self.num_heads}, agents={self.agents_height}x{self.agents_width}"
        return text + (f", window_size={self.window_height}x{self.window_width}" if self.window_height else "")

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``x`` ``[B, H, W, dim]``, or within its windows."""
        if self.window_height == 0:
            return self._attend(x)
        height, width = x.shape[1], x.shape[2]
        windows = cut_windows(x, self.window_height, self.window_width, 0, 0)
        windows = self._attend(windows.unflatten(1, (self.window_height, self.window_width)))
        return join_windows(windows.flatten(1, 2), height, width, self.window_height, self.window_width, 0, 0)

    def _attend(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        qkv = self.qkv(x) if torch.jit.is_scripting() else apply_linear(self.qkv, x)
        q, k, v = qkv.chunk(3, dim=-1)
        agents = pool_agents(q, self.agents_height, self.agents_width)
        gather_bias, spread_bias = self._biases(height, width)
        out = attend_through_agents(
            q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), agents, gather_bias, spread_bias, self.num_heads
        )
        out = out.unflatten(1, (height, width)) + self.dwc(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj_drop(self.proj(out) if torch.jit.is_scripting() else apply_linear(self.proj, out))

    @torch.jit.ignore
    def recorded(self, x: Tensor) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`."""
        size, windows = tuple(x.shape[1:3]), None
        if self.window_height:
            window = self.window_height, self.window_width
            windows = Windows(number_windows(size, window).to(x.device))
            x = cut_windows(x, *window, 0, 0).unflatten(1, window)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        agents = pool_agents(q, self.agents_height, self.agents_width)
        operator = _through_agents(q, k, agents, *self._biases(*x.shape[1:3]), self.num_heads, windows)
        values = map_to_heads(v, self.num_heads)
        values = values if windows is None else windows.join(values)
        operator.queries = size[0] * size[1]

        def local() -> Tensor:
            out = map_to_heads(self.dwc(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), self.num_heads)
            return (out if windows is None else windows.join(out))[:, :, : operator.queries]

        return Recorded(
            "agent",
            size,
            operator,
            exact(values),
            lambda heads: self.proj(heads_to_map(heads, size)),
            local,
            details={"agents": (self.agents_height, self.agents_width), "through": operator},
        )

    def _biases(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return the biases of agents towards positions ``[heads, n, N]`` and of positions towards agents."""
        gather = self._bias(self.an_bias, self.ah_bias[0], self.aw_bias[0], height, width)
        rows, columns = self.ha_bias[0].permute(0, 3, 1, 2), self.wa_bias[0].permute(0, 3, 1, 2)
        spread = self._bias(self.na_bias, rows, columns, height, width)
        return gather, spread.transpose(1, 2)

    def _bias(self, block: Tensor, row: Tensor, column: Tensor, height: int, width: int) -> Tensor:
        """Return the sum of three biases, resampled to the agents and the map, ``[heads, n, N]``."""
        if self.agents_height != self.agents or self.agents_width != self.agents:
            block = resize_agents(block, self.agents_height, self.agents_width)
            row = resize_agents(row, self.agents_height, self.agents_width)
            column = resize_agents(column, self.agents_height, self.agents_width)
        return agent_bias(block, row, column, height, width).flatten(2)


class AgentTokenAttention(AgentAttention2d):
    """Agent attention over a map and a class token before it (Agent-DeiT).

    The class token is a key for the agents and reads from them, with biases ``ac_bias`` and ``ca_bias``; the agents are
    averages of the map alone, and the convolution sees the map alone. Where nobody reads the class token afterwards,
    ``ca_bias`` may be set to None.

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide ``dim``.
        agents: Rows and columns of agents.
        map_size: Height and width of the maps that the biases are learned for.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_drop: Dropout rate of the output.

    Shape:
        Tokens ``[B, 1 + H * W, dim]``, class token first, with H and W as arguments; to the same shape.

    Example:
        >>> attention = AgentTokenAttention(64, num_heads=2, agents=7, map_size=(14, 14))
        >>> attention(torch.randn(1, 1 + 20 * 30, 64), 20, 30).shape
        torch.Size([1, 601, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        agents: int,
        map_size: int | tuple[int, int],
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, agents, map_size, qkv_bias=qkv_bias, proj_drop=proj_drop, **dd)
        self.ac_bias = nn.Parameter(torch.empty(1, num_heads, agents**2, 1, **dd))
        self.ca_bias = nn.Parameter(torch.empty(1, num_heads, 1, agents**2, **dd))
        self.reset_parameters()

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Attend over tokens ``x`` ``[B, 1 + height * width, dim]``."""
        qkv = self.qkv(x) if torch.jit.is_scripting() else apply_linear(self.qkv, x)
        q, k, v = qkv.chunk(3, dim=-1)
        agents = pool_agents(q[:, 1:].unflatten(1, (height, width)), self.agents_height, self.agents_width)
        gather_bias, spread_bias = self._token_biases(height, width)
        out = attend_through_agents(q, k, v, agents, gather_bias, spread_bias, self.num_heads)
        out = out + self._token_local(v, height, width)
        return self.proj_drop(self.proj(out) if torch.jit.is_scripting() else apply_linear(self.proj, out))

    @torch.jit.ignore
    def recorded(self, x: Tensor, height: int, width: int) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        agents = pool_agents(q[:, 1:].unflatten(1, (height, width)), self.agents_height, self.agents_width)
        operator = _through_agents(q, k, agents, *self._token_biases(height, width), self.num_heads)

        def local() -> Tensor:
            return map_to_heads(self._token_local(v, height, width), self.num_heads)

        return Recorded(
            "agent",
            (height, width),
            operator,
            exact(map_to_heads(v, self.num_heads)),
            lambda heads: self.proj(heads.transpose(1, 2).flatten(2)),
            local,
            prefix=1,
            details={"agents": (self.agents_height, self.agents_width), "through": operator},
        )

    def _token_biases(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return what `_biases` does, for the class token before the map too."""
        gather_bias, spread_bias = self._biases(height, width)
        gather_bias = torch.cat([self.ac_bias[0], gather_bias], dim=2)
        ca_bias = self.ca_bias
        if ca_bias is not None:
            spread_bias = torch.cat([ca_bias[0], spread_bias], dim=1)
        else:
            spread_bias = F.pad(spread_bias, (0, 0, 1, 0))
        return gather_bias, spread_bias

    def _token_local(self, v: Tensor, height: int, width: int) -> Tensor:
        """Return the convolution of the map's values, with nothing for the class token."""
        local = self.dwc(v[:, 1:].unflatten(1, (height, width)).permute(0, 3, 1, 2))
        return F.pad(local.flatten(2).transpose(1, 2), (0, 0, 1, 0))
