"""ShiftViT beyond its published outputs: sizes, what is not finite, initial values."""

import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor

SMALL = dict(embed_dim=24, depths=(1, 1, 1, 1), num_classes=5)


@pytest.mark.parametrize("size", [(3, 40), (28, 28), (31, 64)])
def test_images_too_small_for_the_last_patch_are_one_line(size):
    model = timm.create_model("shiftvit_light_tiny", **SMALL).eval()
    with pytest.raises(ValueError, match="the image is too small: a map of"):
        model(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("size", [(32, 32), (37, 51), (32, 95)])
def test_rows_and_columns_left_over_do_not_count(size):
    torch.manual_seed(0)
    model = timm.create_model("shiftvit_light_tiny", **SMALL).eval()
    images = torch.randn(2, 3, *size)
    height, width = (side // 4 * 4 for side in size)
    with torch.no_grad():
        logits = model(images)
        torch.testing.assert_close(model(images[..., :height, :width]), logits)
    assert logits.isfinite().all()


def test_an_image_that_holds_no_numbers_spoils_no_other():
    torch.manual_seed(0)
    model = timm.create_model("shiftvit_light_tiny", **SMALL).eval()
    images = torch.randn(2, 3, 64, 64)
    spoilt = images.clone()
    spoilt[0, 0, 3, 5] = float("nan")
    with torch.no_grad():
        logits = model(spoilt)
        torch.testing.assert_close(logits[1], model(images)[1])
    assert logits[0].isnan().all()  # the norm is over the whole map


def test_a_graph_traced_without_gradients_has_them():
    torch.manual_seed(0)
    model = timm.create_model("shiftvit_light_tiny", **SMALL).eval()
    images = torch.randn(2, 3, 32, 64, requires_grad=True)
    with torch.no_grad():
        graph = create_feature_extractor(model, ["head"])
        torch.testing.assert_close(graph(images)["head"], model(images))
    gradients = [
        torch.autograd.grad(net(images).square().sum(), images)[0] for net in (model, lambda x: graph(x)["head"])
    ]
    torch.testing.assert_close(gradients[1], gradients[0])
