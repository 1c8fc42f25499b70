"""create_backbone on timm's own models: four NCHW maps, images of any size."""

import foveate
import pytest
import torch


@pytest.mark.parametrize(
    "name",
    ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "davit_tiny", "nat_atto"],
)
def test_maps_are_nchw_and_images_of_any_size(name):
    backbone = foveate.create_backbone(name, out_indices=(-4, -3, -2, -1)).eval()
    with torch.inference_mode():
        maps = backbone(torch.randn(1, 3, 96, 160))
    assert backbone.reductions == [4, 8, 16, 32]
    assert [tuple(level.shape) for level in maps] == [
        (1, channels, 96 // stride, 160 // stride)
        for channels, stride in zip(backbone.channels, backbone.reductions, strict=True)
    ]


def test_a_chosen_size_stays():
    backbone = foveate.create_backbone("swin_tiny_patch4_window7_224", img_size=(64, 96))
    with pytest.raises(AssertionError, match="doesn't match model"):
        backbone(torch.randn(1, 3, 96, 96))
