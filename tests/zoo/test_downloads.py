"""Downloads end in the right file or in a clear error, whatever the host, the network and the disk do."""

import contextlib
import functools
import hashlib
import io
import socket
import urllib.parse
from pathlib import Path

import pytest
import timm
import torch
from foveate.zoo import _download, weights
from foveate.zoo.weights import Source, Weights, WeightsError, fetch, locate

NAME = "nat_atto.somebody_in1k"
GOOD = (
    *("ok", "busy", "slow", "stuck", "truncated", "reset", "no-ranges", "changed", "wrong-range", "refused-range"),
    *("redirect", "no-length", "two-halves", "unsigned-halves", "no-total"),
)


@pytest.fixture
def impatient(monkeypatch):
    """Give up on stuck hosts soon; on a busy machine a good host seems stuck too, so only where one is."""
    monkeypatch.setattr(_download, "TIMEOUT", 2.0)


@pytest.mark.parametrize("path", GOOD)
def test_the_right_file_arrives(path, host, home, payload, request, published, leftovers):
    if path == "stuck":
        request.getfixturevalue("impatient")
    file = fetch(published(host.address(f"{path}/file.pth")))
    assert file == home / NAME / "file.pth"
    assert file.read_bytes() == payload
    assert leftovers() == []


@pytest.mark.parametrize("path", ["stuck", "truncated", "reset"])
def test_what_broke_off_is_continued(path, host, home, payload, request, published):
    if path == "stuck":
        request.getfixturevalue("impatient")
    fetch(published(host.address(f"{path}/file.pth")))
    begins = [int((asked or "bytes=0-")[6:-1]) for _, asked in host.requests]
    # A reset discards what is still on its way.
    assert len(begins) == 2
    assert begins[1] == len(payload) // 2 or (path == "reset" and 0 < begins[1] < len(payload) // 2)


def test_a_new_process_continues_too(host, home, payload, monkeypatch, published):
    address = host.address("truncated/file.pth")
    monkeypatch.setattr(_download, "ATTEMPTS", 1)
    with pytest.raises(WeightsError, match="the connection ends after"):
        fetch(published(address))
    assert not (home / NAME / "file.pth").exists()
    fetch(published(address))
    assert host.requests[-1][1] == f"bytes={len(payload) // 2}-"
    assert (home / NAME / "file.pth").read_bytes() == payload


BAD = {
    "missing": "answers 404",
    "always-truncated": r"ends after 1000 of \d+ bytes, 4 times",
    "no-length-truncated": "truncated, or not a checkpoint",
    "page": "a web page, not",
    "disguised-page": "a web page, not",
}


@pytest.mark.parametrize("path", BAD)
def test_what_fails_is_a_clear_error_and_no_file(path, host, home, published, leftovers):
    with pytest.raises(WeightsError, match=BAD[path]) as error:
        fetch(published(host.address(f"{path}/file.pth")))
    assert "\n" not in str(error.value)
    assert "visit https://example.org/page" in str(error.value)
    assert not (home / NAME / "file.pth").exists()
    if path != "always-truncated":
        assert leftovers() == []


@pytest.mark.parametrize("path", [*BAD, "evil"])
def test_the_next_source_is_tried(path, host, home, payload, published):
    host.evil = b"\x80\x02."
    fetch(published(host.address(f"{path}/file.pth"), host.address("ok/file.pth")))
    assert (home / NAME / "file.pth").read_bytes() == payload


def test_a_host_that_is_not_there_is_an_error(home, published):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(WeightsError, match=r"(?i)refused"):
        fetch(published(f"http://127.0.0.1:{port}/file.pth"))


def test_the_proxy_of_the_environment_is_used(host, home, payload, monkeypatch, published):
    monkeypatch.setenv("http_proxy", host.address(""))
    monkeypatch.setenv("no_proxy", "")
    host_request = host.RequestHandlerClass.do_GET

    def proxied(handler):
        handler.path = handler.path.removeprefix("http://weights.invalid")
        host_request(handler)

    monkeypatch.setattr(host.RequestHandlerClass, "do_GET", proxied)
    assert fetch(published("http://weights.invalid/ok/file.pth")).read_bytes() == payload


