"""Mask2Former's transformer decoder (arXiv 2112.01527): queries look at the maps where their own masks are.

Written anew after github.com/facebookresearch/Mask2Former (MIT), whose parameter names it keeps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..deformable_encoder import sine_position
from ..query_layers import MLP, FeedForward, SelfAttention, init_matrices, with_position
from .inference import resize_to


class _CrossAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        init_matrices(self)

    def forward(
        self, queries: Tensor, tokens: Tensor, query_position: Tensor, position: Tensor, blocked: Tensor
    ) -> Tensor:
        heads = self.multihead_attn.num_heads
        mask = blocked[:, None].expand(-1, heads, -1, -1).flatten(0, 1)
        query, key = with_position(queries, query_position), with_position(tokens, position)
        return self.norm(queries + self.multihead_attn(query, key, tokens, attn_mask=mask, need_weights=False)[0])


class MaskedDecoder(nn.Module):
    """Queries through layers of masked cross-attention, self-attention and MLP; a prediction before and after each.

    Args:
        num_classes: Classes, without the one for no object, which is the last of the logits.
        num_queries: Queries.
        dim: Channels.
        hidden: Channels inside the MLPs.
        num_layers: Layers; they take the maps in turn, the coarsest first.
        num_heads: Heads of each attention.
        num_levels: Maps.
    """

    def __init__(
        self,
        num_classes: int,
        num_queries: int = 100,
        dim: int = 256,
        hidden: int = 2048,
        num_layers: int = 9,
        num_heads: int = 8,
        num_levels: int = 3,
    ):
        super().__init__()
        self.transformer_self_attention_layers = nn.ModuleList(SelfAttention(dim, num_heads) for _ in range(num_layers))
        self.transformer_cross_attention_layers = nn.ModuleList(
            _CrossAttention(dim, num_heads) for _ in range(num_layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(FeedForward(dim, hidden) for _ in range(num_layers))
        self.decoder_norm = nn.LayerNorm(dim)
        self.query_embed = nn.Embedding(num_queries, dim)
        self.level_embed = nn.Embedding(num_levels, dim)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.mask_embed = MLP(dim, dim, dim, 3)
        self._add_first_queries(num_queries, dim, num_heads, hidden)

    def _add_first_queries(self, num_queries: int, dim: int, num_heads: int, hidden: int) -> None:
        """Create what the queries start from: here, learned features."""
        self.query_feat = nn.Embedding(num_queries, dim)

    def first_queries(self, mask_features: Tensor, prompt: Tensor | None) -> Tensor:
        """Return the queries ``[B, Q, dim]`` before the first layer."""
        return self.query_feat.weight.expand(mask_features.shape[0], -1, -1)

    def forward(
        self, mask_features: Tensor, maps: Sequence[Tensor], prompt: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Predict classes and masks, before the first layer and after each.

        Args:
            mask_features: ``[B, dim, H, W]``.
            maps: ``[B, dim, H_l, W_l]``, coarsest first.
            prompt: The prompt's embedding ``[B, dim]``, for OneFormer.

        Returns:
            Class logits ``[B, Q, num_classes + 1]`` and mask logits ``[B, Q, H, W]``; the last pair is the result.
        """
        tokens = [x.flatten(2).transpose(1, 2) + embed for x, embed in zip(maps, self.level_embed.weight, strict=True)]
        positions = [sine_position(*x.shape[-2:], x.shape[1], x).flatten(2).transpose(1, 2) for x in maps]
        queries = self.first_queries(mask_features, prompt)
        query_position = self.query_embed.weight
        predictions = [self._predict(queries, mask_features)]
        layers = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        )
        for index, (cross_attention, self_attention, feed_forward) in enumerate(layers):
            level = index % len(maps)
            blocked = self._blocked(predictions[-1][1], maps[level])
            queries = cross_attention(queries, tokens[level], query_position, positions[level], blocked)
            queries = feed_forward(self_attention(queries, query_position))
            predictions.append(self._predict(queries, mask_features))
        return predictions

    def _predict(self, queries: Tensor, mask_features: Tensor) -> tuple[Tensor, Tensor]:
        queries = self.decoder_norm(queries)
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_embed(queries), mask_features)
        return self.class_embed(queries), masks

    @staticmethod
    def _blocked(masks: Tensor, like: Tensor) -> Tensor:
        """Return which pixels ``[B, Q, H * W]`` of a map each query must not see: those outside of its mask."""
        outside = resize_to(masks.detach(), like.shape[-2:]).flatten(2).sigmoid() < 0.5
        # A query with an empty mask sees everything.
        return outside & ~outside.all(dim=-1, keepdim=True)
