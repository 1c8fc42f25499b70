"""`foveate.load`: from a checkpoint or a published model to results, in three lines of Python."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..zoo.checkpoint import Checkpoint
from . import TaskError
from .data.sources import Source, expand_sources
from .data.windows import Windows
from .devices import choose_device
from .predictors import open_predictor
from .results import Result
from .tiles import TiledMap, check_tiling, predict_tiled


class Model:
    """A model of any task that answers for images.

    Attributes:
        predictor: What maps images to results.
        classes: Names of its classes.
        task: ``"classify"``, ``"detect"`` or ``"segment"``; None if it isn't known.
    """

    def __init__(self, predictor: Any):
        self.predictor = predictor
        self.classes: list[str] = list(predictor.classes)
        self.task: str | None = (predictor.card or {}).get("task")

    def predict(
        self,
        source: Source | Sequence[Source],
        threshold: float | None = None,
        top: int | None = None,
        batch_size: int = 16,
        every: int = 1,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> list[Result]:
        """Return what is found in every image; `stream` is for more of them than the memory holds.

        Args:
            source: A path, a folder, a glob, an address, bytes of a file, an array ``[H, W]``, ``[H, W, 3]`` (RGB) or
                ``[H, W, 4]`` of uint8, an image of Pillow's, a video or an animated picture, a camera (``"camera:0"``),
                or a list of these.
            threshold: Least score of an object, 0 to 1; the predictor's if None.
            top: Classes that a classifier names; the predictor's if None.
            batch_size: Images read at once.
            every: Of a video, the first frame and every so-manyth after it are images.
            tile: Side of the tiles, in pixels, in which a detector or segmenter looks at images; None: at the whole.
            overlap: Pixels that neighboring tiles share at least; an eighth of their side if None.

        Raises:
            TaskError: If a source doesn't exist, is none, or holds an image that can't be read.
        """
        return list(self.stream(source, threshold, top, batch_size, every, tile, overlap))

    def stream(
        self,
        source: Source | Sequence[Source],
        threshold: float | None = None,
        top: int | None = None,
        batch_size: int = 16,
        every: int = 1,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> Iterator[Result]:
        """Yield what `predict` returns, with ``batch_size`` images in memory."""
        if threshold is not None and not 0 <= threshold <= 1:
            raise TaskError(f"threshold is {threshold}, but must be from 0 to 1")
        for name, value in (("top", top), ("batch_size", batch_size), ("every", every)):
            if value is not None and value < 1:
                raise TaskError(f"{name} is {value}, but must be at least 1")
        for name, value in (("threshold", threshold), ("top", top)):
            if value is not None and hasattr(self.predictor, name):
                setattr(self.predictor, name, value)
        if tile is not None:
            overlap = check_tiling(tile, overlap, self.predictor)
        batch: list[tuple[str, Image.Image]] = []
        for name, read in expand_sources(source, every):
            batch.append((name, read(self.predictor.channels, self.predictor.white)))
            if len(batch) == batch_size:
                yield from self._answers(batch, tile, overlap)
                batch = []
        yield from self._answers(batch, tile, overlap)

    def _answers(
        self, batch: Sequence[tuple[str, Image.Image]], tile: int | None, overlap: int | None
    ) -> Iterator[Result]:
        images = [image for _, image in batch]
        if tile is None:
            answers = self.predictor(images) if batch else []
        else:
            tiled = (
                predict_tiled(self.predictor, Windows(image, self.predictor.channels), tile, overlap).answer
                for image in images
            )
            answers = (answer.to_tensor() if isinstance(answer, TiledMap) else answer for answer in tiled)
        for (name, image), answer in zip(batch, answers, strict=True):
            yield Result(self.predictor, image, answer, name)


def load(source: str | Path | Checkpoint, device: str = "auto") -> Model:
    """Return the model of a checkpoint, or a published one, with its weights.

    Args:
        source: A file that `foveate train`, ``export`` or ``weights convert`` wrote, a timm model, ours or theirs, such
            as ``"nat_tiny.shi_in1k"``, or a detector or segmenter, such as ``"nat_tiny.shi_mask_rcnn_coco_3x"``.
        device: ``"auto"`` (CUDA if there is one), ``"cpu"``, ``"cuda:1"``, ...

    Raises:
        TaskError: If there is no such model, or its weights can't be had.
        CheckpointError: If the file can't be read or isn't one of these.
    """
    return Model(open_predictor(source, choose_device(device)))
