"""What layers of queries are made of, in Mask2Former and DINO; a norm of the sum follows each step."""

import itertools

from torch import Tensor, nn


def with_position(x: Tensor, position: Tensor | None) -> Tensor:
    """Return tokens with their positions added, if they have any."""
    return x if position is None else x + position


def init_matrices(module: nn.Module) -> None:
    """Initialise all matrices as Glorot and Bengio do, uniformly."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)


class SelfAttention(nn.Module):
    """Queries look at each other."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        init_matrices(self)

    def forward(self, queries: Tensor, query_position: Tensor, blocked: Tensor | None = None) -> Tensor:
        """Map queries ``[B, Q, dim]`` to such; ``blocked`` ``[Q, Q]`` says which others each must not see."""
        query = with_position(queries, query_position)
        return self.norm(queries + self.self_attn(query, query, queries, attn_mask=blocked, need_weights=False)[0])


class FeedForward(nn.Module):
    """Two linear layers with ReLU between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim)
        init_matrices(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., dim]`` to such."""
        return self.norm(x + self.linear2(self.linear1(x).relu()))


class MLP(nn.Module):
    """Linear layers ``layers`` with ReLU between them."""

    def __init__(self, in_dim: int, hidden: int, out_dim: int, num_layers: int):
        super().__init__()
        dims = [in_dim, *[hidden] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_dim]`` to ``[..., out_dim]``."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)
