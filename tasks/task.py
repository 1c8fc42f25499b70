"""What the engine asks of a task and of its data; a guide to this package.

`classify`, `detect` and `segment` each have a ``Task`` of this form. It is made of a complete config, or refuses it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from PIL import Image
from torch import Tensor, nn


class Samples(Protocol):
    """Images with their truth, to train on or to be measured by."""

    classes: Sequence[str]
    white: int  # value of 16-bit pixels that is white
    weights: Tensor | None  # how likely each is to be drawn to train on; if None, or there is no such, each is once
    collate: Callable[[list], Any] | None  # makes a batch of samples; torch's own way if None

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Any, Any]: ...  # input and target
    def image(self, index: int) -> Image.Image: ...  # as it is in its file
    def inventory(self) -> list[tuple[str | Path, Any]]: ...  # every file with its labels; none of bundled data


class Task(Protocol):
    """A config's data, model and losses."""

    DEFAULTS: ClassVar[dict]  # every key a config may have beside the engine's, with its default
    OPTIONAL: ClassVar[dict[str, type]]  # keys that may be None, with the type that they have otherwise
    FREE: ClassVar[tuple[str, ...]]  # dicts with keys of their own

    train_set: Samples
    val_set: Samples
    classes: list[str]
    metric: str  # by which the best checkpoint is chosen; more is better
    shown: Sequence[str]  # metrics that a line of progress names

    def check_data(self, training: bool = True) -> list[str]: ...  # remarks; raises where nothing can be learned
    def build_model(self) -> nn.Module: ...
    def loss(self, model: nn.Module, images: Any, targets: Any) -> dict[str, Tensor]: ...
    def predict(self, model: nn.Module, images: Any) -> list: ...  # of each image, on the CPU where it is large
    def measure(self, predictions: list, targets: list) -> dict[str, float]: ...
    def measure_classes(self, predictions: list, targets: list) -> list[dict[str, Any]]: ...  # a row for each class
    def draw_inputs(self, items: list, path: Path, title: str, train: bool) -> None: ...
    def draw(self, predictions: list, targets: list, folder: Path, epoch: int, indices: list[int]) -> list: ...
    def card(self) -> dict[str, Any]: ...  # what prediction needs besides the weights, in plain types
