"""Bad hosts and full disks: the right file arrives whole, or one line says why not; no other file is ever there."""

import resource
import signal
import socketserver
import threading
from pathlib import Path

import torch
from foveate.tasks.checkpoints import save_checkpoint, write_whole
from foveate.zoo import _download
from foveate.zoo.loading import create_model
from trial import Trial, Wrong, apart


def run(trial: Trial) -> None:
    path = trial.folder / "whole.pth"
    torch.save(create_model("foveate_host_atto").state_dict(), path)
    payload = path.read_bytes()
    _download.PAUSE, _download.TIMEOUT, _download.PATIENCE = 0.0, 1.0, 3.0
    for number in trial.numbers():
        if number % 4 == 3:
            trial.check("full disks", number, lambda: apart(lambda: _full_disk(trial, payload)))
            continue
        host = _Host(trial.draw, payload)
        try:
            trial.check("bad hosts", number, lambda host=host: _fetch(trial, host, payload))
        finally:
            host.shutdown()
            host.server_close()


class _Host(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, draw, payload: bytes):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.draw, self.payload = draw, payload
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_):
        pass


class _Handler(socketserver.StreamRequestHandler):
    """Answers with a status, headers and a body of which each may be wrong."""

    timeout = 3

    def handle(self) -> None:
        draw, payload = self.server.draw, self.server.payload
        while (line := self.rfile.readline().strip()) and not line.lower().startswith(b"range:"):
            pass
        start = int(line.partition(b"=")[2].partition(b"-")[0] or b"0") if line else 0
        size, name = len(payload), self.server.server_address[1]
        status = draw.choice(
            (b"200 OK",) * 4
            + (b"206 Partial Content",) * 3
            + (b"503 Busy", b"404 Gone", b"416 No", b"302 Go", b"999 What", b"200", b"\xff")
        )
        digits = (b"1" * 5000, b"-1", b"", b"x", b"0", b"%d" % (size * 2))
        headers = [b"Content-Length: " + (b"%d" % (size - start) if draw.random() < 0.6 else draw.choice(digits))]
        headers += [b"ETag: " + draw.choice((b'"a"', b'"a"', b'"b"', b'W/"a"', b""))]
        ranges = (
            b"bytes %d-%d/%d" % (start, size - 1, size),
            b"bytes 0-9/10",
            b"bytes */*",
            b"x",
            b"bytes %d-/%s" % (start, b"9" * 5000),
        )
        headers += [b"Content-Range: " + draw.choice(ranges)]
        headers += [
            b"Location: "
            + draw.choice(
                (b"http://127.0.0.1:%d/x" % name, b"ftp://x", b"http://[", b"//", b"http://x:99999999/", b"\x00")
            )
        ]
        headers += draw.choice(
            (
                [],
                [b"X: " + b"y" * 70_000],
                [b"no header at all"],
                [b"Content-Type: text/html"],
                [b"Transfer-Encoding: chunked"],
            )
        )
        body = payload[start:] if status.startswith(b"206") else payload
        how = draw.randrange(8)
        if how == 0:
            body = body[: draw.randrange(len(body) + 1)]
        elif how == 1:
            body += b"more"
        elif how == 2 and body:
            place = draw.randrange(len(body))
            body = body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
        elif how == 3:
            body = draw.choice((b"", b"<html>", b"\x00" * 1000))
        self.wfile.write(b"HTTP/1.1 " + status + b"\r\n" + b"\r\n".join(headers) + b"\r\n\r\n" + body)


def _fetch(trial: Trial, host: _Host, payload: bytes) -> None:
    from foveate.zoo.weights import Source, Weights, fetch

    folder = trial.folder / f"cache-{trial.draw.getrandbits(64)}"
    address = f"http://127.0.0.1:{host.server_address[1]}/file.pth"
    source = Source("authors", "listed", address, file="file.pth")
    entry = Weights("foveate_host_atto.x", "classify", "imagenet-1k", (source,), address, license="mit")
    try:
        file = fetch(entry, cache_dir=folder)
        if file.read_bytes() != payload:
            raise Wrong("another file is taken for it")
    finally:
        there = folder / "foveate" / entry.name / "file.pth"
        if there.exists() and there.read_bytes() != payload:
            raise Wrong("another file is left in the cache")


def _full_disk(trial: Trial, payload: bytes) -> None:
    """Write with a limit on files' lengths, as a full disk has."""
    draw, file = trial.draw, trial.folder / f"disk-{trial.draw.getrandbits(64)}" / "file.pth"
    file.parent.mkdir()
    file.write_bytes(b"before")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (draw.randrange(len(payload)), resource.RLIM_INFINITY))
    how = draw.randrange(2)
    try:
        if how:
            save_checkpoint({"state_dict": {"weight": torch.zeros(len(payload) // 4)}}, file)
        else:
            write_whole(file, lambda name: Path(name).write_bytes(payload))
        raise Wrong("more is written than fits")
    finally:
        if file.read_bytes() != b"before":
            raise Wrong("what was there before is lost")
        if len(list(file.parent.iterdir())) != 1:
            raise Wrong("a part is left behind")
