"""Epochs of labelled JPEGs by our loader and by timm's, with the same augmentation."""

import argparse
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import ImageDataset, create_loader

from ...tasks.data.class_folder import LabelledFolder
from ...tasks.data.classification import InputRule, keep_posterize_total
from ...tasks.engine.loading import build_loader
from ..timing import alternate


def measure(args: argparse.Namespace) -> list[dict]:
    return bench_loader(args.data, args.size, args.batch, args.workers, args.rounds)


def bench_loader(data: Path | None, size: int, batch: int, workers: int, rounds: int) -> list[dict]:
    """Time epochs of our loader of labelled folders and of timm's, with the same augmentation.

    Args:
        data: One folder a class; made-up JPEGs of 500x375 pixels if None.
        size: Of the input.
        batch: Images in a batch.
        workers: Processes that load.
        rounds: Epochs of each loader.
    """
    settings = {
        "crop and flip": {},
        "RandAugment, erasing": {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel"},
        "evaluation": None,
    }
    rule = InputRule(size, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop_pct=0.875)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = data if data is not None else _draw_photos(Path(scratch), 128)
        for name, augment in settings.items():
            dataset = LabelledFolder(folder, rule.transform(augment), 3)
            seed = None if augment is None else 0
            timm_loader = create_loader(
                ImageDataset(str(folder)),
                (3, size, size),
                batch,
                is_training=augment is not None,
                use_prefetcher=False,
                mean=rule.mean,
                std=rule.std,
                interpolation=rule.interpolation,
                crop_pct=rule.crop_pct,
                num_workers=workers,
                persistent_workers=workers > 0,
                **{"color_jitter": 0.4, **(augment or {})},
            )
            keep_posterize_total(timm_loader.dataset.transform)
            loaders = {"ours": build_loader(dataset, batch, workers, seed), "timm": timm_loader}
            calls = {who: partial(_exhaust, loader) for who, loader in loaders.items()}
            times = alternate(calls, rounds, "cpu")
            counts = {who: _exhaust(loader) for who, loader in loaders.items()}
            rates = {who: counts[who] / times[who] for who in times}
            rows.append(
                {
                    "augmentation": name,
                    "workers": workers,
                    "images/s": round(rates["ours"], 1),
                    "timm images/s": round(rates["timm"], 1),
                    "times timm": round(rates["ours"] / rates["timm"], 3),
                }
            )
    return rows


def _exhaust(loader: Iterable) -> int:
    """Load an epoch; return its number of images."""
    return sum(len(images) for images, _ in loader)


def _draw_photos(folder: Path, count: int) -> Path:
    """Write JPEGs that are about as detailed as photos, in two classes."""
    draw = np.random.default_rng(0)
    for index in range(count):
        path = folder / str(index % 2) / f"{index}.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), np.uint8)).resize((500, 375), Image.BICUBIC)
        pixels = np.asarray(coarse) + draw.normal(0, 12, (375, 500, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return folder
