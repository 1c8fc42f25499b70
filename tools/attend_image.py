"""What `foveate attend IMAGE` draws and writes, of classifiers, detectors and segmenters."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

Place = tuple[float, float]


class _Input(NamedTuple):
    """A photo as a network takes it.

    Attributes:
        network: What attends: a classifier, or the backbone of a detector or segmenter.
        x: Its input ``[1, C, H, W]``.
        photo: The photo, upright, as it is.
        extent: Where the photo's left, right, bottom and top edge come, in pixels of ``x``.
    """

    network: Any
    x: Any
    photo: Any
    extent: tuple[float, float, float, float]

    def move(self, place: Place) -> Place:
        """Return a place of the photo in pixels of the input; beyond it where it was cropped away."""
        left, right, bottom, top = self.extent
        width, height = self.photo.size
        return left + place[0] * (right - left) / width, top + place[1] * (bottom - top) / height


def draw(args: argparse.Namespace) -> None:
    """Draw what is used on each image, and write the numbers beside."""
    import json

    import numpy as np

    from ..tasks import TaskError
    from ..tasks.checkpoints import write_whole
    from ..tasks.data.images import choose_white, find_images, read_image, to_pixels
    from ..tasks.pictures import attention
    from ..tasks.pictures.figures import save_figure

    places = places_in(args.at)
    if args.animate is not None and (args.animate < 2 or len(places or ()) < 2):
        raise TaskError("--animate takes at least 2 pictures, and at least 2 places --at to go from and to")
    if args.method not in attention.METHODS:
        raise TaskError(f"--method is one of {', '.join(attention.METHODS)}; got {args.method!r}")
    if args.animate is not None and args.method != "query":
        raise TaskError(f"--animate is of --method query; {args.method} draws one map")
    if args.heads and args.method != "query":
        raise TaskError(f"--heads is of --method query; {args.method} draws one map of all heads")
    if args.target is not None and args.method in ("query", "rollout"):
        raise TaskError(f"--class is of --method relevance and cam; {args.method} is the same for every class")
    paths = find_images(args.images)
    predictor = load_any(args)
    task = predictor.card["task"]
    _check_task(args, task)
    if args.checkpoint is None:
        predictor.white = choose_white(paths)
    for path in paths:
        photo = to_pixels(read_image(path, predictor.channels, predictor.white), predictor.channels, predictor.white)
        given = _classifier_input(predictor, photo) if task == "classify" else _dense_input(predictor, photo)
        told = _asked(args, predictor, photo, places, path)
        queries = [_query(one, given, path) for one in told]
        stem = args.output / f"{path.stem}_{args.method}"
        frame = {"image": given.photo, "extent": given.extent}
        record = None
        if args.method == "query":
            record = attention.record_once(given.network, given.x, args.layers)
            calls = attention.drawable(record, args.layers)
            observed = [attention.look(calls, query) for query in queries]
            arrays, words = _numbers_of_queries(observed, told, record.skipped)
        else:
            asked = queries if args.at else []
            observed = attention.explain_image(given.network, given.x, args.method, args.layers, args.target, asked)
            arrays, words = _numbers_of_maps(observed, told)
        shown = {"heads": args.heads, "observed": observed, **frame}
        figure = attention.picture(given.network, given.x, queries, args.method, **shown)
        save_figure(figure, stem.with_suffix(".png"))
        write_whole(stem.with_suffix(".npz"), lambda file, arrays=arrays: np.savez_compressed(file, **arrays))
        text = json.dumps({"image": str(path), "method": args.method, **words}, indent=1)
        write_whole(stem.with_suffix(".json"), lambda file, text=text: Path(file).write_text(text))
        print(f"{path}: {stem}.png, .npz and .json")
        if args.animate is not None:
            more = {"layers": args.layers, "observed": record, **frame}
            pictures = list(attention.frames(given.network, given.x, queries, args.animate, **more))
            write_whole(stem.with_suffix(".gif"), lambda file, pictures=pictures: _save_gif(pictures, file))
            print(f"{path}: {stem}.gif")


def places_in(words: Sequence[str] | None) -> list[Place] | None:
    """Return the places that ``X,Y`` name."""
    return [_place(word, "--at") for word in words] if words else None


def _place(word: str, option: str) -> Place:
    from ..tasks import TaskError

    try:
        x, y = map(float, word.split(","))
    except ValueError:
        raise TaskError(f"{option} is {word!r}, but must be X,Y in pixels of the image") from None
    return x, y


def load_any(args: argparse.Namespace) -> Any:
    """Return the predictor of the one model that is named, of any task."""
    from ..tasks import TaskError
    from ..tasks.classify import Predictor
    from ..tasks.classify.task import create_classifier
    from ..tasks.devices import choose_device
    from ..tasks.predictors import is_file, is_published, open_predictor

    if (args.model is None) == (args.checkpoint is None):
        raise TaskError("name one model: --model NAME with published weights, or --checkpoint FILE")
    device = choose_device(args.device)
    if args.checkpoint is not None:
        return open_predictor(Path(args.checkpoint), device)
    if args.untrained and not is_file(args.model) and not is_published(args.model):
        import torch

        torch.manual_seed(args.seed)
        return Predictor.from_model(args.model, create_classifier(args.model), device)
    return open_predictor(args.model, device)


def _check_task(args: argparse.Namespace, task: str) -> None:
    from ..tasks import TaskError

    if task == "classify":
        for option in ("box", "segment"):
            if getattr(args, option):
                raise TaskError(
                    f"--{option} is of detectors and segmenters; {args.checkpoint or args.model} is neither"
                )
    elif args.method != "query":
        raise TaskError(f"--method {args.method} is of classifiers; of a detector or segmenter it is query")
    if args.animate is not None and (args.box or args.segment):
        raise TaskError("--animate goes from one place --at to the next; it takes neither --box nor --segment")


def _classifier_input(predictor: Any, photo: Any) -> _Input:
    left, right, top, bottom = predictor.rule.place(photo.size)
    x = predictor.rule.transform()(photo)[None].to(predictor.device)
    return _Input(predictor.model, x, photo, (left, right, bottom, top))


def _dense_input(predictor: Any, photo: Any) -> _Input:
    import numpy as np
    import torch

    if predictor.card["task"] == "detect":
        pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1).to(predictor.device)
        x, _, ((height, width),) = predictor.model.transform([pixels])
    else:
        x = predictor.rule(photo)[None].to(predictor.device)
        height, width = x.shape[2:]
    # Padding lies to the right and at the bottom.
    return _Input(predictor.model.backbone, x, photo, (0.0, float(width), float(height), 0.0))


def _asked(
    args: argparse.Namespace, predictor: Any, photo: Any, places: list[Place] | None, path: Path
) -> list[dict[str, Any]]:
    """Return what is asked about, in pixels of the photo: dicts of ``at``, or of ``box`` or ``mask`` and more."""
    asked: list[dict[str, Any]] = [{"at": place} for place in places or ()]
    if predictor.card["task"] != "classify" and (args.box or args.segment or not asked):
        objects = _objects(predictor, photo)
        asked += [_chosen(objects, word, "box", photo, path) for word in args.box or ()]
        asked += [_chosen(objects, word, "segment", photo, path) for word in args.segment or ()]
        if not asked:
            asked.append(_chosen(objects, "1", "box" if "box" in (objects or [{}])[0] else "segment", photo, path))
    return asked or [{"at": (photo.width / 2, photo.height / 2)}]


def _objects(predictor: Any, photo: Any) -> list[dict[str, Any]]:
    """Return what a detector or segmenter finds: ``class``, ``box`` or ``mask``, and ``score`` where there is one."""
    import numpy as np
    from scipy import ndimage

    from ..tasks.data.coco import decode_masks
    from ..tasks.detections import keep_likely

    (prediction,) = predictor([photo])
    if isinstance(prediction, dict):
        prediction = keep_likely(prediction, predictor.threshold)
        objects = []
        for index, (label, box) in enumerate(
            zip(prediction["labels"].tolist(), prediction["boxes"].tolist(), strict=True)
        ):
            entry = {
                "class": predictor.classes[label],
                "score": round(float(prediction["scores"][index]), 6),
                "box": box,
            }
            if "masks" in prediction:
                entry["mask"] = decode_masks([prediction["masks"][index]], photo.height, photo.width)[0] > 0
            objects.append(entry)
        return objects
    prediction = prediction.numpy()
    if predictor.output == "panoptic":
        labels, numbers = prediction[..., 0], prediction[..., 1]
        known = labels < len(predictor.classes)
        masks = {int(number): (numbers == number) & known for number in np.unique(numbers[known])}
        return [
            {"class": predictor.classes[int(labels[mask][0])], "number": number, "mask": mask}
            for number, mask in masks.items()
        ]
    segments = []
    for label in np.unique(prediction[prediction < len(predictor.classes)]):
        pieces, count = ndimage.label(prediction == label, np.ones((3, 3)))
        segments += [{"class": predictor.classes[label], "mask": pieces == piece} for piece in range(1, count + 1)]
    return sorted(segments, key=lambda segment: -int(segment["mask"].sum()))


def _chosen(objects: list[dict[str, Any]], word: str, kind: str, photo: Any, path: Path) -> dict[str, Any]:
    """Return the object that a number from 1 on, or a place within it, names; of several the smallest."""
    from ..tasks import TaskError

    key = "box" if kind == "box" else "mask"
    having = [one | {"number": one.get("number", number)} for number, one in enumerate(objects, 1) if key in one]
    if not having:
        raise TaskError(f"{path}: the model finds no {kind} on it; --at X,Y asks about a place")
    if word.isdigit():
        named = [one for one in having if one["number"] == int(word)]
        if not named:
            raise TaskError(
                f"{path}: there is no {kind} {word}; there are {having[0]['number']} to {having[-1]['number']}"
            )
        (one,) = named
    else:
        x, y = _place(word, f"--{kind}")
        if not (0 <= x < photo.width and 0 <= y < photo.height):
            raise TaskError(f"{path}: the image is {photo.width}x{photo.height} pixels; {word} is not on it")
        around = [one for one in having if _holds(one, key, x, y)]
        if not around:
            raise TaskError(f"{path}: {word} is in no {kind} that the model finds")
        one = min(around, key=lambda one: _area(one, key))
    one = {name: value for name, value in one.items() if name in ("class", "score", "number", key)}
    return {"kind": kind, **one}


def _holds(one: dict[str, Any], key: str, x: float, y: float) -> bool:
    if key == "mask":
        return bool(one["mask"][int(y), int(x)])
    left, top, right, bottom = one["box"]
    return left <= x <= right and top <= y <= bottom


def _area(one: dict[str, Any], key: str) -> float:
    if key == "mask":
        return float(one["mask"].sum())
    left, top, right, bottom = one["box"]
    return (right - left) * (bottom - top)


def _query(one: dict[str, Any], given: _Input, path: Path) -> Any:
    """Return what is asked about as `picture` takes it, in pixels of the input."""
    import numpy as np
    from PIL import Image

    from ..tasks import TaskError
    from ..tasks.pictures.attention_marks import Region

    height, width = given.x.shape[2:]
    if "at" in one:
        x, y = one["at"]
        if not (0 <= x < given.photo.width and 0 <= y < given.photo.height):
            raise TaskError(
                f"{path}: the image is {given.photo.width}x{given.photo.height} pixels; {x:g},{y:g} is not on it"
            )
        x, y = given.move((x, y))
        if not (0 <= x < width and 0 <= y < height):
            raise TaskError(f"{path}: {one['at'][0]:g},{one['at'][1]:g} is cropped away from what the model sees of it")
        return x, y
    mask = np.zeros((height, width), np.uint8)
    if "mask" in one:
        size = (round(given.extent[1]), round(given.extent[2]))
        shown = np.asarray(Image.fromarray(one["mask"].astype(np.uint8)).resize(size, Image.Resampling.NEAREST))
        mask[: shown.shape[0], : shown.shape[1]] = shown[:height, :width]
    else:
        corners = [given.move(corner) for corner in (one["box"][:2], one["box"][2:])]
        (left, right), (top, bottom) = (sorted(round(corner[axis]) for corner in corners) for axis in (0, 1))
        mask[max(0, top) : max(bottom, top + 1), max(0, left) : max(right, left + 1)] = 1
    if not mask.any():
        raise TaskError(f"{path}: the {one['kind']} {one['number']} is smaller than a pixel of what the model sees")
    score = f", score {one['score']:.2f}" if "score" in one else ""
    return Region(mask.astype(bool), f"{one['kind']} {one['number']}: {one['class']}{score}")


def _numbers_of_maps(maps: list, told: list[dict]) -> tuple[dict, dict]:
    """Return maps as arrays by name, ``"map"`` if there is one alone, and in plain types."""
    names = ["map"] if len(maps) == 1 else [f"{number}.map" for number in range(len(maps))]
    arrays = {name: one.values.cpu().numpy() for name, one in zip(names, maps, strict=True)}
    words: dict[str, Any] = {name: one.words for name, one in zip(names, maps, strict=True)}
    if maps[0].marks:
        words["at"] = [one["at"] for one in told]
        words["at_input"] = [place for one in maps for place in one.marks]
    return arrays, words


def _numbers_of_queries(observed: list, told: list[dict], skipped: dict[str, str]) -> tuple[dict, dict]:
    """Return what a picture of queries shows as arrays by name, and in plain types."""
    arrays, rows = {}, []
    for number, (one, looks) in enumerate(zip(told, observed, strict=True)):
        if "mask" in one:
            arrays[f"{number}.mask"] = one["mask"]
        plain = {name: value for name, value in one.items() if name != "mask"}
        if "at" in one:
            plain["at_input"] = looks[0].query
        for at in looks:
            call = at.call
            array, facts = _facts(at)
            arrays[f"{number}.{call.name}"] = array
            shared = {"layer": call.name, "kind": call.kind, "map": list(call.map_size)}
            rows.append({**plain, **shared, **facts, "check": _check(call), "note": call.note})
    return arrays, {"queries": rows, "skipped": skipped}


def _check(call: Any) -> float | None:
    """Return what `AttentionCall.check` does; None where the network wrote over what the attention returned."""
    try:
        return call.check()
    except ValueError:
        return None


def _facts(at: Any) -> tuple[Any, dict[str, Any]]:
    """Return the numbers of a query in one attention, of a gate or of channels: an array, and what is said of it."""
    call, _, tokens, use = at
    if call.kind == "gate":
        gate = call.gate[0].float().cpu().numpy()
        return gate, {"least": float(gate.min()), "mean": float(gate.mean()), "largest": float(gate.max())}
    if call.kind == "channel":
        return call.matrix()[0].cpu().numpy(), {}
    maps = use.weights[0].cpu().numpy()
    mean = maps.mean(0)
    best = [
        {
            "row": int(token) // mean.shape[1],
            "column": int(token) % mean.shape[1],
            "weight": round(float(mean.ravel()[token]), 6),
        }
        for token in mean.ravel().argsort()[::-1][:5]
    ]
    seen = int(use.seen[0].any(0).sum())
    facts = {"tokens_asked": len(tokens), "tokens_seen": seen, "outside": round(use.rest[0].mean().item(), 6)}
    return maps, {**facts, "best": best}


def _save_gif(pictures: list, file: object) -> None:
    pictures[0].save(file, format="gif", save_all=True, append_images=pictures[1:], duration=120, loop=0)
