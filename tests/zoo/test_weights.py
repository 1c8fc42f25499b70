"""Published weights: a well-formed table, and downloads that end in the right file or in a clear error."""

import base64
import contextlib
import functools
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import socket
import struct
import threading
import time
import urllib.parse
from pathlib import Path

import filelock
import foveate
import pytest
import timm
import torch
from foveate import zoo
from foveate.zoo import CheckpointError, _download, variants, weights
from foveate.zoo.checkpoint import Checkpoint
from foveate.zoo.weights import Source, Weights, WeightsError, fetch, find, locate
from timm.models import get_pretrained_cfg, is_model

NAME = "nat_atto.somebody_in1k"


# The table.


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


# Downloads.


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return timm.create_model("nat_atto").state_dict()


@pytest.fixture(scope="module")
def payload(state, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("payload") / "file.pth"
    torch.save(state, path)
    return path.read_bytes()


class Host(http.server.ThreadingHTTPServer):
    """A web host that fails in the ways of real ones; what a path does, its first part says."""

    daemon_threads = True

    def __init__(self, payload: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.payload = payload
        self.requests: list[tuple[str, str | None]] = []
        self.asked_again = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def count(self, path: str) -> int:
        return sum(path == asked for asked, _ in self.requests)

    def handle_error(self, request, client_address):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        path = self.path.lstrip("/").partition("?")[0]
        first = self.server.count(path) == 0
        self.server.requests.append((path, self.headers.get("Range")))
        getattr(self, path.partition("/")[0].replace("-", "_"))(first)

    def give(self, body, upto=None, etag='"1"', ranges=True, length=True, kind="application/octet-stream"):
        """Answer with ``body`` or the range asked for; only the first ``upto`` bytes of it are sent."""
        start, asked = 0, self.headers.get("Range")
        if ranges and asked and self.headers.get("If-Range") == etag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", kind)
        if etag:
            self.send_header("ETag", etag)
        if length:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : len(body) if upto is None else upto])

    def ok(self, first):
        self.give(self.server.payload)

    def missing(self, first):
        self.send_error(404)

    def busy(self, first):
        self.send_error(503) if first else self.ok(first)

    def slow(self, first):
        body = self.server.payload
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for start in range(0, len(body), len(body) // 8):
            self.wfile.write(body[start : start + len(body) // 8])
            time.sleep(0.05)

    def stuck(self, first):
        self.give(self.server.payload, upto=len(self.server.payload) // 2 if first else None)
        if first:
            self.wfile.flush()
            self.server.asked_again.wait(60)
        else:
            self.server.asked_again.set()

    def truncated(self, first):
        self.give(self.server.payload, upto=len(self.server.payload) // 2 if first else None)

    def always_truncated(self, first):
        self.give(self.server.payload, upto=1000, ranges=False)

    def reset(self, first):
        self.give(self.server.payload, upto=len(self.server.payload) // 2 if first else None)
        if first:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def no_ranges(self, first):
        self.give(self.server.payload, upto=len(self.server.payload) // 2 if first else None, ranges=False)

    def changed(self, first):
        self.give(
            b"x" * len(self.server.payload) if first else self.server.payload,
            upto=len(self.server.payload) // 2 if first else None,
            etag='"old"' if first else '"new"',
        )

    def wrong_range(self, first):
        if first:
            return self.give(self.server.payload, upto=len(self.server.payload) // 2)
        if not self.headers.get("Range"):
            return self.give(self.server.payload)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes 0-{len(self.server.payload) - 1}/{len(self.server.payload)}")
        self.end_headers()
        self.wfile.write(self.server.payload)

    def refused_range(self, first):
        if not first and self.headers.get("Range"):
            return self.send_error(416)
        self.give(self.server.payload, upto=len(self.server.payload) // 2 if first else None)

    def redirect(self, first):
        self.send_response(302)
        self.send_header("Location", self.server.address("truncated/moved.pth"))
        self.end_headers()

    def no_length(self, first):
        self.give(self.server.payload, length=False)

    def no_length_truncated(self, first):
        self.give(self.server.payload, upto=len(self.server.payload) // 2, length=False)

    def page(self, first):
        self.give(b"<!DOCTYPE html><p>This share has expired", kind="text/html; charset=utf-8")

    def disguised_page(self, first):
        self.give(b"\n <html>Too many downloads")

    def two_halves(self, first):
        """Send the rest of a new file to whoever began the old one, whatever If-Range says."""
        body, start = self.server.payload, 0
        if not first and self.headers.get("Range"):
            start = int(self.headers["Range"][6:-1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("ETag", '"new"')
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            return self.wfile.write(body[start:])
        self.give(b"x" * len(body) if first else body, upto=len(body) // 2 if first else None, etag='"old"')

    def unsigned_halves(self, first):
        """As two_halves, by a host that doesn't say which file its rest is of."""
        body = self.server.payload
        if first or not self.headers.get("Range"):
            return self.give(b"x" * len(body) if first else body, upto=len(body) // 2 if first else None)
        start = int(self.headers["Range"][6:-1])
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(body[start:])

    def no_total(self, first):
        """Break off twice, and not say again how long the file is."""
        body = self.server.payload
        if first:
            return self.give(body, upto=len(body) // 2)
        start = int(self.headers["Range"][6:-1])
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/*")
        self.send_header("ETag", '"1"')
        self.end_headers()
        self.wfile.write(body[start : None if start > len(body) // 2 else -9])

    def owned(self, first):
        """Give the file to those alone who say who they are."""
        right = self.headers.get("Authorization") == "Basic " + base64.b64encode(b"me:a b").decode()
        self.ok(first) if right else self.send_error(401)

    def owned_elsewhere(self, first):
        self.server.told = self.headers.get("Authorization")
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{self.server.server_port}/owned/file.pth")
        self.end_headers()

    def dripping_head(self, first):
        with contextlib.suppress(OSError):
            for _ in range(100):
                self.wfile.write(b"HTTP/1.1 "[:1])
                self.wfile.flush()
                time.sleep(0.02)

    def too_long(self, first):
        body = self.server.payload
        if first:
            return self.give(body, upto=len(body) // 2)
        start = int(self.headers["Range"][6:-1])
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", '"1"')
        self.end_headers()
        self.wfile.write(body[start:] + b"more")

    def flipped(self, first):
        body = bytearray(self.server.payload)
        body[len(body) // 2] ^= 1
        self.give(bytes(body))

    def digits(self, first):
        self.send_response(200)
        self.send_header("Content-Length", "9" * 5000)
        self.end_headers()
        self.wfile.write(self.server.payload)

    def nowhere(self, first):
        self.send_response(302)
        self.send_header("Location", "http://[::1/x")
        self.end_headers()

    def drip(self, first):
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.02)

    def drip_between_chunks(self, first):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(300):  # of zeros before the length of the first chunk
                self.wfile.write(b"0")
                self.wfile.flush()
                time.sleep(0.02)

    def evil(self, first):
        self.give(self.server.evil)

    def f(self, first):
        self.ok(first)

    def do_HEAD(self):
        """Answer as the hub does to what its library asks before a download."""
        found = self.path.startswith("/hub/")
        self.send_response(200 if found else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(self.server.payload)) if found else "0")
        self.end_headers()

    def hub(self, first):
        self.give(self.server.payload)


@pytest.fixture
def host(payload):
    host = Host(payload)
    yield host
    host.shutdown()
    host.server_close()


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty cache, a fast clock, and no settings of the user's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "FOVEATE_WEIGHTS_MIRROR", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_download, "PAUSE", 0.0)
    return tmp_path / "torch" / "hub" / "checkpoints" / "foveate"


def published(*addresses: str, **facts) -> Weights:
    sources = tuple(Source("authors", "listed", url=address, file="file.pth", **facts) for address in addresses)
    return Weights(NAME, "classify", "imagenet-1k", sources, "https://example.org/page")


def leftovers(folder: Path) -> list[str]:
    """Files of an entry beside the finished one and the lock."""
    return sorted(path.name for path in (folder / NAME).iterdir() if path.name not in ("file.pth", ".lock"))


GOOD = (
    *("ok", "busy", "slow", "stuck", "truncated", "reset", "no-ranges", "changed", "wrong-range", "refused-range"),
    *("redirect", "no-length", "two-halves", "unsigned-halves", "no-total"),
)


@pytest.fixture
def impatient(monkeypatch):
    """Give up on stuck hosts soon; on a busy machine a good host seems stuck too, so only where one is."""
    monkeypatch.setattr(_download, "TIMEOUT", 2.0)


@pytest.mark.parametrize("path", GOOD)
def test_the_right_file_arrives(path, host, home, payload, request):
    if path == "stuck":
        request.getfixturevalue("impatient")
    file = fetch(published(host.address(f"{path}/file.pth")))
    assert file == home / NAME / "file.pth"
    assert file.read_bytes() == payload
    assert leftovers(home) == []


@pytest.mark.parametrize("path", ["stuck", "truncated", "reset"])
def test_what_broke_off_is_continued(path, host, home, payload, request):
    if path == "stuck":
        request.getfixturevalue("impatient")
    fetch(published(host.address(f"{path}/file.pth")))
    begins = [int((asked or "bytes=0-")[6:-1]) for _, asked in host.requests]
    # A reset discards what is still on its way.
    assert len(begins) == 2
    assert begins[1] == len(payload) // 2 or (path == "reset" and 0 < begins[1] < len(payload) // 2)


def test_a_new_process_continues_too(host, home, payload, monkeypatch):
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
def test_what_fails_is_a_clear_error_and_no_file(path, host, home):
    with pytest.raises(WeightsError, match=BAD[path]) as error:
        fetch(published(host.address(f"{path}/file.pth")))
    assert "\n" not in str(error.value)
    assert "visit https://example.org/page" in str(error.value)
    assert not (home / NAME / "file.pth").exists()
    if path != "always-truncated":
        assert leftovers(home) == []


@pytest.mark.parametrize("path", [*BAD, "evil"])
def test_the_next_source_is_tried(path, host, home, payload):
    host.evil = b"\x80\x02."
    fetch(published(host.address(f"{path}/file.pth"), host.address("ok/file.pth")))
    assert (home / NAME / "file.pth").read_bytes() == payload


def test_a_host_that_is_not_there_is_an_error(home):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(WeightsError, match=r"(?i)refused"):
        fetch(published(f"http://127.0.0.1:{port}/file.pth"))


def test_a_known_hash_and_size_are_held(host, home, payload):
    right = hashlib.sha256(payload).hexdigest()
    address = host.address("ok/file.pth")
    with pytest.raises(WeightsError, match=f"wrong file: its sha256 is {right}, not {'0' * 64}"):
        fetch(published(address, sha256="0" * 64))
    with pytest.raises(WeightsError, match=f"has {len(payload)} bytes, not 5"):
        fetch(published(address, size=5))
    assert not (home / NAME / "file.pth").exists()
    assert fetch(published(address, sha256=right, size=len(payload))).read_bytes() == payload


def test_the_first_hash_is_recorded_and_held(host, home, payload, state, tmp_path):
    address = host.address("ok/file.pth")
    path = fetch(published(address))
    pin = weights.pins()[f"{NAME}/file.pth"]
    assert pin["sha256"] == hashlib.sha256(payload).hexdigest()
    assert pin["address"] == address
    # Another file at the same address, after the cache was emptied.
    path.unlink()
    torch.save(state | {"head.fc.bias": torch.ones_like(state["head.fc.bias"])}, tmp_path / "other.pth")
    host.payload = (tmp_path / "other.pth").read_bytes()
    with pytest.raises(WeightsError, match=r"wrong file: .*--renew nat_atto\.somebody_in1k` if the new file is right"):
        fetch(published(address))
    assert not path.exists()
    # A renewal that fails leaves what there is.
    path.write_bytes(payload)
    with pytest.raises(WeightsError, match="404"):
        fetch(published(host.address("missing/file.pth")), renew=True)
    assert path.read_bytes() == payload
    assert fetch(published(address), renew=True).read_bytes() == host.payload
    assert weights.pins()[f"{NAME}/file.pth"]["sha256"] == hashlib.sha256(host.payload).hexdigest()


def test_a_cached_file_that_was_changed_is_refused(host, home, payload):
    path = fetch(published(host.address("ok/file.pth")))
    os.utime(path, ns=(1, 1))
    assert fetch(published(host.address("ok/file.pth"))) == path, "touched, but the same"
    path.write_bytes(payload[:-1] + b"x")
    with pytest.raises(WeightsError, match="has changed: its sha256 is"):
        fetch(published(host.address("ok/file.pth")))


def test_the_cache_is_used_and_offline_mode_obeyed(host, home, monkeypatch):
    entry = published(host.address("ok/file.pth"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError, match=r"HF_HUB_OFFLINE forbids .*foveate weights fetch nat_atto\.somebody"):
        fetch(entry)
    assert host.requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    fetch(entry)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetch(entry)
    assert len(host.requests) == 1


def test_the_mirror_comes_first_and_revives_dead_links(host, home, payload, monkeypatch, tmp_path):
    monkeypatch.setenv("FOVEATE_WEIGHTS_MIRROR", host.address("ok/"))
    dead = Weights(
        NAME, "classify", "x", (Source("share", "dead", page="https://a.b", file="file.pth"),), "https://c.d"
    )
    assert fetch(dead).read_bytes() == payload
    assert host.requests[0][0] == f"ok/{NAME}/file.pth"
    # A mirror that lacks the file leaves it to the sources; a folder does as well as an address.
    monkeypatch.setenv("FOVEATE_WEIGHTS_MIRROR", str(tmp_path / "mirror"))
    entry = published(host.address("ok/file.pth"))
    assert fetch(entry, cache_dir=tmp_path / "one").read_bytes() == payload
    (tmp_path / "mirror" / NAME).mkdir(parents=True)
    (tmp_path / "mirror" / NAME / "file.pth").write_bytes(payload)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(entry, cache_dir=tmp_path / "two") == tmp_path / "mirror" / NAME / "file.pth"


def test_the_proxy_of_the_environment_is_used(host, home, payload, monkeypatch):
    monkeypatch.setenv("http_proxy", host.address(""))
    monkeypatch.setenv("no_proxy", "")
    host_request = Handler.do_GET

    def proxied(handler):
        handler.path = handler.path.removeprefix("http://weights.invalid")
        host_request(handler)

    monkeypatch.setattr(Handler, "do_GET", proxied)
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


def test_pretrained_and_checkpoint_ask_the_table(host, home, state, monkeypatch):
    entry = published(host.address("missing/file.pth"), host.address("ok/file.pth"))
    monkeypatch.setattr(weights, "table", lambda: {"nat_atto.foveate_digits": entry, NAME: entry})
    model = timm.create_model("nat_atto", pretrained=True)
    assert torch.equal(model.state_dict()["head.fc.weight"], state["head.fc.weight"])
    backbone = foveate.create_backbone("nat_atto", checkpoint=NAME)
    assert torch.equal(backbone.features.model.state_dict()["stem.norm.weight"], state["stem.norm.weight"])
    assert host.count("ok/file.pth") == 1


def _fetch(entry, results):
    try:
        results.put(fetch(entry).read_bytes())
    except Exception as error:
        results.put(repr(error))


def test_processes_share_one_download(host, home, payload):
    entry = published(host.address("slow/file.pth"))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_fetch, args=(entry, results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=300) == payload for _ in processes] == [True] * 3
    for process in processes:
        process.join()
    assert host.count("slow/file.pth") == 1


def test_a_full_disk_is_named(host, home, monkeypatch):
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


def test_an_unwritable_cache_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match=r"can't be written .*set TORCH_HOME"):
        fetch(published("http://127.0.0.1:1/file.pth"))


def test_the_table_is_plain_data():
    rows = json.loads((Path(weights.__file__).parent / "weights.json").read_text())
    assert rows.keys() == weights.table().keys()


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
def test_no_other_file_is_taken_for_it(path, message, host, home, monkeypatch):
    if "drip" in path:
        monkeypatch.setattr(_download, "PATIENCE", 0.2)
        monkeypatch.setattr(_download, "TIMEOUT", 0.5)
    with pytest.raises(WeightsError, match=message):
        fetch(published(host.address(f"{path}/file.pth")))
    assert not (home / NAME / "file.pth").exists()
    assert path in ("drip", "drip-between-chunks") or leftovers(home) == []


def test_a_length_that_no_file_has_is_none(host, home, payload):
    with contextlib.suppress(WeightsError):  # the HTTP library may refuse it by itself, in one line
        assert fetch(published(host.address("digits/file.pth"))).read_bytes() == payload


def test_a_full_disk_keeps_nothing_and_is_one_line(host, home, monkeypatch):
    class Full(io.FileIO):
        def write(self, chunk):
            super().write(chunk[:10])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(_download, "open", lambda path, mode: Full(path, mode), raising=False)
    with pytest.raises(WeightsError, match="No space left on device; free space"):
        fetch(published(host.address("no-length/file.pth")))
    assert leftovers(home) == []


@pytest.mark.parametrize("content", ["", '{"a": {"sha', "[]", '{"a": 1}', "[" * 100_000])
def test_records_that_can_not_be_read_are_set_aside(content, host, home, payload):
    entry = published(host.address("ok/file.pth"))
    fetch(entry)
    (home / "pins.json").write_text(content)
    assert fetch(entry).read_bytes() == payload
    assert (home / "pins.broken.json").read_text() == content
    assert list(weights.pins()) == [f"{NAME}/file.pth"]


def test_what_a_killed_process_left_of_the_records_is_written_over(host, home, monkeypatch):
    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(weights.os, "replace", killed)
        patched.setattr(weights.os, "getpid", lambda: 1)
        with pytest.raises(KeyboardInterrupt):
            weights._write_pins(None, {})
    fetch(published(host.address("ok/file.pth")))
    assert sorted(path.name for path in home.iterdir()) == [".pins.lock", NAME, "pins.json"]


@pytest.mark.parametrize("name", ["write_text", "open", "fsync"])
def test_a_disk_without_room_for_another_file_is_one_line(name, host, home, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    place = {"write_text": Path, "open": _download, "fsync": _download.os}[name]
    monkeypatch.setattr(place, name, full, raising=False)
    with pytest.raises(WeightsError, match="No space left on device; free space"):
        fetch(published(host.address("ok/file.pth")))
    assert leftovers(home) == []


def test_secrets_are_not_told(host, home):
    with pytest.raises(WeightsError) as error:
        weights.locate(host.address("missing/file.pth?token=geheim").replace("//", "//me:secret@"))
    assert "geheim" not in str(error.value)
    assert "secret" not in str(error.value)
    weights.locate(host.address("ok/file.pth?token=geheim"))
    assert "geheim" not in (home / "pins.json").read_text()


@pytest.mark.parametrize("address", ["https://me:secret@[::1/x", "https://me:sec/secret@host/x?key=secret"])
def test_addresses_that_make_no_sense_keep_their_secrets(address, home):
    assert "secret" not in weights.shown(address)
    with pytest.raises(WeightsError) as error:
        weights.locate(f"{address}#sha256=1")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("name", ["a" * 300 + ".pth", "%C3%A4" * 99, "ä" * 130])
def test_a_files_name_of_any_length_arrives(name, host, home, payload):
    assert weights.locate(host.address(f"ok/{urllib.parse.quote(name)}")).read_bytes() == payload


@pytest.mark.parametrize("name", ["http://[::1/x", "a" * 300, "a\0b"])
def test_what_is_no_name_of_a_file_is_one_line(name, home):
    with pytest.raises(WeightsError, match=r"makes no sense as an address|is no name of a file|no such file"):
        weights.locate(name)


def test_user_and_password_of_an_address_go_to_its_host_alone(host, home, payload):
    owned = host.address("owned/file.pth").replace("//", "//me:a%20b@")
    assert weights.locate(owned).read_bytes() == payload
    with pytest.raises(WeightsError, match="401"):
        weights.locate(owned.replace("owned", "owned-elsewhere"))
    assert host.told is not None


def test_the_name_that_a_redirect_leads_to_is_the_one_told(host, home, monkeypatch):
    monkeypatch.setattr(
        Handler,
        "nowhere",
        lambda self, first: (
            self.send_response(302),
            self.send_header("Location", "http://nobody.invalid/x"),
            self.end_headers(),
        ),
    )
    with pytest.raises(WeightsError, match=r"no host of the name nobody\.invalid"):
        fetch(published(host.address("nowhere/file.pth")))


def test_a_hash_counts_for_a_file_that_is_here(host, home, payload):
    address = host.address("ok/file.pth")
    digest = hashlib.sha256(payload).hexdigest()
    assert weights.locate(f"{address}#sha256={digest}").read_bytes() == payload
    with pytest.raises(WeightsError, match=f"as asked for.*--renew {address}`"):
        weights.locate(f"{address}#sha256={'0' * 64}")


def test_a_file_of_the_same_size_and_time_is_looked_at(host, home):
    entry = published(host.address("ok/file.pth"))
    path = fetch(entry)
    status, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(WeightsError, match="has changed"):
        fetch(entry)


def test_another_process_is_not_waited_for_without_end(host, home, monkeypatch):
    monkeypatch.setenv("FOVEATE_WEIGHTS_WAIT", "0.1")
    (home / NAME).mkdir(parents=True)
    with filelock.FileLock(home / NAME / ".lock"), pytest.raises(WeightsError, match=r"kept it for 0.1 seconds.*WAIT"):
        fetch(published(host.address("ok/file.pth")))


@pytest.fixture
def mirror(home, tmp_path, monkeypatch) -> Path:
    """A mirror's folder of the published weights, empty."""
    folder = tmp_path / "mirror"
    (folder / NAME).mkdir(parents=True)
    monkeypatch.setenv("FOVEATE_WEIGHTS_MIRROR", str(folder))
    return folder / NAME


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A file that anybody can read, of another model."""
    path = tmp_path_factory.mktemp("other") / "file.pth"
    torch.save(timm.create_model("foveate_host_atto").state_dict(), path)
    return path


def test_another_models_file_is_not_recorded_and_the_right_one_is_taken_then(home, mirror, payload, other):
    entry = published("http://127.0.0.1:9/file.pth")
    file = mirror / "file.pth"
    file.write_bytes(other.read_bytes())
    with pytest.raises(WeightsError, match=rf"{file}: the checkpoint is not one of nat_atto: \d+ of \d+ entries match"):
        fetch(entry)
    assert not weights.pins()
    file.write_bytes(payload)
    assert fetch(entry) == file
    assert list(weights.pins()) == [f"{NAME}/file.pth"]


def test_a_file_put_into_the_cache_must_be_the_models(home, other, payload):
    entry = published("http://127.0.0.1:9/file.pth")
    (home / NAME).mkdir(parents=True)
    file = home / NAME / "file.pth"
    file.write_bytes(other.read_bytes())
    with pytest.raises(WeightsError, match=rf"not one of nat_atto.*foveate weights fetch --renew {NAME}"):
        fetch(entry)
    assert not weights.pins()
    file.write_bytes(payload)
    assert fetch(entry) == file


def test_a_dense_file_must_have_its_backbones_shapes(state, other):
    def fault(entries, name="nat_atto"):
        content = {"state_dict": {f"backbone.{key}": value for key, value in entries.items()}}
        return variants.identity_fault(name, "detect", Checkpoint(Path("file.pth"), content))

    assert fault(state) is None
    assert "have their shapes" in fault(torch.load(other))
    assert fault(torch.load(other), "a_model_that_nobody_knows") is None


def test_a_mirrors_folder_needs_no_cache(mirror, payload, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("no folder can be made here")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file" / "torch"))
    (mirror / "file.pth").write_bytes(payload)
    assert fetch(published("http://127.0.0.1:9/file.pth")) == mirror / "file.pth"
    assert "hashes are not recorded" in caplog.text


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
