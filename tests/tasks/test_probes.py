"""Probes are the published ones, and stored features are what the model gives."""

import json

import foveate
import numpy as np
import pytest
import timm
import torch
from foveate.tasks import TaskError
from foveate.tasks.features import Encoder, digest_weights, keep_features
from foveate.tasks.probes import (
    EfficientProbe,
    LinearProbe,
    accuracy,
    knn_votes,
    published_recipe,
    quick_recipe,
    train_probes,
)


@pytest.mark.parametrize(("name", "queries", "d_out"), [("ep_q8", 8, 1), ("ep_q12_dout2", 12, 2)])
def test_efficient_probe_is_the_published_one(name, queries, d_out, open_fixture):
    fixture = open_fixture(f"seeing/{name}")
    state = {key: fixture.golden.tensor_for(key, tuple(shape)) for key, shape in fixture.spec["state"].items()}
    state["0.cls_token"] *= 4 * 192**0.5
    probe = foveate.probes.EfficientProbe(192, 10, queries, d_out).eval()
    probe.load_state_dict(state | {"1.num_batches_tracked": torch.tensor(0)})
    x = fixture.input()
    logits, attention = probe(x, return_attention=True)
    fixture.assert_output("pooled", probe.pool(x)[0], 1e-5)
    fixture.assert_output("attention", attention, 1e-5)
    fixture.assert_output("logits", logits, 1e-5)
    assert torch.equal(probe(x), logits)
    # Its own names load as well, within another module too.
    torch.nn.ModuleList([EfficientProbe(192, 10, queries, d_out)]).load_state_dict(
        torch.nn.ModuleList([probe]).state_dict()
    )


def test_queries_that_do_not_fit_are_refused():
    with pytest.raises(TaskError, match=r"100 channels can't be shared out among 32 queries.*fit: 25, 20, 50"):
        EfficientProbe(100, 10)


def test_votes_are_dino_s(open_fixture, golden_folder):
    fixture = open_fixture("seeing/knn")
    data = {key: torch.from_numpy(value) for key, value in np.load(golden_folder / "seeing/knn_data.npz").items()}
    for output in fixture.spec["outputs"]:
        name, k, temperature = output.split(".", 2)
        votes = knn_votes(data["train"], data["train_labels"], data["test"], int(k), float(temperature), 12)
        if name == "votes":
            expected = torch.from_numpy(fixture.samples[f"{output}.value"])
            found = votes.flatten()[torch.from_numpy(fixture.samples[f"{output}.index"])]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        else:
            shares = [100 * accuracy(votes, data["test_labels"], top) for top in (1, min(5, int(k)))]
            fixture.assert_output(output, torch.tensor(shares), 1e-4)


def test_votes_in_chunks_and_of_features_of_any_length(monkeypatch):
    train, features = torch.randn(50, 8), torch.randn(33, 8)
    labels = torch.arange(50) % 4
    votes = knn_votes(train, labels, features, k=5)
    monkeypatch.setattr("foveate.tasks.probes._CHUNK", 100)
    torch.testing.assert_close(knn_votes(3 * train, labels, 0.1 * features, k=5), votes, rtol=1e-5, atol=0)
    assert votes.shape == (33, 4)
    for arguments, reason in (
        ({"k": 51}, "k is 51, but there are 50"),
        ({"temperature": 0}, "temperature is 0"),
        ({"classes": 3}, "labels go up to 3"),
    ):
        with pytest.raises(TaskError, match=reason):
            knn_votes(train, labels, features, **arguments)
    with pytest.raises(TaskError, match=r"\[50, 8\] with 49 labels"):
        knn_votes(train, labels[1:], features)


