"""Parity: a published checkpoint in, the published output out, for every fixture in ``tests/golden``."""

import math
from pathlib import Path

import foveate
import pytest
import timm
import torch

GOLDEN = Path(__file__).parents[1] / "golden"

# Families by folder: the largest difference from the published output, for logits and for dense maps, or each of them.
TOLERANCES = {
    "agent": (2e-5, 2e-5),
    "biformer": (1e-5, 5e-5),
    "inline": (2e-5, 2e-5),
    "litv2": (2e-5, (6e-6, 5e-5, 5e-5, 1.2e-4)),
    "nat": (5e-6, 2e-5),
    "dinat": (5e-6, 2e-5),
    "dinat_s": (5e-6, 2e-5),
    "nat_iso": (5e-6, 2e-5),
    "dat": (1e-5, 3e-4),
    "dat_pp": (2e-5, 3e-4),
    "davit": (5e-5, 1e-4),
    "quadtree": (4e-6, 1e-5),
    "shiftvit": (1.5e-5, 1.5e-5),
    "transnext": (6e-6, 1.5e-5),
    "moh": (4e-5, 4e-5),
    "van": (1e-5, 3e-5),
    "mscan": (1e-5, 6e-5),
    "overlock": (1e-5, 1e-4),
}
# Families whose reference logits are of any scale: tolerances are in units of the output's standard deviation.
RELATIVE = {"biformer", "inline", "litv2", "shiftvit", "transnext", "moh", "van", "mscan", "overlock"}
RELATIVE_MAPS = {"litv2", "shiftvit", "transnext", "van", "mscan", "overlock"}
# Families whose fixtures name options of the constructor.
OPTIONS = {"transnext"}
RECIPES = {"dense": "detection", "det": "detection", "seg": "segmentation", "m2f": "mask2former", "features": None}
RECIPES |= {"extrapolation": "segmentation_extrapolation"}


def fixtures():
    for family in TOLERANCES:
        for path in sorted((GOLDEN / family).glob("*.json")):
            yield pytest.param(f"{family}/{path.stem}", id=path.stem)


def model_name(fixture: str) -> str:
    names = foveate.list_models()
    return max((name for name in names if fixture.startswith(name.removeprefix("foveate_"))), key=len)


@pytest.mark.parametrize("name", fixtures())
def test_published_checkpoint_gives_published_output(name, open_fixture, tmp_path):
    family, stem = name.split("/")
    fixture = open_fixture(name)
    model = model_name(stem)
    parts = stem.removeprefix(model.removeprefix("foveate_")).split("_")
    dense = [part for part in parts if part in RECIPES]
    checkpoint = fixture.checkpoint(tmp_path)
    logits_atol, maps_atol = TOLERANCES[family]
    if family in RELATIVE and not dense:
        logits_atol *= fixture.spec["outputs"]["logits"]["std"]
    with torch.inference_mode():
        if not dense:
            overlay = dict(file=str(checkpoint))
            options = fixture.spec["notes"]["kwargs"] if family in OPTIONS else {}
            net = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()
            fixture.assert_output("logits", net(fixture.input()), logits_atol)
            parameters = sum(parameter.numel() for parameter in net.parameters())
            # Heads for training alone are built on request; statistics are no parameters.
            heads = {key: shape for key, shape in fixture.spec["state"].items() if key.startswith("aux_")}
            left_out = sum(math.prod(shape) for key, shape in heads.items() if "running_" not in key)
            assert parameters + left_out == fixture.spec["notes"].get("params", parameters)
        else:
            # Fixtures near the initial state, whose small streams show every eps, hold the tighter.
            maps_atol = 2e-5 if "eps" in parts else maps_atol
            net = foveate.create_backbone(model, setting=RECIPES[dense[-1]], checkpoint=checkpoint).eval()
            for i, features in enumerate(net(fixture.input())):
                scale = fixture.spec["outputs"][f"stage{i + 1}"]["std"] if family in RELATIVE_MAPS else 1
                atol = maps_atol[i] if isinstance(maps_atol, tuple) else maps_atol
                fixture.assert_output(f"stage{i + 1}", features, atol * scale)
