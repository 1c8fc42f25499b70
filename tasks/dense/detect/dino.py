"""DINO's transformer and heads (arXiv 2203.03605, ICLR 2023), with mmdet's rules.

Tokens of all maps look at each other by deformable attention; the best of what they propose become the boxes that
queries start from, and each layer of the decoder refines them. Nothing is suppressed: each object has one query.

Written anew after mmdet 3.3 (Apache-2.0).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from ....blocks.multi_scale_deformable import MultiScaleDeformableAttention, pixel_centres
from ..deformable_encoder import DeformableEncoderLayer, flatten_maps, sine_position, wave_periods, waves
from ..query_layers import MLP, FeedForward, SelfAttention, init_matrices
from .boxes import clip, scale_of
from .denoising import HEAD_EPS, REFINED_EPS, Denoising, NoisyQueries, inverse_sigmoid

Size = tuple[int, int]


class Scene(NamedTuple):
    """Where the images of a padded batch lie on its maps.

    Where every image fills the batch, ``paddings`` and ``valid`` are None.
    """

    shapes: list[Size]
    paddings: list[Tensor] | None  # of each map [B, H_l, W_l], which places are none of the image
    valid: Tensor | None  # [B, levels, 2], how many columns and rows are

    @classmethod
    def of(cls, maps: Sequence[Tensor], image_sizes: Sequence[Size], canvas: Size) -> "Scene":
        """Return the scene of maps ``[B, C, H_l, W_l]`` of images of such sizes, padded to ``canvas``."""
        shapes = [tuple(x.shape[-2:]) for x in maps]
        if all(tuple(size) == tuple(canvas) for size in image_sizes):
            return cls(shapes, None, None)
        outside = torch.ones(len(image_sizes), 1, *canvas, device=maps[0].device)
        for image, (height, width) in zip(outside, image_sizes, strict=True):
            image[:, :height, :width] = 0
        paddings = [F.interpolate(outside, size=shape).squeeze(1).bool() for shape in shapes]
        valid = [torch.stack([(~x[:, 0]).sum(1), (~x[:, :, 0]).sum(1)], dim=-1) for x in paddings]
        return cls(shapes, paddings, torch.stack(valid, dim=1))

    @property
    def padding(self) -> Tensor | None:
        """Which of the maps' tokens ``[B, S]`` are none of the image."""
        return None if self.paddings is None else torch.cat([x.flatten(1) for x in self.paddings], dim=1)

    @property
    def ratios(self) -> Tensor | None:
        """The images' share of the maps' widths and heights, ``[B, levels, 2]``, float32."""
        if self.valid is None:
            return None
        sides = torch.tensor([(width, height) for height, width in self.shapes], device=self.valid.device)
        return self.valid / sides

    def references(self, device: torch.device) -> Tensor:
        """Return where tokens look from: ``[S, 2]``, or ``[B, S, levels, 2]`` where images are padded; float32."""
        centres = pixel_centres(self.shapes, torch.empty(0, device=device))
        if self.valid is None:
            return centres
        ratios = self.ratios
        own = torch.cat([ratios[:, level].expand(h * w, -1, -1) for level, (h, w) in enumerate(self.shapes)]).transpose(
            0, 1
        )
        return (centres / own)[:, :, None] * ratios[:, None]


class Proposals(NamedTuple):
    """What the chosen tokens propose, best first."""

    index: Tensor  # [B, Q], which tokens
    logits: Tensor  # [B, Q, K]
    boxes: Tensor  # [B, Q, 4], before the sigmoid


class Predictions(NamedTuple):
    """What the head says of a batch: of every layer of the decoder, and of the proposals.

    Boxes are cx, cy, w, h in units of the images' sides. The first of the queries are those of the denoising.
    """

    logits: list[Tensor]  # [B, D + Q, K] of each layer
    boxes: list[Tensor]  # [B, D + Q, 4] of each layer
    proposals: Proposals
    noisy: NoisyQueries | None


class _DecoderLayer(nn.Module):
    """Queries look at each other, then at the maps around their boxes."""

    def __init__(self, dim: int, hidden: int, num_heads: int, num_levels: int, num_points: int):
        super().__init__()
        self.self_attention = SelfAttention(dim, num_heads)
        self.cross_attn = MultiScaleDeformableAttention(dim, num_heads, num_levels, num_points)
        self.norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, hidden)

    def forward(
        self, queries: Tensor, position: Tensor, boxes: Tensor, memory: Tensor, scene: Scene, blocked: Tensor | None
    ) -> Tensor:
        queries = self.self_attention(queries, position, blocked)
        seen = self.cross_attn(queries + position, boxes, memory, scene.shapes, scene.padding)
        return self.feed_forward(self.norm(queries + seen))


