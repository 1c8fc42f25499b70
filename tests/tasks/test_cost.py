"""What a forward pass is said to cost."""

import pytest
import timm
import torch
from foveate.tasks.cost import count_macs, peak_memory


def test_multiply_adds_of_a_convolution_net():
    """resnet18 at 224 has 1.82 GMACs, as timm states."""
    with torch.device("meta"):
        model = timm.create_model("resnet18").eval()
    assert count_macs(model, (3, 224, 224)) == pytest.approx(1.82e9, rel=0.01)


def test_memory_grows_with_the_pixels_and_leaves_the_weights_out():
    small, large = (peak_memory("foveate_host_atto", 1, size, "cpu", attention="window") for size in (128, 512))
    image = torch.empty(3, 512, 512).nbytes
    weights = sum(parameter.nbytes for parameter in timm.create_model("foveate_host_tiny").parameters())
    assert small < large
    assert image < large < weights + 100 * image


def test_a_training_step_keeps_what_inference_frees():
    inference, training = (
        peak_memory("foveate_host_atto", 2, 256, "cpu", train=train, attention="window") for train in (False, True)
    )
    assert training > 2 * inference