@pytest.mark.parametrize("recipe", [quick_recipe(epochs=12, batch=50), published_recipe(12, 50, base=10.0)])
def test_attention_finds_what_the_mean_hides(recipe):
    """One patch of sixteen says the class, by a code that a mean of opposite patches takes out."""
    torch.manual_seed(0)
    labels = torch.arange(400) % 2
    tokens = 0.1 * torch.randn(400, 16, 8)
    tokens[:, 0, 0] = tokens[:, 0, 1] = tokens[:, 0, 2] = 6 * labels.float() - 3
    tokens[:, 0, 3] = 8  # where to look
    tokens[:, 1, :3] -= tokens[:, 0, :3]
    features = {"linear": tokens.mean(1), "attentive": tokens}
    probes = {"linear": LinearProbe(8, 2), "attentive": EfficientProbe(8, 2, queries=4)}

    def batches(epoch):
        for indices in torch.randperm(400).split(50):
            yield {name: part[indices] for name, part in features.items()}, labels[indices]

    train_probes(probes, batches, 8, recipe)
    assert not any(probe.training for probe in probes.values())
    with torch.no_grad():
        found = {name: accuracy(probe(features[name]), labels) for name, probe in probes.items()}
    assert found["attentive"] > 0.95 > 0.8 > found["linear"]


ENCODERS = {
    "nat_atto": (64, 128, 4),
    "vit_tiny_patch16_224": (64, 192, 16),
    "resnet10t": (64, 512, 4),
    "deit_tiny_distilled_patch16_224": (64, 192, 16),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_features_are_what_the_classifier_reads(name):
    size, width, count = ENCODERS[name]
    model = timm.create_model(name, num_classes=7, **({"img_size": size} if "patch" in name else {})).eval()
    x = torch.randn(2, 3, size, size)
    pooled, tokens = Encoder(model, name)(x)
    assert tokens.shape == (2, count, width)
    if "distilled" not in name:
        torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    if name == "resnet10t":
        torch.testing.assert_close(tokens.mean(1), pooled)
    prefix = getattr(model, "num_prefix_tokens", 0)
    everything = Encoder(model, name, prefix=True)(x)[1]
    assert torch.equal(everything[:, prefix:], tokens)


class Images(torch.utils.data.Dataset):
    def __init__(self, count=70, broken=None):
        self.count, self.broken, self.read = count, broken, 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read += 1
        if index == self.broken:
            raise TaskError("image 50 is broken")
        return torch.full((3, 32, 32), index / self.count), index % 3


def test_features_are_kept_and_what_was_interrupted_goes_on(tmp_path):
    model = timm.create_model("resnet10t", num_classes=3).eval()
    encoder, cpu = Encoder(model, "resnet10t"), torch.device("cpu")
    arguments = ({"model": "resnet10t"}, tmp_path, cpu)
    with pytest.raises(TaskError, match="image 50"):
        keep_features(encoder, Images(broken=50), *arguments, batch_size=4, workers=2)
    images, seen = Images(), []
    first = keep_features(encoder, images, *arguments, batch_size=4, progress=lambda done, total: seen.append(done))
    assert images.read == 70 - 32
    assert seen[0] == 36
    assert seen[-1] == 70
    assert first.labels.tolist() == [index % 3 for index in range(70)]
    pooled, tokens = encoder(torch.stack([image for image, _ in map(Images().__getitem__, range(70))]))
    torch.testing.assert_close(torch.from_numpy(first.pooled.copy()), pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(first.tokens.copy()), tokens, rtol=1e-4, atol=1e-5)
    # All there: neither images nor model are needed, for the pooled features alone either.
    again = Images(broken=0)
    for with_tokens in (True, False):
        found = keep_features(encoder, again, *arguments, with_tokens=with_tokens)
        assert np.array_equal(found.pooled, first.pooled)
    assert again.read == 0
    # Other facts, other features; without tokens they take little room.
    other = keep_features(encoder, images, {"model": "other"}, tmp_path, cpu, with_tokens=False)
    assert other.tokens is None
    assert len({json.loads(file.read_text())["model"] for file in tmp_path.glob("*/facts.json")}) == 2


def test_the_digest_is_of_every_weight():
    model = timm.create_model("resnet10t")
    before = digest_weights(model)
    assert before == digest_weights(model)
    with torch.no_grad():
        model.fc.bias[3] += 1e-3
    assert digest_weights(model) != before


def test_no_number_is_no_feature(tmp_path):
    model = timm.create_model("resnet10t").eval()
    with torch.no_grad():
        model.conv1[0].weight.fill_(float("nan"))
    with pytest.raises(TaskError, match="resnet10t: features hold values that are no numbers"):
        keep_features(Encoder(model, "resnet10t"), Images(), {}, tmp_path, torch.device("cpu"))
