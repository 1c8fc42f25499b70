"""What was found, drawn on frames of their own size, as videos need it: classes keep their colours throughout."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import draw_bounding_boxes

from .. import TaskError, printable
from ..data.coco import decode_masks
from ..results import Result
from .figures import choose_styles
from .naming import place_names

# Height of letters, as a share of the frame's.
_LETTERS = 1 / 36
_TINT = 0.45


def annotate(result: Result) -> np.ndarray:
    """Return the image of a result ``[H, W, 3]``, RGB, uint8, with boxes, outlines and names drawn on it."""
    image = result.image.convert("RGB")
    height = image.height
    font = ImageFont.load_default(max(10, round(height * _LETTERS)))
    if result.kind == "labels":
        return np.asarray(_listed(image, [f"{name} {share:.0%}" for name, share in result.answer], [], font))
    objects = result.objects()
    labels = objects.labels.tolist()
    styles = choose_styles(labels, result.names)
    shown = [place for place, label in enumerate(labels) if label in styles]
    colours = [styles[labels[place]][0] for place in shown]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if objects.masks is not None and shown:
        masks = decode_masks([objects.masks[place] for place in shown], image.height, image.width).astype(bool)
        outlined = np.array(image)
        for mask, colour in zip(masks, colours, strict=True):
            # One over the other: torchvision blackens what several share.
            outlined[mask] = np.rint((1 - _TINT) * outlined[mask] + _TINT * np.array(_rgb(colour)))
        for mask, colour in zip(masks, colours, strict=True):
            # Tints alone are lost on coloured images.
            outline, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
            cv2.drawContours(outlined, outline, -1, _rgb(colour), max(1, height // 360))
        pixels = torch.from_numpy(outlined).permute(2, 0, 1)
    if result.kind != "objects":
        drawn = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        names = [result.names[label] for label in styles]
        return np.asarray(_listed(drawn, names, [style[0] for style in styles.values()], font))
    if shown:
        texts = [f"{printable(result.names[labels[place]])} {objects.scores[place]:.2f}" for place in shown]
        boxes = torch.from_numpy(objects.boxes[shown].astype(np.float32))
        pixels = draw_bounding_boxes(pixels, boxes, colors=colours, width=max(1, height // 360))
        return np.asarray(_named(Image.fromarray(pixels.permute(1, 2, 0).numpy()), boxes.numpy(), texts, colours, font))
    return np.array(image)


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def _named(
    image: Image.Image,
    boxes: np.ndarray,
    texts: Sequence[str],
    colours: Sequence[str],
    font: ImageFont.ImageFont,
) -> Image.Image:
    """Return an image with a name at each box, above it or where no other name is yet."""
    draw = ImageDraw.Draw(image)
    sizes = [(draw.textlength(text, font=font) + 4, font.size + 4) for text in texts]
    places = place_names(boxes, sizes, *image.size)
    for (left, top), (width, height), text, colour in zip(places, sizes, texts, colours, strict=True):
        draw.rectangle((left, top, left + width, top + height), fill=colour)
        draw.text((left + 2, top + 1), text, fill="black", font=font)
    return image


def _listed(image: Image.Image, texts: Sequence[str], colours: Sequence[str], font: ImageFont.ImageFont) -> Image.Image:
    """Return an image with lines of text in its upper left corner, on their colours, or on white."""
    draw, step = ImageDraw.Draw(image), font.size + 4
    for line, text in enumerate(map(printable, texts)):
        width = draw.textlength(text, font=font) + 6
        draw.rectangle((0, line * step, width, (line + 1) * step), fill=colours[line] if colours else "white")
        draw.text((3, line * step + 1), text, fill="black", font=font)
    return image


class VideoWriter:
    """Writes frames as an MP4, which `close` makes whole: however many there are then, it can be played.

    Args:
        path: File to write.
        rate: Frames a second.
    """

    def __init__(self, path: Path, rate: float):
        self.path, self.rate = path, rate
        self._writer: cv2.VideoWriter | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, self._partial = tempfile.mkstemp(dir=path.parent, prefix=f".partial-{path.stem}-", suffix=".mp4")
        os.close(handle)

    def add(self, frame: np.ndarray) -> None:
        """Write a frame ``[H, W, 3]``, RGB, uint8; all have the size of the first.

        Raises:
            TaskError: If OpenCV can't write here.
        """
        if self._writer is None:
            size = frame.shape[1::-1]
            self._writer = cv2.VideoWriter(self._partial, cv2.VideoWriter_fourcc(*"mp4v"), self.rate, size)
            if not self._writer.isOpened():
                raise TaskError(f"{self.path}: OpenCV can't write an MP4 of {size[0]}x{size[1]} pixels here")
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        """End the file, and give it its name, if there is a frame in it."""
        if self._writer is None:
            os.unlink(self._partial)
            return
        self._writer.release()
        os.umask(mask := os.umask(0))
        os.chmod(self._partial, 0o666 & ~mask)
        os.replace(self._partial, self.path)
