"""The table of published weights: well-formed, found by names, asked by models."""

import json
import socket
import time
from pathlib import Path

import foveate
import pytest
import timm
import torch
from foveate import zoo
from foveate.zoo import CheckpointError, weights
from foveate.zoo.weights import Source, Weights, WeightsError, fetch, find, locate
from timm.models import get_pretrained_cfg, is_model

NAME = "nat_atto.somebody_in1k"


@pytest.mark.parametrize("name", weights.table())
def test_entries_are_well_formed(name):
    entry = weights.table()[name]
    assert name.count(".") == 1
    assert is_model(entry.model) == (entry.task != "other")
    assert entry.task in ("classify", "detect", "segment", "other")
    assert (entry.head is None) == (entry.task == "classify")
    assert entry.license in ("mit", "apache-2.0", "cc-by-sa-3.0", "cc-by-nc-4.0", None)
    assert entry.page.startswith("https://")
    assert entry.sources
    kinds = [weights.KINDS.index(source.kind) for source in entry.sources]
    assert kinds == sorted(kinds), "the most trusted source stands first"
    for value in (*entry.stated.values(), *(entry.checked.measured.values() if entry.checked else ())):
        assert 20 < value < 100
    if entry.checked:
        assert time.strptime(entry.checked.date, "%Y-%m-%d")
        assert entry.checked.by
        assert any(source.sha256 for source in entry.sources), "what was opened has a hash"
    for source in entry.sources:
        assert source.state in weights.STATES
        assert not source.fetchable or bool(source.url) != bool(source.repo)
        assert (source.state == "shipped") == (source.kind == "package")
        direct = source.state in ("shipped", "listed")
        assert direct or source.page, "what needs a browser, or is dead, has a page to visit"
        assert source.file is None or Path(source.file).name == source.file
        assert source.sha256 is None or len(source.sha256) == 64
        assert source.reported is None or time.strptime(source.reported, "%Y-%m-%d"[: len(source.reported) - 2])
        for address in filter(None, (source.url, source.page)):
            assert address.startswith("https://")


def test_no_file_stands_twice_in_the_table():
    addresses = [source.url for entry in weights.table().values() for source in entry.sources if source.url]
    assert len(addresses) == len(set(addresses))


def test_every_tag_of_the_models_is_in_the_table():
    tags = {name for name in timm.list_models(include_tags=True) if name.split(".")[0] in foveate.list_models()}
    tags = {name for name in tags if "." in name and not name.endswith(".untrained")}
    assert tags == {name for name, entry in weights.table().items() if entry.task == "classify"}


def test_nothing_is_advertised_whose_links_are_dead_or_need_a_browser():
    advertised = set(timm.list_models(pretrained=True)) & set(weights.table())
    assert "nat_mini.shi_in1k" in advertised
    for name in advertised:
        assert weights.table()[name].license
        cfg = get_pretrained_cfg(name)
        if weights.table()[name].state == "shipped":
            assert Path(cfg.file).is_file()
            continue
        assert weights.table()[name].state == "listed"
        usable = [source for source in weights.table()[name].sources if source.state == "listed"]
        assert cfg.url in [source.url for source in usable] or cfg.hf_hub_id in [source.repo for source in usable]
    assert not get_pretrained_cfg("biformer_tiny").has_weights


def test_dead_links_name_the_page(home):
    with pytest.raises(CheckpointError) as error:
        timm.create_model("biformer_tiny", pretrained=True)
    message = str(error.value)
    assert "\n" not in message
    for part in ("biformer_tiny.rayleizhu_in1k", "reported dead (2026-03)", "https://github.com/rayleizhu/BiFormer"):
        assert part in message


def test_names_are_found_or_the_nearest_named():
    assert find("nat_mini.shi_in1k") is find("nat_tiny.shi_in1k".replace("tiny", "mini"))
    assert find("biformer_tiny").name == "biformer_tiny.rayleizhu_in1k"
    with pytest.raises(WeightsError, match=r"did you mean 'nat_mini\.shi_in1k'"):
        find("nat_mini.shi_in1")
    with pytest.raises(WeightsError, match="name one of"):
        find("dinat_large")
    with pytest.raises(WeightsError, match=r"no such file; did you mean the weights 'nat_mini\.shi_in1k'"):
        locate("nat_mini.shi_ink")


def test_pretrained_and_checkpoint_ask_the_table(host, home, state, monkeypatch, published):
    entry = published(host.address("missing/file.pth"), host.address("ok/file.pth"))
    monkeypatch.setattr(weights, "table", lambda: {"nat_atto.foveate_digits": entry, NAME: entry})
    model = timm.create_model("nat_atto", pretrained=True)
    assert torch.equal(model.state_dict()["head.fc.weight"], state["head.fc.weight"])
    backbone = foveate.create_backbone("nat_atto", checkpoint=NAME)
    assert torch.equal(backbone.features.model.state_dict()["stem.norm.weight"], state["stem.norm.weight"])
    assert host.count("ok/file.pth") == 1


def test_the_table_is_plain_data():
    rows = json.loads((Path(weights.__file__).parent / "weights.json").read_text())
    assert rows.keys() == weights.table().keys()


@pytest.mark.parametrize("address", ["https://me:secret@[::1/x", "https://me:sec/secret@host/x?key=secret"])
def test_addresses_that_make_no_sense_keep_their_secrets(address, home):
    assert "secret" not in weights.shown(address)
    with pytest.raises(WeightsError) as error:
        weights.locate(f"{address}#sha256=1")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("name", ["http://[::1/x", "a" * 300, "a\0b"])
def test_what_is_no_name_of_a_file_is_one_line(name, home):
    with pytest.raises(WeightsError, match=r"makes no sense as an address|is no name of a file|no such file"):
        weights.locate(name)


def test_without_a_network_nothing_is_tried_again(home, monkeypatch):
    asked = []

    def nobody(host, *_, **__):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    sources = (
        Source("hub", "listed", repo="somebody/something", file="model.safetensors"),
        Source("authors", "listed", url="http://weights.example/file.pth", file="file.pth"),
    )
    with pytest.raises(WeightsError, match=r"no host of the name huggingface\.co; .*weights\.example; visit") as error:
        fetch(Weights(NAME, "classify", "imagenet-1k", sources, "https://example.org/page"))
    assert "model.checkpoint=FILE" in str(error.value)
    with pytest.raises(CheckpointError, match=r"resnet10t: its weights can't be had: no network.*HF_HUB_CACHE"):
        zoo.loading.create_model("resnet10t", pretrained=True)
    assert asked == ["huggingface.co", "weights.example", "huggingface.co"]