def test_an_address_needs_no_file_name(host, home, payload, state):
    for address in ("f/57e0904221824ee7b7af/?dl=1", "ok/file.pth", "ok/a%20b"):
        model = timm.create_model("nat_atto", pretrained=True, pretrained_cfg_overlay=dict(file=host.address(address)))
        assert torch.equal(model.state_dict()["head.fc.weight"], state["head.fc.weight"])
    assert locate(host.address("f/57e0904221824ee7b7af/?dl=1")).name == "weights"
    right = hashlib.sha256(payload).hexdigest()
    assert locate(host.address(f"ok/other.pth#sha256={right}")).name == "other.pth"
    with pytest.raises(WeightsError, match="wrong file"):
        locate(host.address(f"ok/third.pth#sha256={'0' * 64}"))


def test_a_full_disk_is_named(host, home, monkeypatch, published):
    monkeypatch.setattr(_download.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(WeightsError, match="has 10 left; set TORCH_HOME"):
        fetch(published(host.address("ok/file.pth")))


def test_encryption_is_not_given_up_on_the_way():
    redirects = _download._Redirects()
    request = _download.urllib.request.Request("https://example.org/a")
    with pytest.raises(_download.DownloadError, match="from https to http"):
        redirects.redirect_request(request, None, 302, "Found", {}, "http://example.org/b")
    assert redirects.redirect_request(request, None, 308, "Moved", {}, "https://example.org/b") is not None


def test_the_hub_is_asked_through_its_own_library(home, payload, monkeypatch, tmp_path):
    """Its library has its own cache, resumption, proxies and hashes; only what comes of it is checked here."""
    import huggingface_hub

    (tmp_path / "hub.bin").write_bytes(payload)
    asked = []

    def hf_hub_download(repo, file, cache_dir=None, force_download=False):
        asked.append((repo, file))
        if repo == "gone/gone":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")
        return str(tmp_path / "hub.bin")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr("foveate.zoo.weights.check_host", lambda url: None)
    sources = tuple(Source("hub", "listed", repo=repo, file="hub.bin") for repo in ("gone/gone", "some/where"))
    entry = Weights(NAME, "classify", "imagenet-1k", sources, "https://example.org/page")
    assert fetch(entry) == tmp_path / "hub.bin"
    assert asked == [("gone/gone", "hub.bin"), ("some/where", "hub.bin")]
    (tmp_path / "hub.bin").write_bytes(payload + b"x")
    with pytest.raises(WeightsError, match="wrong file"):
        fetch(entry)


def test_the_hubs_library_takes_what_it_is_given(host, home, payload, monkeypatch, tmp_path):
    import huggingface_hub

    theirs = functools.partial(huggingface_hub.hf_hub_download, endpoint=host.address("").rstrip("/"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", theirs)
    monkeypatch.setattr("foveate.zoo.weights.check_host", lambda url: None)
    sources = tuple(Source("hub", "listed", repo=repo, file="file.bin") for repo in ("gone/model", "hub/model"))
    entry = Weights(NAME, "classify", "imagenet-1k", sources, "https://example.org/page")
    path = fetch(entry, cache_dir=tmp_path / "cache")
    assert path.read_bytes() == payload
    assert path.is_relative_to(tmp_path / "cache" / "models--hub--model")
    asked = len(host.requests)
    assert fetch(entry, cache_dir=tmp_path / "cache") == path
    assert len(host.requests) == asked, "the second time it is in the cache"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("too-long", "of a file that it says has"),
        ("flipped", "the checksum of .* is another"),
        ("nowhere", "makes no sense"),
        ("drip", "bytes a second: given up"),
        ("drip-between-chunks", "sends 0 bytes a second: given up"),
        ("dripping-head", "not answered for .* seconds: given up"),
    ],
)
def test_no_other_file_is_taken_for_it(path, message, host, home, monkeypatch, published, leftovers):
    if "drip" in path:
        monkeypatch.setattr(_download, "PATIENCE", 0.2)
        monkeypatch.setattr(_download, "TIMEOUT", 0.5)
    with pytest.raises(WeightsError, match=message):
        fetch(published(host.address(f"{path}/file.pth")))
    assert not (home / NAME / "file.pth").exists()
    assert path in ("drip", "drip-between-chunks") or leftovers() == []


def test_a_length_that_no_file_has_is_none(host, home, payload, published):
    with contextlib.suppress(WeightsError):  # the HTTP library may refuse it by itself, in one line
        assert fetch(published(host.address("digits/file.pth"))).read_bytes() == payload


def test_a_full_disk_keeps_nothing_and_is_one_line(host, home, monkeypatch, published, leftovers):
    class Full(io.FileIO):
        def write(self, chunk):
            super().write(chunk[:10])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(_download, "open", lambda path, mode: Full(path, mode), raising=False)
    with pytest.raises(WeightsError, match="No space left on device; free space"):
        fetch(published(host.address("no-length/file.pth")))
    assert leftovers() == []


@pytest.mark.parametrize("name", ["write_text", "open", "fsync"])
def test_a_disk_without_room_for_another_file_is_one_line(name, host, home, monkeypatch, published, leftovers):
    def full(*_):
        raise OSError(28, "No space left on device")

    place = {"write_text": Path, "open": _download, "fsync": _download.os}[name]
    monkeypatch.setattr(place, name, full, raising=False)
    with pytest.raises(WeightsError, match="No space left on device; free space"):
        fetch(published(host.address("ok/file.pth")))
    assert leftovers() == []


def test_secrets_are_not_told(host, home):
    with pytest.raises(WeightsError) as error:
        weights.locate(host.address("missing/file.pth?token=geheim").replace("//", "//me:secret@"))
    assert "geheim" not in str(error.value)
    assert "secret" not in str(error.value)
    weights.locate(host.address("ok/file.pth?token=geheim"))
    assert "geheim" not in (home / "pins.json").read_text()


@pytest.mark.parametrize("name", ["a" * 300 + ".pth", "%C3%A4" * 99, "ä" * 130])
def test_a_files_name_of_any_length_arrives(name, host, home, payload):
    assert weights.locate(host.address(f"ok/{urllib.parse.quote(name)}")).read_bytes() == payload


def test_user_and_password_of_an_address_go_to_its_host_alone(host, home, payload):
    owned = host.address("owned/file.pth").replace("//", "//me:a%20b@")
    assert weights.locate(owned).read_bytes() == payload
    with pytest.raises(WeightsError, match="401"):
        weights.locate(owned.replace("owned", "owned-elsewhere"))
    assert host.told is not None


def test_the_name_that_a_redirect_leads_to_is_the_one_told(host, home, monkeypatch, published):
    monkeypatch.setattr(
        host.RequestHandlerClass,
        "nowhere",
        lambda self, first: (
            self.send_response(302),
            self.send_header("Location", "http://nobody.invalid/x"),
            self.end_headers(),
        ),
    )
    with pytest.raises(WeightsError, match=r"no host of the name nobody\.invalid"):
        fetch(published(host.address("nowhere/file.pth")))


def test_what_was_whole_when_the_process_was_killed_is_not_downloaded_again(host, home, payload, tmp_path):
    address, file = host.address("ok/file.pth"), home / "file.pth"
    before = {}

    def killed(part):
        before.update({path: path.read_bytes() for path in home.iterdir()})

    _download.download(address, file, check=killed)
    file.unlink()
    for path, content in before.items():
        path.write_bytes(content)
    _download.download(address, file)
    assert file.read_bytes() == payload
    assert len(host.requests) == 1
