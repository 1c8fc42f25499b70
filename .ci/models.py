"""What is counted from the models: writes docs/models.csv, which the site shows, zoo/shapes.csv, by which
`zoo.variants` knows a file's model, and zoo/states.csv, what each model's code was compared with;
`python .ci/models.py --check` only compares them. README's table of families is written from the same, and its table of
speeds from docs/speed.md.

So neither needs all models to be built; tests count some anew.
"""

import ast
import csv
import functools
import re
import sys
from pathlib import Path

_SIZES = re.compile("mini|micro|tiny|small|medium|base|large|huge|giant|[0-9]{3}")
# Models whose names don't tell of which code they are.
_RELATIVES = {"dat_p_tiny": "dat_pp_tiny", "dinat_isotropic": "nat_isotropic_small"}
# What README's tables stand between.
FAMILIES, SPEED = "<!-- families -->", "<!-- speed -->"
ROOT = Path(__file__).resolve().parents[1]


def count(name: str) -> dict[str, str]:
    """Return a model's row: its family, millions of parameters, GMACs at its own input size, and that size."""
    import timm
    import torch
    from foveate.tasks.cost import count_macs
    from timm.models import get_pretrained_cfg

    size = get_pretrained_cfg(name).input_size
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    macs = count_macs(model, size) / 1e9
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "family": _family(name),
        "model": name,
        "parameters (M)": f"{parameters / 1e6:.2f}",
        "GMACs": f"{macs:.2f}" if macs > 0.1 else f"{macs:.4f}",
        "input": str(size[-1]),
    }


def _family(name: str) -> str:
    from timm.models import model_entrypoint

    return model_entrypoint(name).__module__.rpartition(".")[2]


def group(name: str) -> dict[str, str]:
    """Return a model's row of how many entries have shapes of each group."""
    from foveate.zoo.variants import groups_of, shapes_of

    return {"model": name, "entries by group": " ".join(map(str, groups_of(shapes_of(name))))}


def state(name: str) -> dict[str, str]:
    """Return a model's row of what its code was compared with, see `zoo.states.code_of`."""
    return {"model": name, "code": _code(name)}


def _code(name: str) -> str:
    family = _family(name)
    if name == "nat_atto" or family == "host":
        return "ours"
    if family == "gated":
        return "paper"
    recorded = _recorded()
    if name in recorded:
        return "own"
    named = next((other for start, other in _RELATIVES.items() if name.startswith(start)), None)
    relatives = sorted(other for other in recorded if _family(other) == family)
    return named or max(relatives, key=lambda other: _kinship(_bare(name), _bare(other)))


def _kinship(name: str, other: str) -> tuple[float, int]:
    """Return how much two names share, sizes left out, and how far they begin alike."""
    words, others = ({word for word in text.split("_") if not _SIZES.fullmatch(word)} for text in (name, other))
    alike = next((place for place, (a, b) in enumerate(zip(name, other, strict=False)) if a != b), len(name))
    return len(words & others) / len(words | others), alike


def _bare(name: str) -> str:
    return name.removeprefix("foveate_")


@functools.cache
def _recorded() -> set[str]:
    """Return the models of which outputs of the authors' code are recorded."""
    import foveate

    names = foveate.list_models()
    recorded = set()
    for path in (ROOT / "tests" / "golden").glob("*/*.npz"):
        stem = path.stem.replace("mobilenetv2_ela_l", "ela_l_mobilenetv2")
        fitting = [name for name in names if f"{stem}_".startswith(f"{_bare(name)}_")]
        recorded |= {max(fitting, key=len)} if fitting else set()
    return recorded


TABLES = {
    ROOT / "docs" / "models.csv": count,
    ROOT / "zoo" / "shapes.csv": group,
    ROOT / "zoo" / "states.csv": state,
}


def render() -> dict[str, str]:
    """Return README's tables, by what they stand between."""
    return {FAMILIES: _families(), SPEED: (ROOT / "docs" / "speed.md").read_text().split(SPEED)[1].strip()}


def _families() -> str:
    from foveate.zoo.states import family_state

    tree = ast.parse((ROOT / "docs" / "pages.py").read_text())
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    families = next(ast.literal_eval(node.value) for node in assigned if node.targets[0].id == "FAMILIES")
    with (ROOT / "docs" / "models.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = ["| family | here, and hardly anywhere else | outputs compared with | files opened and measured |"]
    lines.append("| --- | --- | --- | --- |")
    for family, (title, what) in families.items():
        states = family_state([row["model"] for row in rows if row["family"] == family])
        lines.append(f"| {title} | {what} | {' | '.join(states)} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Write the tables, or compare them."""
    import foveate

    rows = {path: [] for path in TABLES}
    for name in foveate.list_models():
        for path, function in TABLES.items():
            rows[path].append(function(name))
        print(*rows[next(iter(TABLES))][-1].values(), flush=True)
    for path, new in rows.items():
        if arguments == ["--check"]:
            with path.open(newline="") as file:
                if list(csv.DictReader(file)) != new:
                    sys.exit(f"{path.name} is out of date: run {sys.argv[0]}")
            continue
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, new[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(new)
    readme = ROOT / "README.md"
    for mark, new in render().items():
        before, table, after = readme.read_text().split(mark)
        if arguments != ["--check"]:
            readme.write_text(f"{before}{mark}\n{new}\n{mark}{after}")
        elif table.strip() != new:
            sys.exit(f"README's table at {mark} is out of date: run {sys.argv[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