class DinoHead(nn.Module):
    """DINO from a neck's maps on: encoder, choice of proposals, decoder, classes and boxes.

    Attributes:
        encoder: Has ``layers``.
        decoder: Has ``layers``, ``ref_point_head`` and ``norm``.
        cls_branches: Classes after each layer of the decoder; the last is of the encoder's proposals.
        reg_branches: Boxes, likewise.
        denoising: Makes further queries in training.

    Args:
        channels: Channels of the maps and of all tokens; a multiple of 4 and of the heads.
        num_classes: Classes of objects; there is no background.
        num_levels: Maps.
        num_queries: Queries; images of fewer pixels on their maps have as many as these.
        encoder_layers: Layers of the encoder.
        decoder_layers: Layers of the decoder.
        hidden: Channels inside the MLPs.
        num_heads: Heads of each attention.
        num_points: Points of each head on each map.
        temperature: Of the encoder's position embedding.
        offset: Of the encoder's position embedding.
        denoising_queries: Objects of the denoising; see `Denoising`.
        max_detections: Most detections of an image.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        num_levels: int = 4,
        num_queries: int = 900,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        hidden: int = 2048,
        num_heads: int = 8,
        num_points: int = 4,
        temperature: float = 20.0,
        offset: float = 0.0,
        denoising_queries: int = 100,
        max_detections: int = 300,
    ):
        super().__init__()
        self.temperature = temperature
        self.offset = offset
        self.max_detections = max_detections
        sizes = channels, hidden, num_heads, num_levels, num_points
        self.level_embed = nn.Parameter(torch.randn(num_levels, channels))
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(DeformableEncoderLayer(*sizes) for _ in range(encoder_layers))
        self.memory_trans_fc = nn.Linear(channels, channels)
        self.memory_trans_norm = nn.LayerNorm(channels)
        self.query_embedding = nn.Embedding(num_queries, channels)
        self.denoising = Denoising(num_classes, channels, denoising_queries)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(_DecoderLayer(*sizes) for _ in range(decoder_layers))
        self.decoder.ref_point_head = MLP(2 * channels, channels, channels, 2)
        self.decoder.norm = nn.LayerNorm(channels)
        self.cls_branches = nn.ModuleList(nn.Linear(channels, num_classes) for _ in range(decoder_layers + 1))
        self.reg_branches = nn.ModuleList(MLP(channels, channels, 4, 3) for _ in range(decoder_layers + 1))
        for module in (self.memory_trans_fc, self.query_embedding, self.decoder.ref_point_head):
            init_matrices(module)
        for classes, boxes in zip(self.cls_branches, self.reg_branches, strict=True):
            nn.init.constant_(classes.bias, -math.log(99))
            for values in boxes.layers[-1].parameters():
                nn.init.zeros_(values)

    def forward(
        self,
        maps: Sequence[Tensor],
        image_sizes: Sequence[Size],
        canvas: Size,
        objects: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    ) -> Predictions:
        """Predict classes and boxes.

        Args:
            maps: The neck's ``[B, channels, H_l, W_l]``, from the finest on.
            image_sizes: ``(height, width)`` of each image in the batch, without padding.
            canvas: ``(height, width)`` of the batch.
            objects: For the denoising, labels ``[N]`` and boxes ``[N, 4]``, xyxy in units of the image's sides, of each
                image's objects; None for none.
        """
        scene = Scene.of(maps, image_sizes, canvas)
        memory = self.encode(maps, scene)
        proposals = self.propose(memory, scene)
        queries = self.query_embedding(torch.arange(proposals.index.shape[1], device=memory.device))
        queries = queries.expand(memory.shape[0], -1, -1)
        references, noisy, blocked = proposals.boxes.detach(), None, None
        if objects is not None:
            noisy = self.denoising(*objects)
            queries = torch.cat([noisy.content.to(queries.dtype), queries], dim=1)
            blocked = noisy.blocked(references.shape[1])
            references = torch.cat([noisy.boxes, references], dim=1)
        hidden, references = self.decode(queries, references.sigmoid(), memory, scene, blocked)
        logits, boxes = [], []
        for index, x in enumerate(hidden):
            logits.append(self.cls_branches[index](x))
            boxes.append((self.reg_branches[index](x) + inverse_sigmoid(references[index], HEAD_EPS)).sigmoid())
        return Predictions(logits, boxes, proposals, noisy)

    def encode(self, maps: Sequence[Tensor], scene: Scene) -> Tensor:
        """Return the tokens ``[B, S, channels]`` of the maps after the encoder."""
        tokens, shapes = flatten_maps(maps)
        positions = []
        for level, shape in enumerate(shapes):
            padding = None if scene.paddings is None else scene.paddings[level]
            wave = sine_position(*shape, tokens.shape[-1], tokens, self.temperature, self.offset, padding)
            positions.append(wave.flatten(2).transpose(1, 2) + self.level_embed[level])
        position, reference = torch.cat(positions, dim=1).to(tokens.dtype), scene.references(tokens.device)
        for layer in self.encoder.layers:
            tokens = layer(tokens, position, reference, shapes, scene.padding)
        return tokens

    def propose(self, memory: Tensor, scene: Scene) -> Proposals:
        """Return what the tokens propose whose best class is the most probable."""
        anchors, inside = self._anchors(memory, scene)
        memory = self.memory_trans_norm(self.memory_trans_fc(memory.masked_fill(~inside, 0.0)))
        logits = self.cls_branches[-1](memory)
        boxes = self.reg_branches[-1](memory) + anchors
        count = min(self.query_embedding.num_embeddings, logits.shape[1])
        index = logits.amax(-1).topk(count, dim=1).indices
        at = index[..., None]
        return Proposals(
            index,
            logits.gather(1, at.expand(-1, -1, logits.shape[-1])),
            boxes.gather(1, at.expand(-1, -1, 4)),
        )

    @staticmethod
    def _anchors(memory: Tensor, scene: Scene) -> tuple[Tensor, Tensor]:
        """Return a box around each token ``[1 or B, S, 4]``, before the sigmoid; and which have one ``[..., 1]``."""
        anchors = []
        for level, (height, width) in enumerate(scene.shapes):
            y, x = (torch.arange(side, device=memory.device, dtype=torch.float32) + 0.5 for side in (height, width))
            grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)[None]
            if scene.valid is None:
                sides = torch.tensor([width, height], device=memory.device)
            else:
                sides = scene.valid[:, level, None, None]
            centres = (grid / sides).flatten(1, 2)
            anchors.append(torch.cat([centres, torch.full_like(centres, 0.05 * 2**level)], dim=-1))
        anchors = torch.cat(anchors, dim=1)
        inside = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)
        if scene.padding is not None:
            inside = inside & ~scene.padding[..., None]
        return (anchors / (1 - anchors)).log().masked_fill(~inside, float("inf")), inside

    def decode(
        self, queries: Tensor, references: Tensor, memory: Tensor, scene: Scene, blocked: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Refine boxes ``[B, Q, 4]`` layer by layer.

        Returns:
            Queries after each layer, and the boxes before each layer and after the last. Only the boxes that go on into
            the next layer are detached, not these: the head's gradients reach the layer before (section 3.5).
        """
        ratios = scene.ratios
        hidden, boxes = [], [references]
        for layer, branch in zip(self.decoder.layers, self.reg_branches[:-1], strict=True):
            seen = references[:, :, None]
            if ratios is not None:
                seen = seen * ratios.repeat(1, 1, 2)[:, None]
            position = self.decoder.ref_point_head(_box_embedding(seen[:, :, 0], memory.shape[-1]).to(memory.dtype))
            queries = layer(queries, position, seen, memory, scene, blocked)
            boxes.append((branch(queries) + inverse_sigmoid(references, REFINED_EPS)).sigmoid())
            references = boxes[-1].detach()
            hidden.append(self.decoder.norm(queries))
        return hidden, boxes

    def best(self, logits: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best detections of each image, best first; a query may be found as several classes.

        Args:
            logits: Of the last layer, ``[B, Q, K]``.
            boxes: Of the last layer, ``[B, Q, 4]``.

        Returns:
            Boxes ``[B, D, 4]``, x1, y1, x2, y2 in units of the image's sides, labels ``[B, D]`` and scores ``[B, D]``.
        """
        classes = logits.shape[-1]
        scores = logits.float().sigmoid().flatten(1)
        scores, pairs = scores.topk(min(self.max_detections, scores.shape[1]))
        queries = torch.div(pairs, classes, rounding_mode="floor")
        boxes = box_convert(boxes.gather(1, queries[..., None].expand(-1, -1, 4)), "cxcywh", "xyxy")
        return boxes, pairs % classes, scores

    def detect(
        self, logits: Tensor, boxes: Tensor, image_sizes: Sequence[Size], original_sizes: Sequence[Size]
    ) -> list[dict[str, Tensor]]:
        """Return the detections of each image, best first, in pixels of the original images.

        Args:
            logits: Of the last layer, ``[B, Q, K]``.
            boxes: Of the last layer, ``[B, Q, 4]``.
            image_sizes: ``(height, width)`` of each image, without padding.
            original_sizes: ``(height, width)`` of each image before it was resized.

        Returns:
            For each image ``boxes`` ``[D, 4]``, ``labels`` ``[D]`` and ``scores`` ``[D]``.
        """
        per_image = zip(*self.best(logits, boxes), image_sizes, original_sizes, strict=True)
        return [
            {"boxes": in_pixels(box, size) / scale_of(box, size, original), "labels": label, "scores": score}
            for box, label, score, size, original in per_image
        ]


def in_pixels(boxes: Tensor, image_size: Size) -> Tensor:
    """Return boxes ``[..., 4]`` in units of the sides of an image of ``(height, width)`` in its pixels, clipped."""
    height, width = image_size
    return clip(boxes * torch.tensor([width, height, width, height], device=boxes.device), image_size)


def _box_embedding(boxes: Tensor, channels: int) -> Tensor:
    """Return the sine embedding ``[B, Q, 2 * channels]`` of boxes, cx, cy, w, h: y before x."""
    periods = wave_periods(channels // 2, boxes, 10000.0)
    return waves(boxes[..., [1, 0, 2, 3]] * (2 * math.pi), periods).flatten(-2)
