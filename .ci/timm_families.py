"""Heads on one small model of every family of timm: called by `.ci/wide timm`, with families, or for all of them.

The models stand in timm.csv, one or more of each of timm's model files. Each goes through Mask R-CNN and UperNet,
forward and backward, at an odd size, and every map is held to the stride and the place that the backbone says. What
came of each is written into the table, and into README's sentence from it.
"""

import csv
import gc
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / ".ci" / "timm.csv"
MARK = "<!-- timm -->"
SIZE = (97, 143)
WORKS = "works"
# Corners whose influence differs by less, of 2 at most, say nothing of place: random global attention sees all alike.
_LOCAL = 0.8


def read_rows() -> list[dict[str, str]]:
    """Return the rows of timm.csv."""
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(rows: list[dict[str, str]]) -> None:
    """Write timm.csv, and README's sentence from it."""
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    readme = ROOT / "README.md"
    before, _, after = readme.read_text().split(MARK)
    readme.write_text(f"{before}{MARK}\n{render(rows)}\n{MARK}{after}")


def render(rows: list[dict[str, str]]) -> str:
    """Return README's sentence."""
    families = {row["family"] for row in rows}
    refused = {row["family"]: row["result"] for row in rows if row["result"].startswith("refused")}
    wrong = sorted({row["family"] for row in rows if row["result"].startswith("wrong")})
    whole = sorted(family for family in families if family not in refused and family not in wrong)
    (version,) = {row["timm"] for row in rows}
    single = sum(row["detector"] == "SimpleFeaturePyramid" for row in rows)
    one_size = {row["family"] for row in rows if row["sizes"].startswith("one")}
    return _wrapped(
        f"Of the {len(families)} families of timm {version}, {len(rows)} small models in all, {len(whole)} work with "
        "Mask R-CNN and UperNet, forward and backward at an odd size (`.ci/timm.csv`, written by `.ci/wide timm`); "
        f"{len(refused)} {'is' if len(refused) == 1 else 'are'} refused in one line at construction"
        + (f" ({', '.join(sorted(refused))})" if refused else "")
        + f", and {', '.join(wrong) or 'none'} returns other maps than it says. {single} of the models have maps of "
        f"one stride and get ViTDet's pyramid; {len(one_size)} families take one image size alone, which `img_size` "
        "chooses."
    )


def _wrapped(text: str) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= 120:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else ''}{word}"
    return "\n".join(lines)


