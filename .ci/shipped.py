"""Makes the weights that the package ships: `python .ci/shipped.py [NAME ...]`; 4 to 6 minutes of processor time.

Each is trained by its recipe, written as float16 (vectors stay float32) to zoo/shipped, read again and measured on the
held-out data, and gets a card and its row of zoo/weights.json. ``--runs FOLDER`` keeps the runs there, each in a folder
of its name, and takes those that are there already.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHIPPED, TABLE = ROOT / "zoo" / "shipped", ROOT / "zoo" / "weights.json"
MOST = 5_000_000
# Where the data comes from.
PAGES = {"digits": "https://doi.org/10.24432/C50P49", "nuclei": "https://github.com/stardist/stardist"}
# Recipe, overrides that keep the file small, data, head, and the engine's names of what is measured.
MODELS = {
    "nat_atto.foveate_digits": ("classify/nat_atto_digits", [], "digits", None, {"top-1": "accuracy"}),
    "nat_atto.foveate_mask_rcnn_nuclei": (
        "detect/mask_rcnn_nat_atto_nuclei",
        ["model.kwargs.channels=48", "model.kwargs.hidden=128"],
        "nuclei",
        "mask_rcnn",
        {"box AP": "box_ap", "mask AP": "mask_ap", "box AP50": "box_ap50", "mask AP50": "mask_ap50"},
    ),
    "nat_atto.foveate_upernet_nuclei": (
        "segment/upernet_nat_atto_nuclei",
        ["model.kwargs.channels=32"],
        "nuclei",
        "upernet",
        {"mIoU": "miou"},
    ),
}
NOTES = {
    "digits": "trained by foveate on 1,400 of the bundled digits, measured on the other 397, by which its "
    "settings were chosen",
    "nuclei": "trained by foveate on the left half of the bundled micrograph, measured on the right one, by which its "
    "settings were chosen: no proof of how it does on other micrographs",
}


def make(name: str, runs: Path) -> None:
    """Train a model unless it is there, and write its file, its row and its card."""
    recipe, overrides, data, head, metrics = MODELS[name]
    run = runs / name
    command = ["train", recipe, *overrides]
    if not (run / "last.pth").exists():
        subprocess.run([sys.executable, "-m", "foveate", *command, "--output", str(run)], check=True)
    path = SHIPPED / f"{name}.safetensors"
    write(name, run / "last.pth", path)
    measured = measure(path, recipe, data, metrics)
    write_row(name, path, data, head, measured)
    write_card(name, f"foveate {' '.join(command)}", data)
    print(name, path.stat().st_size, "bytes", measured, flush=True)


def write(name: str, checkpoint: Path, path: Path) -> None:
    """Write a run's last checkpoint as float16, without what only training needs, and grey digits as three channels."""
    import torch
    from foveate.tools.weights.contents import load_contents
    from foveate.tools.weights.convert import save_state

    contents = load_contents(str(checkpoint))
    card, state = contents.card(), contents.state()
    state = {key: value.detach() for key, value in state.items() if not key.startswith("aux_head.")}
    if contents.task == "classify":
        first = "stem.proj.0.weight"
        state[first] = state[first].repeat(1, 3, 1, 1) / 3
        card["input"] |= {"channels": 3, **{key: card["input"][key] * 3 for key in ("mean", "std")}}
    wide = {key for key, value in state.items() if value.is_floating_point() and value.dim() > 1}
    half = {key: (value.half() if key in wide else value).contiguous().clone() for key, value in state.items()}
    if not all(torch.isfinite(value).all() for value in half.values()):
        raise SystemExit(f"{name}: doesn't fit into float16")
    metadata = {"format": "pt", "model": contents.name, "task": contents.task, "head": contents.head, "weights": name}
    save_state(half, path, metadata | {"license": "mit", "foveate": json.dumps(card)})


def measure(path: Path, recipe: str, data: str, metrics: dict[str, str]) -> dict[str, float]:
    """Return what the file that is shipped reaches on the held-out data, in percent."""
    from foveate.tasks import engine
    from foveate.tasks.data.classification import Digits
    from foveate.tasks.predictors import load_predictor

    if data == "digits":
        held_out = Digits("val")
        answers = load_predictor(path)([held_out.image(index) for index in range(len(held_out))], top=1)
        named = [held_out.classes.index(answer[0][0]) for answer in answers]
        right = sum(label == guess for label, guess in zip(held_out.targets, named, strict=True))
        return {"top-1": round(100 * right / len(held_out), 2)}
    config = engine.load_config(recipe)
    config["model"] |= config_of(path)
    results, _, _ = engine.evaluate(config, path)
    return {name: round(100 * results[metric], 2) for name, metric in metrics.items()}


def config_of(path: Path) -> dict:
    """Return a config's ``model`` of what a file holds."""
    from foveate.zoo.checkpoint import open_checkpoint

    card = open_checkpoint(path).card
    return {key: card[key] for key in ("head", "backbone", "kwargs")}


def write_row(name: str, path: Path, data: str, head: str | None, measured: dict[str, float]) -> None:
    """Write the row of a file into the table of weights, in the place of the one before, else first."""
    import datetime

    from foveate.zoo.weights import sha256_of

    task = MODELS[name][0].partition("/")[0]
    row = {"task": task, **({"head": head} if head else {}), "data": data, "stated": {}, "license": "mit"}
    row |= {"page": PAGES[data], "note": NOTES[data]}
    row["checked"] = {"date": datetime.date.today().isoformat(), "by": "foveate", "measured": measured}
    source = {"kind": "package", "state": "shipped", "file": path.name, "size": path.stat().st_size}
    source["sha256"] = sha256_of(path)
    lines = f' "{name}": {json.dumps(row)[:-1]}, "sources": [\n  {json.dumps(source)}\n ]}},\n'
    text = TABLE.read_text(encoding="utf-8")
    before = re.search(rf' "{re.escape(name)}": .*?\n \]\}},\n', text, re.DOTALL)
    start, end = before.span() if before else (2, 2)
    TABLE.write_text(text[:start] + lines + text[end:], encoding="utf-8")


def write_card(name: str, command: str, data: str) -> None:
    """Write a file's card beside it, from its row and what it holds."""
    from foveate.tools.weights.card import Findings, card_of
    from foveate.tools.weights.contents import load_contents
    from foveate.tools.weights.push import usage_of
    from foveate.zoo import weights

    weights.table.cache_clear()
    contents = load_contents(name)
    entry = contents.file.entry
    findings = Findings(measured=entry.checked.measured, data=f"{data}, held out")
    made_by = f"made here by `{command}`, then `python .ci/shipped.py`; {entry.note}"
    text = card_of(contents, findings, entry.license, usage_of(contents, f'"{name}"'), made_by)
    (SHIPPED / f"{name}.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Make the files that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=[*MODELS])
    parser.add_argument("--runs", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    SHIPPED.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.names:
            make(name, args.runs or Path(folder))
    if (total := sum(path.stat().st_size for path in SHIPPED.iterdir())) > MOST:
        sys.exit(f"{SHIPPED} holds {total} bytes, more than {MOST}")


if __name__ == "__main__":
    main()
