"""OneFormer (arXiv 2211.06220): Mask2Former whose queries begin with the name of the task. For inference.

Written anew after github.com/SHI-Labs/OneFormer (MIT), whose parameter names it keeps. The contrastive loss and its
text encoder, which only the published training used, are left out.
"""

import torch
from torch import Tensor, nn

from ... import TaskError, nearest
from ..deformable_encoder import sine_position
from ..query_layers import MLP, with_position
from .masked_decoder import MaskedDecoder

# "The task is {task}" as CLIP's byte pairs number it; zeros follow up to 77. No tokenizer is needed for three phrases.
PROMPT_TOKENS = {
    "semantic": (49406, 518, 10549, 533, 29119, 1550, 49407),
    "instance": (49406, 518, 10549, 533, 34572, 49407),
    "panoptic": (49406, 518, 10549, 533, 1072, 24755, 49407),
}
TOKENS = 77


def prompt_tokens(prompt: str, like: Tensor) -> Tensor:
    """Return the numbers ``[77]`` of a prompt's phrase, as a vector of floats."""
    if prompt not in PROMPT_TOKENS:
        raise TaskError(f"there is no prompt {prompt!r}{nearest(prompt, PROMPT_TOKENS)}")
    numbers = PROMPT_TOKENS[prompt]
    return torch.tensor([*numbers, *[0] * (TOKENS - len(numbers))], dtype=torch.float32, device=like.device)


class _DecoderLayer(nn.Module):
    """DETR's decoder layer (arXiv 2005.12872): self-attention, cross-attention, MLP, each with a norm of the sum."""

    def __init__(self, dim: int, num_heads: int, hidden: int, dropout: float):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, query_position: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = with_position(x, query_position)
        x = self.norm1(x + self.dropout(self.self_attn(query, query, x, need_weights=False)[0]))
        query = with_position(x, query_position)
        x = self.norm2(x + self.dropout(self.multihead_attn(query, key, value, need_weights=False)[0]))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))


class _ClassTransformer(nn.Module):
    """The layers that turn the prompt's token into queries, under their published names."""

    def __init__(self, dim: int, num_heads: int, hidden: int, num_layers: int = 2, dropout: float = 0.1):
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(_DecoderLayer(dim, num_heads, hidden, dropout) for _ in range(num_layers))
        self.decoder.norm = nn.LayerNorm(dim)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, queries: Tensor, query_position: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for layer in self.decoder.layers:
            queries = layer(queries, query_position, key, value)
        return self.decoder.norm(queries)


class OneFormerDecoder(MaskedDecoder):
    """Mask2Former's decoder, with first queries made of the prompt's token and the features of the masks.

    Arguments as for `MaskedDecoder`; `forward` needs the prompt.
    """

    def _add_first_queries(self, num_queries: int, dim: int, num_heads: int, hidden: int) -> None:
        self.class_transformer = _ClassTransformer(dim, num_heads, hidden)
        self.class_input_proj = nn.Conv2d(dim, dim, 1)

    def first_queries(self, mask_features: Tensor, prompt: Tensor) -> Tensor:
        """Return the queries ``[B, Q, dim]`` before the first layer; the last of them is the prompt's token."""
        prompt = self.decoder_norm(prompt)[:, None]
        position = self.query_embed.weight[:-1]
        # As published, the image is seen through the keys alone; the values are the sine embedding of its positions.
        value = sine_position(*mask_features.shape[-2:], mask_features.shape[1], mask_features)
        value = value.flatten(2).transpose(1, 2).expand(mask_features.shape[0], -1, -1)
        key = value + self.class_input_proj(mask_features).flatten(2).transpose(1, 2)
        queries = self.class_transformer(prompt.expand(-1, position.shape[0], -1), position, key, value)
        return torch.cat([queries, prompt], dim=1)


def prompt_embedding(dim: int) -> MLP:
    """Return the network that turns a prompt's tokens into an embedding of ``dim`` channels."""
    return MLP(TOKENS, dim, dim, 2)
