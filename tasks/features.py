"""Features of a frozen model: pooled ones and patches, computed once and kept on disk."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..zoo.backbone import check_name
from ..zoo.maps import cfg_of
from . import TaskError
from .checkpoints import write_whole
from .data.classification import InputRule
from .predictors import is_file, load_classifier

# Batches after which a cache notes how far it has come.
_NOTED = 8


class Encoder(nn.Module):
    """A model of timm's, ours or theirs, without its classifier.

    Args:
        model: Has ``forward_features`` and ``forward_head``.
        name: For messages.
        prefix: Whether class tokens and registers are among the tokens.

    Shape:
        Images ``[B, C, H, W]`` to pooled features ``[B, dim]``, what the classifier would take, and the tokens of the
        last map ``[B, N, channels]``, normalised as the model does before it pools.
    """

    def __init__(self, model: nn.Module, name: str, prefix: bool = False):
        super().__init__()
        for method in ("forward_features", "forward_head"):
            if not hasattr(model, method):
                raise TaskError(f"{name}: has no {method}, as timm's classifiers have; its features can't be told")
        self.model = model.eval()
        self.name = name
        self.prefix = prefix

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled features and tokens, in float32."""
        features = self.model.forward_features(x)
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise TaskError(f"{self.name}: its features are no single map, so that there are no patches to pool")
        pooled = self.model.forward_head(features, pre_logits=True)
        if pooled.ndim != 2:
            raise TaskError(f"{self.name}: doesn't pool its map to one vector; create it with its own global_pool")
        if features.ndim == 4:
            width = self.model.num_features
            first = features.shape[1] == width and features.shape[-1] != width
            tokens = features.flatten(2).transpose(1, 2) if first else features.flatten(1, 2)
        else:
            tokens = features if self.prefix else features[:, getattr(self.model, "num_prefix_tokens", 0) :]
        return pooled.float(), tokens.float()


def open_encoder(
    source: str, size: int | None = None, untrained: bool = False, prefix: bool = False
) -> tuple[Encoder, InputRule, int | None]:
    """Return a frozen model, how images become its input, and which value of 16-bit pixels is white, if that is known.

    Args:
        source: A classifier's file, of `foveate train` for instance, or a timm name, whose published weights it gets.
        size: Side of the input, in pixels; the model's own if None.
        untrained: Whether a name's weights stay random.
        prefix: As for `Encoder`.

    Raises:
        UnknownModelError: If the model is unknown.
        TaskError: If its weights can't be had, or it has no such features.
        CheckpointError: If the file can't be read, or is no classifier's.
    """
    from .classify import Predictor, create_classifier

    if is_file(source):
        predictor = load_classifier(source, "features are taken")
        white = predictor.white
    else:
        check_name(source)
        cfg = cfg_of(source)
        options = {"img_size": size} if size is not None and cfg.fixed_input_size else {}
        if not untrained and not cfg.has_weights:
            raise TaskError(
                f"{source}: no weights were published; give a checkpoint, or --untrained for random weights"
            )
        predictor = Predictor.from_model(source, create_classifier(source, pretrained=not untrained, **options))
        white = None
    rule = predictor.rule if size is None else dataclasses.replace(predictor.rule, size=size)
    return Encoder(predictor.model, source, prefix), rule, white


class Features(NamedTuple):
    """Of a set of images, float32: pooled ``[n, dim]``, tokens ``[n, N, channels]`` if kept, and labels ``[n]``."""

    pooled: np.ndarray
    tokens: np.ndarray | None
    labels: Tensor


def read_batches(samples: Dataset, indices: Sequence[int], batch_size: int, workers: int) -> Iterator[list]:
    """Return the samples of a set in batches, read by so many threads."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for start in range(0, len(indices), batch_size):
            yield list(pool.map(samples.__getitem__, indices[start : start + batch_size]))


def digest_weights(model: nn.Module) -> str:
    """Return a hash of all that a model's state dict holds."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digest_files(inventory: Sequence[tuple[str | Path, int]]) -> str:
    """Return a hash of files' names, sizes, times and classes."""
    digest = hashlib.sha256()
    for path, label in inventory:
        try:
            stat = Path(path).stat()
        except OSError as error:
            raise TaskError(f"{path}: can't be read ({error.strerror})") from error
        digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns} {label}\n".encode())
    return digest.hexdigest()


