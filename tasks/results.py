"""What a model found in an image, as other tools take it."""

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import TaskError
from .checkpoints import write_whole
from .data.coco import Instances, decode_masks, encode_mask, mask_area, mask_box
from .data.convert import yolo_lines
from .data.images import EXTENSIONS
from .detections import keep_likely
from .extras import require


@dataclasses.dataclass
class Objects:
    """Objects, or regions that have a mask each.

    Attributes:
        boxes: ``[N, 4]``, ``x1, y1, x2, y2`` in pixels.
        labels: ``[N]``, from 0.
        scores: ``[N]``; None of regions, which have none.
        masks: Run lengths of each, or None.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None
    masks: list[dict] | None


class Result(Mapping):
    """What was found in one image: a mapping of plain types, as in predictions.json, that others' formats come from.

    The keys are ``classes`` (of an image, or by their share of it), ``objects`` or ``segments``.

    Attributes:
        source: Where the image is from.
        image: The image, upright, as the model got it.
        names: Names of all classes, in the order of the labels.
        kind: ``"labels"``, ``"objects"``, ``"regions"`` (classes of pixels) or ``"segments"`` (panoptic).
        answer: What the predictor returned: ``(class, probability)`` of each class named; tensors of objects; classes
            of pixels ``[H, W]``; or class and number of segments ``[H, W, 2]``.

    Args:
        predictor: Which found it.
        image: See above.
        answer: See above.
        source: See above.
    """

    def __init__(self, predictor: Any, image: Image.Image, answer: Any, source: str = ""):
        self.source, self.image, self.answer = source, image, answer
        self.names: list[str] = list(predictor.classes)
        if isinstance(answer, Mapping):
            self.kind = "objects"
        elif isinstance(answer, torch.Tensor):
            self.kind = "regions" if answer.ndim == 2 else "segments"
        else:
            self.kind = "labels"
        self._draw, self._threshold = predictor.draw, getattr(predictor, "threshold", 0.0)
        self._described: dict[str, Any] = predictor.describe(answer)
        self._headline: str = predictor.headline(answer)

    def __getitem__(self, key: str) -> Any:
        return self._described[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._described)

    def __len__(self) -> int:
        return len(self._described)

    def __repr__(self) -> str:
        return f"<Result of {self.source}: {self._headline}>"

    def objects(self) -> Objects:
        """Return the objects, those with the least score or more, or the regions of classes or segments.

        Raises:
            TaskError: If the image as a whole was named.
        """
        if self.kind == "labels":
            raise TaskError(f"{self.source}: a classifier names the image; it finds no objects in it")
        if self.kind == "objects":
            likely = keep_likely(self.answer, self._threshold)
            boxes, labels, scores = (likely[key].numpy() for key in ("boxes", "labels", "scores"))
            return Objects(boxes, labels, scores, likely.get("masks"))
        planes = self.answer.numpy()
        codes = planes[..., None] if self.kind == "regions" else planes
        there, numbers = np.unique(codes.reshape(-1, codes.shape[-1]), axis=0, return_inverse=True)
        numbers = numbers.reshape(codes.shape[:2])
        known = [index for index, code in enumerate(there) if code[0] < len(self.names)]
        masks = [numbers == index for index in known]
        boxes = np.array([mask_box(mask) for mask in masks], np.float64).reshape(-1, 4)
        return Objects(boxes, there[known, 0].astype(np.int64), None, [encode_mask(mask) for mask in masks])

    def to_supervision(self) -> Any:
        """Return `supervision.Detections`, or of a classifier `supervision.Classifications`.

        Names of classes are in ``data["class_name"]``; regions have a mask each.

        Raises:
            TaskError: If supervision isn't installed.
        """
        supervision = require("supervision")
        if self.kind == "labels":
            labels = np.array([self.names.index(name) for name, _ in self.answer], int)
            return supervision.Classifications(labels, np.array([share for _, share in self.answer], np.float32))
        objects = self.objects()
        masks = None
        if objects.masks is not None:
            masks = decode_masks(objects.masks, self.image.height, self.image.width).astype(bool)
        return supervision.Detections(
            xyxy=objects.boxes.astype(np.float32).reshape(-1, 4),
            mask=masks,
            confidence=objects.scores,
            class_id=objects.labels.astype(int),
            data={"class_name": np.array([self.names[label] for label in objects.labels], dtype=object).astype(str)},
        )

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """Return COCO's annotations of the objects: boxes as ``x, y, width, height``, masks as run lengths.

        Categories count from 1 in the order of the classes, as `foveate data convert` numbers them.

        Args:
            image_id: Of all of them.

        Raises:
            TaskError: If there are no objects, but labels of the image.
        """
        objects, annotations = self.objects(), []
        for index, (x1, y1, x2, y2) in enumerate(objects.boxes.tolist()):
            entry = {
                "image_id": image_id,
                "category_id": int(objects.labels[index]) + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
            }
            if objects.scores is not None:
                entry["score"] = float(objects.scores[index])
            if objects.masks is not None:
                mask = objects.masks[index]
                entry["segmentation"] = {"size": list(mask["size"]), "counts": mask["counts"].decode()}
                entry["area"] = float(mask_area(mask))
            annotations.append(entry)
        return annotations

    def to_yolo(self) -> str:
        """Return the text of YOLO's file of labels: a polygon a line where there are masks, else a box.

        Scores and holes aren't held by the format, and parts are joined.

        Raises:
            TaskError: If there are no objects, but labels of the image.
        """
        objects = self.objects()
        none = np.zeros(len(objects.labels), bool)
        instances = Instances(objects.boxes, objects.labels, none.astype(float), none, objects.masks)
        return "".join(f"{line}\n" for line in yolo_lines(instances, (self.image.height, self.image.width)))

    def to_dataframe(self) -> Any:
        """Return a pandas table, a row for each class, object or segment.

        Raises:
            TaskError: If pandas isn't installed.
        """
        pandas = require("pandas")
        if self.kind == "objects":
            rows = [
                {
                    "class": entry["class"],
                    "score": entry["score"],
                    **dict(zip(("x1", "y1", "x2", "y2"), entry["box"], strict=True)),
                }
                for entry in self["objects"]
            ]
            columns = ["class", "score", "x1", "y1", "x2", "y2"]
        else:
            rows = self["segments" if self.kind == "segments" else "classes"]
            columns = {
                "labels": ["class", "probability"],
                "regions": ["class", "share"],
                "segments": ["id", "class", "thing", "area"],
            }[self.kind]
        table = pandas.DataFrame(rows, columns=columns)
        table.insert(0, "image", self.source)
        return table

    def plot(self) -> Image.Image:
        """Return the picture that `foveate predict` writes."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "picture.png"
            self._draw(self.image, self.answer, path)
            with Image.open(path) as picture:
                return picture.convert("RGB")

    def save(self, path: str | Path) -> Path:
        """Write the picture (.png, .jpg, ...), the plain types (.json), a table (.csv) or YOLO's lines (.txt).

        Args:
            path: File; its ending says which.

        Raises:
            TaskError: If the ending is another, the file can't be written, or a package is missing.
        """
        path = Path(path)
        ending = path.suffix.lower()
        text = None
        if ending == ".json":
            text = json.dumps({"image": self.source, **self}, indent=1)
        elif ending == ".csv":
            text = self.to_dataframe().to_csv(index=False)
        elif ending == ".txt":
            text = self.to_yolo()
        elif ending not in EXTENSIONS:
            raise TaskError(f"{path}: results are saved as .json, .csv, .txt (YOLO), .png or .jpg")
        if text is None:
            write_whole(path, self.plot().save)
        else:
            write_whole(path, lambda file: Path(file).write_text(text, encoding="utf-8"))
        return path
