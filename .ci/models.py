"""The table of models that the site shows: writes docs/models.csv; `python .ci/models.py --check` only compares it.

What is counted from a model is in the table, so that the site needs no models to be built; a test counts some anew.
"""

import csv
import sys
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "docs" / "models.csv"


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


def main(arguments: list[str]) -> None:
    """Write the table, or compare it."""
    import foveate

    rows = []
    for name in foveate.list_models():
        rows.append(count(name))
        print(*rows[-1].values(), flush=True)
    if arguments == ["--check"]:
        with TABLE.open(newline="") as file:
            sys.exit(None if list(csv.DictReader(file)) == rows else f"{TABLE.name} is out of date: run {sys.argv[0]}")
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