def keep_features(
    encoder: Encoder,
    samples: Dataset,
    facts: Mapping[str, Any],
    folder: Path,
    device: torch.device,
    with_tokens: bool = True,
    batch_size: int = 32,
    workers: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Return the features of all images, from the disk where they are there already.

    They are written as they are computed: what was interrupted goes on where it was.

    Args:
        encoder: The model.
        samples: Items ``(image, class)``.
        facts: All that the features depend on besides the versions of foveate and timm, in plain types: the model, its
            weights, input and files.
        folder: Holds a folder for each set of facts.
        device: Where to run.
        with_tokens: Whether the tokens are kept, which take most of the space.
        batch_size: Images at once.
        workers: Threads that read images.
        progress: Called with the number of images done and of all of them.

    Raises:
        TaskError: If an image can't be read, a feature is no number, or the disk has no space.
    """
    text = json.dumps({**facts, "foveate": version("foveate"), "timm": version("timm")}, indent=1, sort_keys=True)
    place = folder / hashlib.sha256(text.encode()).hexdigest()[:20]
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TaskError(f"{place}: can't be made ({error.strerror}); choose another folder") from error
    with FileLock(place / "lock"):
        write_whole(place / "facts.json", lambda file: Path(file).write_text(text))
        # Whatever has the tokens has the pooled features too.
        for store in (_Store(place / "with_tokens", 2), _Store(place / "pooled", 1)):
            if len(store.labels) == len(samples) or store.count == 1 + with_tokens:
                _fill(store, encoder.to(device), samples, device, batch_size, workers, progress)
                return store.load()


class _Store:
    """Features in a folder, and how far they have come: pooled ones, and with a count of 2 the tokens."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count
        self.files = (folder / "pooled.npy", folder / "tokens.npy")[:count]
        self.noted = folder / "labels.json"
        self.labels: list[int] = json.loads(self.noted.read_text()) if self.noted.exists() else []
        self.arrays = [np.lib.format.open_memmap(file, "r+") for file in self.files] if self.labels else []

    def add(self, features: Sequence[Tensor], labels: Sequence[int], total: int) -> None:
        if not self.arrays:
            self.folder.mkdir(exist_ok=True)
            needed, free = sum(part[0].numel() for part in features) * 4 * total, shutil.disk_usage(self.folder).free
            if free < needed:
                raise TaskError(
                    f"{self.folder}: {free / 1e9:.1f} GB are free, but features need {needed / 1e9:.1f} GB; free space "
                    "or choose another --cache"
                )
            self.arrays = [
                np.lib.format.open_memmap(file, "w+", np.float32, (total, *part.shape[1:]))
                for file, part in zip(self.files, features, strict=True)
            ]
        done = len(self.labels)
        for array, part in zip(self.arrays, features, strict=True):
            array[done : done + len(part)] = part.cpu().numpy()
        self.labels += labels

    def note(self) -> None:
        for array in self.arrays:
            array.flush()
        write_whole(self.noted, lambda file: Path(file).write_text(json.dumps(self.labels)))

    def load(self) -> Features:
        pooled, tokens = (*(np.load(file, mmap_mode="r") for file in self.files), None)[:2]
        return Features(pooled, tokens, torch.tensor(self.labels))


def _fill(
    store: _Store,
    encoder: Encoder,
    samples: Dataset,
    device: torch.device,
    batch_size: int,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    total = len(samples)
    rest = range(len(store.labels), total)
    if not rest:
        return
    for step, batch in enumerate(read_batches(samples, rest, batch_size, workers)):
        features = encoder(torch.stack([image for image, _ in batch]).to(device))[: store.count]
        if not all(part.isfinite().all() for part in features):
            raise TaskError(f"{encoder.name}: features hold values that are no numbers; are its weights right?")
        store.add(features, [int(label) for _, label in batch], total)
        if progress is not None:
            progress(len(store.labels), total)
        if len(store.labels) == total or step % _NOTED == _NOTED - 1:
            store.note()
