"""create_backbone on timm's own models: maps measured at construction, images of any size, true strides."""

import foveate
import pytest
import torch
from foveate.zoo.backbone import Backbone
from foveate.zoo.maps import Maps, dense_indices, measure
from torch import nn


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


@pytest.mark.parametrize(
    ("name", "strides", "multiple", "size", "borderless"),
    [
        ("vit_tiny_patch16_224", [16] * 4, 16, None, False),
        ("vit_small_patch14_dinov2", [16] * 4, 14, None, False),
        ("convmixer_768_32", [8] * 4, 1, None, False),  # patches of 7 pixels
        pytest.param("maxvit_pico_rw_256", [4, 8, 16, 32], 256, None, False, marks=pytest.mark.heavy),  # windows
        ("halonet26t", [4, 8, 16, 32], 256, None, False),  # blocks of 8 cells
        ("hiera_tiny_224", [4, 8, 16, 32], 1, (224, 224), False),
        pytest.param("mvitv2_tiny", [4, 8, 16, 32], 1, None, False, marks=pytest.mark.heavy),
        pytest.param("twins_svt_small", [4, 8, 16, 32], 1, None, False, marks=pytest.mark.heavy),
        ("shvit_s1", [16, 32], 1, None, False),
        pytest.param("volo_d1_224", [8, 16], 1, (224, 224), False, marks=pytest.mark.heavy),
        pytest.param("selecsls42", [4, 8, 16, 32], 1, None, False, marks=pytest.mark.heavy),  # which has a coarser one
        pytest.param("dla46x_c", [4, 8, 16, 32], 32, None, False, marks=pytest.mark.heavy),
        ("legacy_xception", [4, 8, 16, 32], 1, None, True),
    ],
)
def test_what_models_give_is_measured(name, strides, multiple, size, borderless):
    """Without weights: the model is only built on the meta device."""
    _, maps = measure(name, {})
    chosen = maps.take(dense_indices(maps))
    resampled = Backbone(_Features([]), chosen, resample=True).reductions
    assert resampled == strides
    assert (maps.multiple, maps.size, maps.borderless) == (multiple, size, borderless)


@pytest.mark.heavy
def test_maps_that_a_size_would_scramble_are_not_taken():
    """ViTamin's tokens of an odd size become maps of other channels, without an error."""
    assert measure("vitamin_small_224", {})[1].multiple == 16


@pytest.mark.parametrize(
    ("name", "sides"), [("vit_tiny_patch16_224", (7, 9)), ("dla46x_c", (25, 36)), ("hiera_tiny_224", (25, 36))]
)
def test_images_are_padded_to_what_the_model_takes(name, sides):
    backbone = foveate.create_backbone(name, out_indices=None).eval()
    image = torch.randn(1, 3, 97, 143)
    with torch.inference_mode():
        maps = backbone(image)
        height, width = backbone.size or [-(-side // backbone.multiple) * backbone.multiple for side in (97, 143)]
        padded = backbone.features(torch.nn.functional.pad(image, (0, width - 143, 0, height - 97)))
    rows, columns = sides
    assert maps[0].shape[-2:] == (rows, columns)
    torch.testing.assert_close(maps[0], padded[0][..., :rows, :columns])


class _Features(nn.Module):
    """Maps that hold the coordinates of their cells' centres in pixels."""

    def __init__(self, strides):
        super().__init__()
        self.strides = strides

    def forward(self, x):
        grids = []
        for stride in self.strides:
            rows, columns = (torch.arange(side // stride) * stride + (stride - 1) / 2 for side in x.shape[-2:])
            grids.append(torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None])
        return grids


@pytest.mark.parametrize(("stride", "wanted"), [(14, 16), (7, 8), (28, 32), (12, 16)])
@pytest.mark.parametrize("size", [(96, 160), (97, 143), (168, 337), (113, 224)])
def test_resampled_maps_lie_where_their_stride_says(stride, wanted, size):
    backbone = Backbone(_Features([stride]), Maps((0,), (2,), (stride,), False, stride), resample=True)
    assert backbone.reductions == [wanted]
    (level,) = backbone(torch.zeros(1, 3, *size))
    assert level.shape[-2:] == tuple(-(-side // wanted) for side in size)
    for axis in (0, 1):
        seen = level[0, axis].select(1 - axis, 0)
        centres = torch.arange(len(seen)) * wanted + (wanted - 1) / 2
        # Cells whose centre lies between the first and the last of the map's own; beyond, the border repeats.
        inside = (centres >= (stride - 1) / 2) & (centres <= size[axis] - stride)
        torch.testing.assert_close(seen[inside], centres[inside])
        assert inside.sum() >= len(seen) - 2


def test_borders_that_unpadded_convolutions_left_out_come_back():
    backbone = foveate.create_backbone("legacy_xception", out_indices=None).eval()
    with torch.inference_mode():
        maps = backbone(torch.randn(1, 3, 128, 160))
    assert [tuple(level.shape[-2:]) for level in maps] == [(32, 40), (16, 20), (8, 10), (4, 5)]


def test_a_chosen_size_stays():
    backbone = foveate.create_backbone("swin_tiny_patch4_window7_224", img_size=(64, 96))
    assert backbone.size == (64, 96)
    with pytest.raises(foveate.zoo.BackboneError, match=r"up to 64x96 pixels, got 96x96; .* img_size=\(96, 96\)"):
        backbone(torch.randn(1, 3, 96, 96))


def test_a_chosen_size_is_measured_anew():
    assert foveate.create_backbone("hiera_tiny_224", img_size=(128, 160)).size == (128, 160)


def test_what_gives_no_maps_is_refused():
    with pytest.raises(foveate.zoo.BackboneError, match=r"maps are 1/12, 17\.14; dense heads need strides of whole"):
        foveate.create_backbone("crossvit_tiny_240", out_indices=None)
    with pytest.raises(foveate.zoo.BackboneError, match="there is no map 12; there are 0, 1, 2"):
        foveate.create_backbone("vit_tiny_patch16_224", out_indices=(12,))


def test_measuring_draws_nothing():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    measure("test_resnet", {"drop_path_rate": 0.1})
    measure("sequencer2d_s", {})  # on the CPU
    torch.testing.assert_close(torch.randn(3), expected)