def walk(name: str) -> dict[str, str]:
    """Return what a model's maps are, the necks it gets, and whether both dense models work on it."""
    import foveate
    import timm
    import torch

    torch.manual_seed(0)
    row = {"timm": timm.__version__, "strides": "", "sizes": "", "detector": "", "segmenter": ""}
    try:
        segmenter = foveate.create_segmenter("upernet", name, num_classes=3, channels=16)
        limits = {"min_size": SIZE[0], "max_size": SIZE[1]}
        detector = foveate.create_detector("mask_rcnn", name, num_classes=3, channels=16, hidden=16, **limits)
    except ValueError as error:
        return row | {"result": f"refused: {error}"}
    backbone = segmenter.backbone
    row["strides"] = " ".join(map(str, backbone.reductions))
    if backbone.size is not None:
        row["sizes"] = f"one, {backbone.size[0]}x{backbone.size[1]}"
    else:
        row["sizes"] = "any" if backbone.multiple == 1 else f"multiples of {backbone.multiple}, by padding"
    row |= {"detector": type(detector.neck).__name__}
    row |= {"segmenter": "none" if segmenter.neck is None else type(segmenter.neck).__name__}
    try:
        check_maps(segmenter.eval())
        check_training(segmenter.train(), segmenter.loss(torch.rand(2, 3, *SIZE), torch.randint(3, (2, *SIZE))))
        target = {"boxes": torch.tensor([[10.0, 20.0, 90.0, 80.0]]), "labels": torch.tensor([1])}
        target["masks"] = torch.ones(1, *SIZE, dtype=torch.bool)
        check_training(detector, detector.train().loss([torch.rand(3, *SIZE)] * 2, [target] * 2))
        boxes = detector.eval().predict([torch.rand(3, *SIZE)])[0]["boxes"]
        if not bool(torch.isfinite(boxes).all()):
            raise AssertionError("detections are not finite")
    except AssertionError as error:
        return row | {"result": f"wrong: {error}"}
    except Exception as error:  # what isn't refused at construction must work
        return row | {"result": f"wrong: {type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    return row | {"result": WORKS}


def check_maps(model) -> None:
    """Raise an AssertionError unless every map has its channels, follows its stride, and looks where it stands."""
    import torch

    backbone = model.backbone
    # Where unpadded convolutions leave out the border, little is left of a small map.
    size = tuple(2 * side - 1 for side in SIZE) if backbone.borderless else SIZE
    if backbone.size is not None:
        size = tuple(map(min, size, backbone.size))
    image = torch.randn(1, 3, *size, requires_grad=True)
    levels = list(zip(backbone(image), backbone.channels, backbone.reductions, strict=True))
    if len(set(backbone.reductions)) == 1:
        levels = levels[-1:]
    # MultiLevelNeck's maps cover the padded image, as published; all others lie on the image exactly.
    if model.neck is not None and type(model.neck).__name__ != "MultiLevelNeck":
        levels += list(zip(model.features(image), model.neck.channels, model.neck.reductions, strict=True))
    for index, (level, channels, stride) in enumerate(levels):
        shape = tuple(level.shape)
        if shape[:2] != (1, channels):
            raise AssertionError(f"map {index} has shape {shape}, not {channels} channels")
        if any(abs(cells - side / stride) > 1 + 1e-6 for cells, side in zip(shape[2:], size, strict=True)):
            raise AssertionError(f"map {index} of {size[0]}x{size[1]} pixels has shape {shape}, at stride {stride}")
        rows, columns = shape[2:]
        if min(rows, columns) < 3:
            continue
        # Two corners off the diagonal show maps that are shuffled, turned or transposed.
        below, above = _influence(level, image, rows - 1, 0), _influence(level, image, 0, columns - 1)
        if float((below - above).abs().sum()) < _LOCAL:
            continue
        # What both depend on, as all of the image where attention is global, is left out.
        (low, left), (high, right) = _centre((below - above).relu()), _centre((above - below).relu())
        if not (low > high and left < right):
            raise AssertionError(
                f"map {index}, stride {stride}: its lower left corner looks at row {low:.0f}, column {left:.0f}, its "
                f"upper right one at {high:.0f}, {right:.0f}"
            )


def _influence(level, image, row: int, column: int):
    """Return how much a cell of a map depends on each pixel, ``[H, W]``, of sum 1."""
    import torch

    cell = level[0, :, row, column]
    weights = torch.linspace(-1, 1, len(cell)).cos()
    (gradient,) = torch.autograd.grad((cell * weights).sum(), image, retain_graph=True)
    strength = gradient[0].abs().sum(0)
    return strength / strength.sum().clamp(min=1e-30)


def _centre(strength) -> tuple[float, float]:
    """Return the centre, in pixels, of ``[H, W]``."""
    import torch

    total = strength.sum().clamp(min=1e-30)
    rows, columns = (torch.arange(side, dtype=strength.dtype) for side in strength.shape)
    return float((strength.sum(1) * rows).sum() / total), float((strength.sum(0) * columns).sum() / total)


def check_training(model, losses) -> None:
    """Raise an AssertionError unless losses are finite, and their gradients reach all of the neck and the backbone."""
    import torch

    total = sum(losses.values())
    if not bool(torch.isfinite(total)):
        raise AssertionError(f"{type(model).__name__} has the losses {losses}")
    model.zero_grad()
    total.backward()
    if model.neck is not None:
        idle = [name for name, weight in model.neck.named_parameters() if weight.grad is None]
        if idle:
            raise AssertionError(f"{type(model).__name__}: no gradient reaches {idle[0]} of the neck")
    grads = [weight.grad for weight in model.backbone.parameters() if weight.grad is not None]
    if not grads or not any(bool(grad.abs().sum() > 0) for grad in grads[:8]):
        raise AssertionError(f"{type(model).__name__}: no gradient reaches the backbone's first layers")
    if not all(bool(torch.isfinite(grad).all()) for grad in grads):
        raise AssertionError(f"{type(model).__name__}: the backbone's gradients are not finite")


def main(names: list[str]) -> None:
    """Walk the chosen families or models, or all, and exit with 1 if any is wrong or too many refuse."""
    rows = read_rows()
    known = {name for row in rows for name in (row["family"], row["model"])}
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"{TABLE.name} has no {unknown[0]}")
    for row in rows:
        if names and row["family"] not in names and row["model"] not in names:
            continue
        row |= walk(row["model"])
        print(f"{row['family']}: {row['model']}: {re.sub(chr(10), ' ', row['result'])}", flush=True)
        write_rows(rows)
        gc.collect()
    families = {row["family"] for row in rows}
    failed = {row["family"] for row in rows if row["result"] != WORKS}
    if any(row["result"].startswith("wrong") for row in rows):
        sys.exit("some are wrong")
    if len(failed) > 0.15 * len(families):
        sys.exit(f"{len(failed)} of {len(families)} families don't work")


if __name__ == "__main__":
    main(sys.argv[1:])
