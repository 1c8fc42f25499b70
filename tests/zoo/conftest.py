"""Fixtures of published weights: an empty cache, entries of the table, and a host that fails as real ones do."""

import base64
import contextlib
import http.server
import socket
import struct
import threading
import time
from pathlib import Path

import pytest
import timm
import torch
from foveate.zoo import _download
from foveate.zoo.weights import Source, Weights

NAME = "nat_atto.somebody_in1k"


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

    def continue_with(self, rest, start, headers, total=None):
        """Answer with what follows a file's first part, whatever was asked for."""
        length = len(self.server.payload)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{length - 1}/{total or length}")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(rest)

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
        self.continue_with(self.server.payload, 0, {})

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
            headers = {"ETag": '"new"', "Content-Length": str(len(body) - start)}
            return self.continue_with(body[start:], start, headers)
        self.give(b"x" * len(body) if first else body, upto=len(body) // 2 if first else None, etag='"old"')

    def unsigned_halves(self, first):
        """As two_halves, by a host that doesn't say which file its rest is of."""
        body = self.server.payload
        if first or not self.headers.get("Range"):
            return self.give(b"x" * len(body) if first else body, upto=len(body) // 2 if first else None)
        start = int(self.headers["Range"][6:-1])
        self.continue_with(body[start:], start, {})

    def no_total(self, first):
        """Break off twice, and not say again how long the file is."""
        body = self.server.payload
        if first:
            return self.give(body, upto=len(body) // 2)
        start = int(self.headers["Range"][6:-1])
        rest = body[start : None if start > len(body) // 2 else -9]
        self.continue_with(rest, start, {"ETag": '"1"'}, total="*")

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
        self.continue_with(body[start:] + b"more", start, {"ETag": '"1"'})

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


@pytest.fixture(scope="session")
def published():
    """Make an entry of the table of addresses that are tried one after another."""

    def make(*addresses: str, **facts) -> Weights:
        sources = tuple(Source("authors", "listed", url=address, file="file.pth", **facts) for address in addresses)
        return Weights(NAME, "classify", "imagenet-1k", sources, "https://example.org/page")

    return make


@pytest.fixture
def leftovers(home):
    """List the files of an entry beside the finished one and the lock."""
    return lambda: sorted(path.name for path in (home / NAME).iterdir() if path.name not in ("file.pth", ".lock"))
