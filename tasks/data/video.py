"""Frames of videos, cameras and animated pictures, one after the other, as few at once as are asked for."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ...zoo.library_errors import first_line
from .. import TaskError
from ..extras import require
from .images import DamagedImageError, open_picture

EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
_ANIMATED = (".apng", ".gif", ".png", ".webp")
_CAMERA = "camera:"
# Of those that say none: cameras, mostly.
_USUAL_RATE = 25.0


def is_video(source: object) -> bool:
    """Return whether a source is a video by its ending, an animated picture, or a camera, such as ``"camera:0"``."""
    if not isinstance(source, str | os.PathLike):
        return False
    name = os.fspath(source)
    if name.startswith(_CAMERA):
        return True
    ending = os.path.splitext(name)[1].lower()
    return ending in EXTENSIONS or (ending in _ANIMATED and os.path.isfile(name) and _is_animated(name))


def _is_animated(path: str) -> bool:
    try:
        with open_picture(path) as picture:
            return getattr(picture, "n_frames", 1) > 1
    except Exception:
        return False  # it is read, and reported, as an image


class Video:
    """A video that is read frame by frame, upright.

    Attributes:
        name: Where it is from.
        rate: Frames a second.
        count: How many frames there are, by its header; None if it doesn't say.

    Args:
        source: A file, or a camera, such as ``"camera:0"``.

    Raises:
        DamagedImageError: If it can't be opened.
        TaskError: If OpenCV isn't installed, or a camera has no number.
    """

    def __init__(self, source: str | os.PathLike):
        self.name = os.fspath(source)
        self._picture: Image.Image | None = None
        if os.path.splitext(self.name)[1].lower() in _ANIMATED:
            self._picture = open_picture(self.name)
            self.count: int | None = self._picture.n_frames
            self.rate = 1000 / (self._picture.info.get("duration") or 1000 / _USUAL_RATE)
            return
        cv2 = require("cv2")
        number = self.name.removeprefix(_CAMERA)
        is_camera = number != self.name
        if is_camera and not number.isdecimal():
            raise TaskError(f"{self.name}: a camera has a number, such as {_CAMERA}0")
        if not is_camera and not Path(self.name).is_file():
            raise DamagedImageError(f"{self.name}: no such file")
        logging = cv2.utils.logging
        level = logging.setLogLevel(logging.LOG_LEVEL_ERROR)  # what it warns of is said below, in one line
        try:
            self._capture = cv2.VideoCapture(int(number) if is_camera else self.name)
        finally:
            logging.setLogLevel(level)
        if not self._capture.isOpened():
            raise DamagedImageError(f"{self.name}: " + ("no such camera" if is_camera else "not a video, or damaged"))
        rate, count = self._capture.get(cv2.CAP_PROP_FPS), self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.rate = rate if math.isfinite(rate) and rate > 0 else _USUAL_RATE
        self.count = int(count) if count > 0 and not is_camera else None

    def frames(self, every: int = 1) -> Iterator[tuple[int, Image.Image]]:
        """Yield the number, from 0, of every ``every``-th frame, and it.

        Raises:
            DamagedImageError: If there is none.
        """
        reader = self._decoded() if self._picture is None else self._shown()
        number = -1
        for number, read in enumerate(reader):
            if number % every == 0:
                yield number, read()
        if number < 0:
            raise DamagedImageError(f"{self.name}: has no frame that can be read")

    def _decoded(self) -> Iterator:
        """Yield, for each frame that OpenCV has, what decodes it."""
        cv2 = require("cv2")
        try:
            while self._capture.grab():
                yield lambda: Image.fromarray(cv2.cvtColor(self._capture.retrieve()[1], cv2.COLOR_BGR2RGB))
        finally:
            self._capture.release()

    def _shown(self) -> Iterator:
        """Yield, for each frame of an animated picture, what decodes it."""
        with self._picture as picture:
            for number in range(picture.n_frames):
                try:
                    picture.seek(number)
                except Exception as error:
                    reason = first_line(error)
                    raise DamagedImageError(f"{self.name}: is damaged from frame {number} on ({reason})") from error
                yield picture.copy
