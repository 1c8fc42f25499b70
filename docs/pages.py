"""Pages that mkdocs makes from tables: each family of models, the list of all, and what packages export.

The tables are docs/models.csv (`python .ci/models.py` writes it), zoo/weights.json and the recipes.
"""

import ast
import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# How a family is called, and what nobody else runs of it; in the order in which they are shown.
FAMILIES = {
    "nat": ("NAT, DiNAT", "with the position bias of the published files, on CPUs too"),
    "biformer": ("BiFormer", "its links are dead; dense forms at any size"),
    "dat": ("DAT, DAT++", "any size, without mmcv"),
    "quadtree": ("QuadTree", "without a CUDA build; cross attention as a block"),
    "dual": ("DaViT", "the authors' dense files; huge and giant"),
    "agent": ("Agent Attention", "on DeiT, PVT, Swin and CSWin, at any size"),
    "inline": ("InLine", "on the same hosts"),
    "transnext": ("TransNeXt, MoH", "without its CUDA operator"),
    "overlock": ("OverLoCK", "without the operators that NATTEN removed, on CPUs too"),
    "van": ("VAN, MSCAN", "with SegNeXt's heads, in four libraries' names"),
    "shiftvit": ("ShiftViT", "at home nowhere else"),
    "litv2": ("LITv2", "without a compiled deformable convolution"),
    "ela": ("ELA", "on ResNet and MobileNetV2"),
    "gated": ("Gated ResNet-50", "CBAM, triplet attention, PSA, DAS, ULSAM after their papers"),
    "host": ("Neutral host", "every attention in the same network"),
}
_PACKAGES = {"blocks": "Blocks", "kernels": "Kernels"}
_STATES = {
    "shipped": "in the package",
    "listed": "a direct link",
    "derived": "a direct link, made from a page",
    "browser": "by hand: a page for people",
    "dead": "dead",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    from foveate.zoo.weights import table

    models, weights = _models(), table()
    files.append(File.generated(config, "models/index.md", content=_index(models, weights)))
    for family in FAMILIES:
        rows = [row for row in models if row["family"] == family]
        files.append(File.generated(config, f"models/{family}.md", content=_family(family, rows, weights)))
    for package, title in _PACKAGES.items():
        files.append(File.generated(config, f"reference/{package}.md", content=_reference(package, title)))
    return files


def _reference(package: str, title: str) -> str:
    """Return the reference of all that a package exports."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    parts = [f"# {title}", ast.get_docstring(tree)]
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    for node in sorted(imports, key=lambda node: node.lineno):
        # By the module it comes from: a function's name may be its module's too.
        parts += [f"::: foveate.{package}.{node.module}.{alias.name}" for alias in node.names]
    return "\n\n".join(parts) + "\n"


def _models() -> list[dict[str, str]]:
    with (ROOT / "docs" / "models.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    if unknown := {row["family"] for row in rows} - set(FAMILIES):
        raise ValueError(f"docs/pages.py doesn't name the families {sorted(unknown)}")
    return rows


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _docstring(family: str) -> str:
    """Return what a family's source says of it, as markdown."""
    text = ast.get_docstring(ast.parse((ROOT / "zoo" / f"{family}.py").read_text()))
    title, _, rest = text.partition("\n\n")
    paragraphs = [" ".join(title.split()), *(_paragraph(part) for part in rest.split("\n\n"))]
    text = "\n\n".join(paragraphs).replace("``", "`")
    text = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    return re.sub(r"(?<![/\w(])(github\.com/[\w./-]*\w)", r"[\1](https://\1)", text)


def _paragraph(text: str) -> str:
    """Return a paragraph with its indented lists as markdown's."""
    lines = [re.sub(r"^ {4}(?=\* )", "", line) for line in text.splitlines()]
    for number in range(len(lines) - 1, 0, -1):
        if lines[number].startswith("* ") and not lines[number - 1].startswith(("* ", "  ")):
            lines.insert(number, "")
    return "\n".join(lines)


def _files_of(model: str, weights: dict) -> dict:
    return {name: entry for name, entry in weights.items() if entry.model == model}


def _where(model: str, weights: dict) -> str:
    """Return where a classifier's weights are."""
    files = [entry for entry in _files_of(model, weights).values() if entry.task == "classify"]
    best = min(files, key=lambda entry: [*_STATES].index(entry.state), default=None)
    if best is None:
        return "none"
    return f"by hand: [page]({best.page})" if best.state == "browser" else _STATES[best.state]


def _stated(entry: Any) -> str:
    return ", ".join(f"{metric} {value}" for metric, value in entry.stated.items()) or "-"


def _index(models: list[dict[str, str]], weights: dict) -> str:
    from foveate.zoo.states import code_word, family_state

    families = []
    for family, (title, what) in FAMILIES.items():
        rows = [row for row in models if row["family"] == family]
        sizes = [float(row["parameters (M)"]) for row in rows]
        span = f"{min(sizes):.0f} to {max(sizes):.0f}" if round(min(sizes)) != round(max(sizes)) else f"{sizes[0]:.0f}"
        states = family_state([row["model"] for row in rows])
        families.append((f"[{title}]({family}.md)", str(len(rows)), span, what, *states))
    folded = []
    for family, (title, _) in FAMILIES.items():
        rows = [row for row in models if row["family"] == family]
        every = [
            (f"`{row['model']}`", *list(row.values())[2:], code_word(row["model"]), _where(row["model"], weights))
            for row in rows
        ]
        table = _table(("model", *list(models[0])[2:], "code", "weights"), every)
        folded.append(f"<details markdown>\n<summary>{title}: {len(rows)}</summary>\n\n{table}\n\n</details>")
    lines = "\n\n".join(folded)
    return f"""# Models

All of them are timm's: `timm.create_model(NAME, features_only=True)`, `num_classes=`, `in_chans=` and the rest work as
for timm's own. `foveate info NAME` says what is on these pages for one model.

{_table(("family", "models", "parameters (M)", "here", "outputs compared with", "files opened"), families)}

Code is what a model's outputs were compared with: *compared* with those of its authors' code, under weights that are
rebuilt from names and shapes; *as* another model, of the same code, whose outputs were. No published file could be
opened where this was made, so that no accuracy is measured by us but of the package's own files; they are the papers'.

## All models

{lines}

Parameters in millions with the classifier; multiply-adds in billions at the input size, as executed on the CPU.
"""


def _family(family: str, rows: list[dict[str, str]], weights: dict) -> str:
    from foveate.zoo.states import code_word

    title, _ = FAMILIES[family]
    parts = [f"# {title}", _picture(family), _docstring(family), "## Models"]
    models = []
    for row in rows:
        files = [entry for entry in _files_of(row["model"], weights).values() if entry.task == "classify"]
        stated = next((entry.stated["top-1"] for entry in files if "top-1" in entry.stated), "-")
        code = code_word(row["model"])
        models.append((f"`{row['model']}`", *list(row.values())[2:], str(stated), code))
    parts.append(_table(("model", *list(rows[0])[2:], "top-1, the paper's", "code"), models))
    parts += ["## Speed", _speed([row["model"] for row in rows])]
    files = [(name, entry) for row in rows for name, entry in _files_of(row["model"], weights).items()]
    if files:
        parts += ["## Weights", _weights(files)]
    if recipes := _recipes([row["model"] for row in rows]):
        parts += ["## Recipes", "\n".join(f"* `foveate train {name}`" for name in recipes)]
    return "\n\n".join(parts) + "\n"


def _picture(family: str) -> str:
    """Return the picture of a family's attention, which .ci/pictures.py draws, or that there is none."""
    model, name = _drawn()[family], f"attend_{family}.webp"
    command = f"foveate attend PHOTO --model {model} --untrained --at 300,250"
    if not (ROOT / "docs" / "images" / name).exists():
        return f"*No picture: `{command}` says that nothing in it attends.*"
    what = f"What one query of {model} may use in each stage, drawn on a photo"
    return f"![{what}](../images/{name})\n\n*{what}: `{command}`, random weights.*"


def _drawn() -> dict[str, str]:
    """Return which model of each family is drawn."""
    tree = ast.parse((ROOT / ".ci" / "pictures.py").read_text())
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    return next(ast.literal_eval(node.value) for node in assigned if node.targets[0].id == "MODELS")


def _speed(models: list[str]) -> str:
    """Return what docs/speed.md measured of some models, beside timm's Swin-T; nothing else is said."""
    table = (ROOT / "docs" / "speed.md").read_text().split("<!-- speed -->")[1]
    measured = [line.strip("| ").split(" | ") for line in table.strip().splitlines()]
    rows = [(f"`{name}`", *numbers) for name, *numbers in measured if name in models]
    if not rows:
        return "Not measured. `foveate bench models NAME` measures it on your machine."
    header = ("model", "images/s", "multiply-adds per second", "time over its own floor", "training steps")
    return (
        f"{_table(header, rows)}\n\nOurs, over timm's `swin_tiny_patch4_window7_224` in the same run of `foveate bench "
        "models`: two cores of an AMD EPYC with AVX-512, 224 pixels, batch 4, float32; the floor is the model's own "
        "linear and convolution layers alone. [Speed](../speed.md) says what of it is the library's, and more."
    )


def _weights(files: list[tuple[str, Any]]) -> str:
    from foveate.zoo.states import file_state

    rows = []
    for name, entry in files:
        where = f"[{_STATES[entry.state]}]({entry.page})"
        state = file_state(entry)
        rows.append((f"`{name}`", entry.data, _stated(entry), entry.license or "not stated", where, state))
    return (
        _table(("file", "data", "the authors' numbers", "license", "where", "state"), rows)
        + "\n\n`foveate weights fetch NAME` brings one, `foveate weights verify FILE` reads it strictly. Links are as "
        "they were last reported; [what you found in a file](../weights.md#tell-what-you-found) can stand here."
    )


def _recipes(models: list[str]) -> list[str]:
    from foveate.configs import recipes_of_model

    return sorted({recipe for model in models for recipe in recipes_of_model(model)})
