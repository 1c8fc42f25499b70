"""DINO: mmdet's outputs, rules and losses, and what data really holds."""

import foveate
import pytest
import torch
from foveate.tasks.dense.detect.checkpoint import renamed
from torch import nn


class StubBackbone(nn.Module):
    channels = (8, 12, 16, 24)


def of_fixture(fixture):
    """The detector whose transformer and heads a fixture has; its neck passes on."""
    notes = fixture.spec["notes"]
    state = {renamed(key, 0).removeprefix("head."): value for key, value in fixture.state().items()}
    options = {name: notes["positional_encoding"][name] for name in ("temperature", "offset")}
    model = foveate.create_detector(
        "dino",
        StubBackbone(),
        num_queries=notes["num_queries"],
        num_levels=notes["num_levels"],
        max_detections=notes["max_per_img"],
        **options,
    )
    model.head.load_state_dict(state)
    model.neck = nn.Identity()
    return model


@pytest.mark.parametrize("name", ["dino_maps", "dino_maps_padded"])
@torch.no_grad()
def test_published_outputs_from_maps(name, open_fixture):
    fixture = open_fixture(f"dino/{name}")
    model = of_fixture(fixture).eval()
    head, maps, metas = model.head, fixture.levels(), fixture.spec["inputs"]["metas"]
    image_sizes = [tuple(meta["img_shape"]) for meta in metas]
    originals = [tuple(meta["ori_shape"]) for meta in metas]
    stages = {}
    for part in ("encode", "propose", "decode"):
        stages[part] = record(head, part)
    detections = model.predict_from_features(maps, image_sizes, originals)
    (memory,), (proposals,) = stages["encode"], stages["propose"]
    fixture.assert_output("memory", memory, 2e-5)
    fixture.assert_output("topk_index", proposals.index, 0)
    fixture.assert_output("topk_score", proposals.logits.amax(-1), 2e-5)
    fixture.assert_output("topk_box", proposals.boxes.sigmoid(), 5e-6)
    ((hidden, references),) = stages["decode"]
    found = head(maps, image_sizes, model.transform.canvas(image_sizes))
    for layer in range(6):
        fixture.assert_output(f"hidden{layer}", hidden[layer], 1e-4)
        fixture.assert_output(f"cls{layer}", found.logits[layer], 1e-4)
        fixture.assert_output(f"box{layer}", found.boxes[layer], 2e-5)
    for layer in range(7):
        fixture.assert_output(f"reference{layer}", references[layer], 2e-5)
    for image, detection in enumerate(detections):
        fixture.assert_output(f"det_labels{image}", detection["labels"], 0)
        fixture.assert_output(f"det_scores{image}", detection["scores"], 1e-5)
        fixture.assert_output(f"det_boxes{image}", detection["boxes"], 1e-2)


def record(module: nn.Module, method: str) -> list:
    """Let a method note what it returns."""
    results, run = [], getattr(module, method)

    def recorded(*args):
        results.append(run(*args))
        return results[-1]

    setattr(module, method, recorded)
    return results
