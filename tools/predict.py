"""Name what is in images and videos: writes a picture or video for each, and predictions.json, and prints a few words.

What is done depends on the checkpoint: classes of the image, boxes and masks of objects, or classes of pixels.

Of a video, an animated picture or a camera ("camera:0") an MP4 is written, with an entry in predictions.json for each
frame that was looked at. Ctrl-C ends it; what was done until then is whole. With --no-pictures there are none of these.

An image that can't be read, or has no answer, is reported, and the others are done; the exit code is then 2.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from .arguments import at_least

_LONGEST = 200  # bytes of a picture's name
_READERS = 4  # threads
_AHEAD = 1 << 25  # pixels of a batch beside which the next one is read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", help="files, folders, quoted globs, addresses (http, https), camera:0"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="best.pth or last.pth of a run, or a converted one"
    )
    source.add_argument(
        "--model",
        metavar="NAME",
        help="a timm model or a detector or segmenter with published weights; or a file, .onnx too",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/predict"), help="folder; %(default)s by default")
    parser.add_argument("--top", type=at_least(1), default=5, help="classes to name; %(default)s by default")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="least score of objects, 0 to 1; %(default)s by default"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (CUDA if there is one), cpu, cuda:1, ...; %(default)s by default"
    )
    parser.add_argument(
        "--white", type=int, help="value of 16-bit pixels that is white; as in training by default, else 65535"
    )
    parser.add_argument(
        "--batch-size", type=at_least(1), default=16, help="images read at once; %(default)s by default"
    )
    parser.add_argument(
        "--max-pixels",
        type=at_least(1),
        default=50_000_000,
        help="of an image whose objects or pixels are labelled, which needs memory for each; %(default)s by default",
    )
    parser.add_argument(
        "--tile",
        type=at_least(32),
        metavar="SIZE",
        help="look for objects or label pixels in tiles of so many pixels, and merge what they show; a TIFF that is "
        "stored in parts is never read as a whole",
    )
    parser.add_argument(
        "--overlap", type=at_least(0), help="pixels that neighboring tiles share; an eighth of the tile by default"
    )
    parser.add_argument(
        "--no-pictures",
        action="store_true",
        help="write predictions.json alone, and the maps of models that label pixels: much faster",
    )
    parser.add_argument(
        "--every", type=at_least(1), default=1, help="of videos, look at every so-manyth frame; %(default)s by default"
    )


def run(args: argparse.Namespace) -> int:
    """Predict."""
    from ..tasks import TaskError, one_line
    from ..tasks.data.images import FULL_WHITE, find_images
    from ..tasks.data.sources import is_address
    from ..tasks.data.video import Video, is_video
    from ..tasks.devices import choose_device
    from ..tasks.exported import load_exported
    from ..tasks.predictors import is_file, open_predictor
    from ..tasks.tiles import check_tiling

    if not 0 <= args.threshold <= 1:
        raise TaskError(f"--threshold is {args.threshold}, but must be from 0 to 1")
    if args.white is not None and not 1 <= args.white <= FULL_WHITE:
        raise TaskError(f"--white is {args.white}, but must be from 1 to {FULL_WHITE}")
    sources = list(dict.fromkeys(args.images))
    videos = [Video(source) for source in sources if is_video(source)]
    paths: list[Path | str] = []
    for source in sources:
        if not is_video(source):
            paths += [source] if is_address(source) else find_images([source])
    paths = list(dict.fromkeys(paths))
    device = choose_device(args.device)
    checkpoint = args.checkpoint
    if checkpoint is None and is_file(args.model):
        checkpoint = Path(args.model)
    if checkpoint is not None and checkpoint.suffix == ".onnx":
        if args.device not in ("auto", "cpu"):
            raise TaskError(f"--device is {args.device}, but onnxruntime runs {checkpoint} on the CPU here")
        predictor = load_exported(checkpoint)
    else:
        predictor = open_predictor(checkpoint or args.model, device)
    predictor.top, predictor.threshold = args.top, args.threshold
    predictor.white = args.white or predictor.white
    if args.tile is not None:
        args.overlap = check_tiling(args.tile, args.overlap, predictor)
    elif args.overlap is not None:
        raise TaskError("--overlap is of tiles; give their side by --tile")

    refused: list[str] = []
    with _Entries(args.output / "predictions.json") as entries:
        predict = _predict_images if args.tile is None else _predict_tiled
        count = predict(args, predictor, paths, entries, refused)
        for video, name in zip(videos, _video_names(videos), strict=True):
            _predict_video(args, predictor, video, args.output / name, entries)
    made = "image" if args.no_pictures else "picture"
    counts = ((count, made, paths), (len(videos), "video", videos))
    done = [f"{number} {what}{'s' * (number != 1)}" for number, what, given in counts if given]
    print(f"{', '.join(done)} and predictions.json: {args.output}")
    for message in refused:
        print(f"foveate: error: {one_line(message)}", file=sys.stderr)
    return 2 if refused else 0


class _Entries:
    """A JSON list that is written entry by entry, and whole whenever it is left, by Ctrl-C too."""

    def __init__(self, path: Path):
        self._path, self._count = path, 0

    def __enter__(self) -> "_Entries":
        from ..tasks.checkpoints import check_folder

        check_folder(self._path.parent, needed=0)
        handle, self._partial = tempfile.mkstemp(dir=self._path.parent, prefix=f".partial-{self._path.stem}-")
        self._file = os.fdopen(handle, "w", encoding="utf-8")
        self._file.write("[")
        return self

    def add(self, entry: dict) -> None:
        """Write an entry."""
        # At once: Ctrl-C comes before or after.
        self._file.write((",\n" if self._count else "\n") + json.dumps(entry, indent=1))
        self._count += 1

    def __exit__(self, kind: type | None, *error) -> None:
        self._file.write("\n]\n")
        self._file.close()
        if kind is None or (kind is KeyboardInterrupt and self._count):
            os.umask(mask := os.umask(0))
            os.chmod(self._partial, 0o666 & ~mask)
            os.replace(self._partial, self._path)
        else:
            os.unlink(self._partial)


def _predict_images(
    args: argparse.Namespace, predictor: Any, paths: list[Path | str], entries: _Entries, refused: list[str]
) -> int:
    """Return how many pictures were made; ``refused`` get what is wrong with the other images."""
    from tqdm import tqdm

    from ..tasks import TaskError, one_line
    from ..zoo.library_errors import first_line

    most = None if (predictor.card or {}).get("task") == "classify" else args.max_pixels
    names, count = _picture_names(paths), 0
    silent = not paths or not sys.stderr.isatty()
    with tqdm(total=len(paths), unit="image", desc="predicting", disable=silent) as bar:
        for readings in _read_ahead(paths, args.batch_size, lambda path: _read(path, predictor, most)):
            refused += [str(reading) for _, reading in readings if isinstance(reading, TaskError)]
            batch = [(path, reading) for path, reading in readings if not isinstance(reading, TaskError)]
            for (path, image), result in zip(batch, _answers(predictor, batch), strict=True):
                if isinstance(result, Exception):
                    refused.append(f"{path}: has no answer ({first_line(result)})")
                    continue
                shown = {}
                try:
                    shown, count = _show(args, predictor, image, result, args.output / names[path]), count + 1
                except (ValueError, ArithmeticError, MemoryError) as error:
                    refused.append(f"{path}: no picture of it could be made ({first_line(error)})")
                entries.add({"image": str(path), **shown, **predictor.describe(result)})
                tqdm.write(one_line(f"{path}: {predictor.headline(result)}"))
            bar.update(len(readings))
            readings = batch = image = None  # the memory is the next ones'
    return count


def _read_ahead(
    paths: Sequence[Path | str], size: int, read: Callable[[Path | str], Any]
) -> Iterator[list[tuple[Path | str, Any]]]:
    """Yield batches of paths, each with its image or the TaskError of reading it; threads read the next one meanwhile.

    They wait where images are large, so that the memory holds one batch, and leave addresses, for which Ctrl-C would
    have to wait, to the caller's thread.
    """
    from ..tasks import TaskError
    from ..tasks.data.sources import is_address

    def attempt(path: Path | str) -> Any:
        try:
            return read(path)
        except TaskError as error:
            return error

    def begin(start: int) -> list[tuple[Path | str, Future | None]]:
        part = paths[start : start + size]
        return [(path, None if is_address(path) else pool.submit(attempt, path)) for path in part]

    pool = ThreadPoolExecutor(_READERS)
    try:
        begun = begin(0)
        for start in range(0, len(paths), size):
            batch = [(path, attempt(path) if future is None else future.result()) for path, future in begun]
            pixels = sum(image.width * image.height for _, image in batch if not isinstance(image, TaskError))
            # A future holds its result.
            begun = begin(start + size) if pixels <= _AHEAD else None
            yield batch
            del batch
            begun = begin(start + size) if begun is None else begun
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _show(args: argparse.Namespace, predictor: Any, image: Any, result: Any, picture: Path) -> dict[str, str]:
    """Write the picture of a result, and the map beside it if there is one; return what was written."""
    if args.no_pictures:
        return predictor.write_map(result, picture)
    return {"picture": str(picture), **predictor.draw(image, result, picture)}


def _predict_tiled(
    args: argparse.Namespace, predictor: Any, paths: list[Path | str], entries: _Entries, refused: list[str]
) -> int:
    """Return how many pictures were made of images seen tile by tile; ``refused`` get what is wrong with the others."""
    from tqdm import tqdm

    from ..tasks import TaskError, one_line
    from ..tasks.data.sources import is_address
    from ..tasks.data.windows import Windows
    from ..tasks.tiles import predict_tiled
    from ..zoo.library_errors import first_line

    names, count = _picture_names(paths), 0
    for path in paths:
        picture = args.output / names[path]
        with tqdm(unit="tile", desc=one_line(str(path)), disable=not sys.stderr.isatty()) as bar:
            try:
                source = _image(path, predictor) if is_address(path) else path
                windows = Windows(source, predictor.channels, predictor.white)
                tiled = predict_tiled(predictor, windows, args.tile, args.overlap, args.output, bar.update)
                shown = predictor.write_map(tiled.answer, picture)
                if not args.no_pictures:
                    predictor.draw_picture(tiled.overview, tiled.reduced, picture)
                    shown = {"picture": str(picture), **shown}
            except TaskError as error:
                refused.append(str(error))
                continue
            except (ValueError, ArithmeticError, MemoryError, RuntimeError) as error:
                refused.append(f"{path}: has no answer ({first_line(error)})")
                continue
        entries.add({"image": str(path), **shown, **predictor.describe(tiled.answer)})
        print(one_line(f"{path}: {predictor.headline(tiled.answer)}"))
        count += 1
    return count


def _image(path: Path | str, predictor):
    """Return an image of a file or an address."""
    from ..tasks.data.images import read_image
    from ..tasks.data.sources import is_address, read_address

    return (read_address if is_address(path) else read_image)(path, predictor.channels, predictor.white)


def _read(path: Path | str, predictor, most: int | None):
    """Return an image, or raise a TaskError if it can't be read or has more pixels than may be labelled."""
    from ..tasks import TaskError

    image = _image(path, predictor)
    if most is not None and image.width * image.height > most:
        raise TaskError(
            f"{path}: has {image.width * image.height} pixels, and labels of each need memory; look at it in tiles by "
            "--tile, or allow more by --max-pixels"
        )
    return image


