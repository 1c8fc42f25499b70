"""What is registered: names, parameter counts, weight tables."""

import re

import foveate
import pytest
import timm
import torch
from foveate.zoo.backbone import dense_settings_of
from foveate.zoo.states import code_of

# Parameters of the published models, counted on the authors' code.
PARAMETERS = {
    "nat_mini": 19_984_174,
    "nat_tiny": 27_901_582,
    "nat_small": 50_743_297,
    "nat_base": 89_769_652,
    "dinat_mini": 19_984_174,
    "dinat_tiny": 27_901_582,
    "dinat_small": 50_719_681,
    "dinat_base": 89_769_652,
    "dinat_large": 200_943_514,
    "dinat_large_384": 200_943_514,
    "dinat_large_384_11x11": 201_144_250,
    "dinat_s_tiny": 28_288_354,
    "dinat_s_small": 49_606_258,
    "dinat_s_base": 87_768_224,
    "dinat_s_large": 196_532_476,
    "dinat_s_large_384": 196_532_476,
    "nat_isotropic_small": 21_999_736,
    "dinat_isotropic_small": 21_999_736,
    "vitrpb_small": 22_080_376,
    "nat_isotropic_base": 86_465_800,
    "dinat_isotropic_base": 86_465_800,
    "vitrpb_base": 86_627_080,
}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_is_the_published_one(name):
    with torch.device("meta"):
        assert count(timm.create_model(name)) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "recipe", "parameters"),
    [
        ("nat_mini", "detection", 19_472_070),
        ("dinat_s_tiny", "detection", 27_520_698),
        ("dinat_large", "mask2former", 199_609_938),
    ],
)
def test_dense_parameter_count_is_the_published_one(name, recipe, parameters):
    with torch.device("meta"):
        assert count(foveate.create_backbone(name, setting=recipe)) == parameters


def test_atto_is_well_under_a_million():
    assert count(timm.create_model("nat_atto")) < 700_000


def test_no_name_of_timm_is_taken():
    """Registering an existing name overwrites it; the list before our import is read from a fresh interpreter."""
    import subprocess
    import sys

    code = "import timm; print(' '.join(timm.list_models()), ' '.join(timm.list_modules()))"
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(theirs) & set(foveate.list_models())


def test_list_models_takes_a_glob():
    assert foveate.list_models("dinat_s_*") == [
        "dinat_s_base",
        "dinat_s_large",
        "dinat_s_large_384",
        "dinat_s_small",
        "dinat_s_tiny",
    ]
    assert foveate.list_models("nothing*") == []


@pytest.mark.parametrize("name", foveate.list_models())
def test_weight_table_is_complete(name):
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.classifier
    assert cfg.first_conv
    assert cfg.license or not cfg.has_weights, "weights of unknown license are not offered"
    if cfg.url:
        assert re.fullmatch(r"https://\S+/[\w.-]+\.(pth|pt|bin|safetensors)", cfg.url)
        assert cfg.origin_url
        assert cfg.paper_ids


def test_dilations_of_the_recipes_are_the_published_ones():
    assert dense_settings_of("dinat_tiny")["detection"]["dilations"] == [
        [1, 28, 1],
        [1, 7, 1, 14],
        [1, 3, 1, 5, 1, 7] * 3,
        [1, 3, 1, 3, 1],
    ]
    assert dense_settings_of("dinat_large")["segmentation"]["dilations"] == [
        [1, 20, 1],
        [1, 5, 1, 10],
        [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5],
        [1, 2, 1, 2, 1],
    ]
    assert dense_settings_of("dinat_large")["mask2former"]["dilations"] == [
        [1, 14, 1],
        [1, 4, 1, 7],
        [1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 3],
        [1, 1, 1, 1, 1],
    ]
    assert dense_settings_of("dinat_s_tiny")["detection"]["dilations"] == [[1, 28], [1, 14], [1, 3, 1, 5, 1, 7], [1, 3]]


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'nat_tiny'"):
        foveate.create_backbone("nat_tinny")
    with pytest.raises(ValueError, match="nat_tiny has no setting 'detect'; it has 'detection', 'segmentation'"):
        foveate.create_backbone("nat_tiny", setting="detect")
    with pytest.raises(ValueError, match="resnet18 has no setting 'detection'; it has none"):
        foveate.create_backbone("resnet18", setting="detection")


def test_backbone_of_timms_own():
    backbone = foveate.create_backbone("resnet18", out_indices=(1, 2, 3, 4)).eval()
    maps = backbone(torch.zeros(1, 3, 64, 96))
    assert [m.shape[1] for m in maps] == backbone.channels == [64, 128, 256, 512]
    assert backbone.reductions == [4, 8, 16, 32]


def test_a_models_relative_is_of_its_own_file_and_compared():
    """What is said of a model's code is said of another one's outputs only where the code is the same."""
    for name in foveate.list_models():
        code = code_of(name)
        if code not in ("own", "paper", "ours"):
            assert code_of(code) == "own"
            assert timm.models.model_entrypoint(code).__module__ == timm.models.model_entrypoint(name).__module__
