"""What is counted from the models: writes docs/models.csv, which the site shows, and zoo/shapes.csv, by which
`zoo.variants` knows a file's model; `python .ci/models.py --check` only compares them.

So neither needs all models to be built; tests count some anew.
"""

import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def count(name: str) -> dict[str, str]:
    """Return a model's row: its family, millions of parameters, GMACs at its own input size, and that size."""
    import timm
    import torch
    from foveate.tasks.cost import count_macs
    from timm.models import get_pretrained_cfg
    from timm.models._registry import _model_to_module

    size = get_pretrained_cfg(name).input_size
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    macs = count_macs(model, size) / 1e9
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "family": _model_to_module[name].rpartition(".")[2],
        "model": name,
        "parameters (M)": f"{parameters / 1e6:.2f}",
        "GMACs": f"{macs:.2f}" if macs > 0.1 else f"{macs:.4f}",
        "input": str(size[-1]),
    }


def group(name: str) -> dict[str, str]:
    """Return a model's row of how many entries have shapes of each group."""
    from foveate.zoo.variants import groups_of, shapes_of

    return {"model": name, "entries by group": " ".join(map(str, groups_of(shapes_of(name))))}


TABLES = {ROOT / "docs" / "models.csv": count, ROOT / "zoo" / "shapes.csv": group}


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


if __name__ == "__main__":
    main(sys.argv[1:])