def _answers(predictor, batch: list) -> list:
    """Return what is found in every image of a batch, or the error that it ended in: strangers' images do anything."""
    if not batch:
        return []
    try:
        return predictor([image for _, image in batch])
    except Exception as error:
        if len(batch) == 1:
            return [error]
        return [_answers(predictor, [pair])[0] for pair in batch]


def _predict_video(args: argparse.Namespace, predictor: Any, video: Any, path: Path, entries: _Entries) -> None:
    from tqdm import tqdm

    from ..tasks.load import Model
    from ..tasks.pictures.frames import VideoWriter, annotate

    writer = None if args.no_pictures else VideoWriter(path, video.rate / args.every)
    shown = {} if writer is None else {"picture": str(path)}
    total = None if video.count is None else -(-video.count // args.every)
    frames = 0
    try:
        results = Model(predictor).stream(video, batch_size=args.batch_size, every=args.every)
        for place, result in enumerate(
            tqdm(results, "predicting", total, unit="frame", disable=not sys.stderr.isatty())
        ):
            frame = place * args.every
            seconds = round(frame / video.rate, 3)
            entries.add({"image": video.name, "frame": frame, "seconds": seconds, **shown, **result})
            if writer is not None:
                writer.add(annotate(result))
            frames += 1
    finally:
        if writer is not None:
            writer.close()
        print(", ".join([f"{video.name}: {frames} frames", *shown.values()]))


def _video_names(videos: list[Any]) -> list[str]:
    """Return a name of an MP4 for each video."""
    named = _picture_names([Path(video.name.replace(":", "")) for video in videos])
    return [f"{Path(name).stem}.mp4" for name in named.values()]


def _picture_names(paths: list[Path | str]) -> dict[Path | str, str]:
    """Return a PNG name for each image; equal stems of several folders or formats are numbered, long ones cut."""
    names: dict[Path | str, str] = {}
    taken: set[str] = set()
    for path in paths:
        # What is added to it while it is written, and to maps' names, must fit too.
        file = path if isinstance(path, Path) else Path(unquote(urlsplit(path).path))
        stem = os.fsencode(file.stem.replace("\0", "") or "image")[:_LONGEST].decode(errors="ignore")
        name, number = f"{stem}.png", 2
        while name in taken:
            name, number = f"{stem}-{number}.png", number + 1
        taken.add(name)
        names[path] = name
    return names
