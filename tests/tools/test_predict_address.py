"""`foveate predict` on addresses: what a host on this machine serves, well and badly."""

import http.server
import io
import json
import threading
import time

import numpy as np
import pytest
from foveate.tasks.data import sources
from foveate.tasks.data.classification import Digits
from foveate.tools.cli import main
from PIL import Image


def picture():
    content = io.BytesIO()
    Digits("val").image(0).save(content, "png")
    return content.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = picture()
        page = self.path.partition("?")[0]
        if page == "/moved.png":
            self.send_response(302)
            self.send_header("Location", "/pictures/digit.png")
            self.end_headers()
            return
        if page == "/local.png":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
            return
        self.send_response(404 if page == "/none.png" else 200)
        if page == "/short.png":
            self.send_header("Content-Length", str(len(content) + 1000))
        if page == "/huge.png":
            self.send_header("Content-Length", str(1 << 40))
        self.end_headers()
        if page == "/page.png":
            content = b"<html>no picture</html>"
        try:
            if page == "/slow.png":
                for _ in range(50):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.1)
            while page == "/endless.png":
                self.wfile.write(bytes(1 << 16))
            self.wfile.write(content)
        except OSError:
            pass  # the other side has had enough

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def host():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_addresses_are_predicted_as_files_are(digits_run, host, tmp_path, capsys):
    (tmp_path / "digit.png").write_bytes(picture())
    given = [f"{host}/pictures/digit.png?size=8&x=%20", str(tmp_path / "digit.png"), f"{host}/moved.png", f"{host}/"]
    argv = ["predict", *given, "--checkpoint", str(digits_run / "best.pth"), "--output", str(tmp_path / "out")]
    assert main(argv) == 0
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [entry["image"] for entry in entries] == given
    assert all(entry["classes"] == entries[1]["classes"] for entry in entries)
    names = [entry["picture"].rpartition("/")[2] for entry in entries]
    assert names == ["digit.png", "digit-2.png", "moved.png", "image.png"]
    for entry in entries:
        with Image.open(entry["picture"]) as shown:
            assert min(shown.size) > 200


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("none.png", "can't be had (HTTP Error 404: Not Found)"),
        ("page.png", "not an image, or damaged (of no known format)"),
        ("short.png", "can't be had (it ended after"),
        ("huge.png", "is larger than 256 MB; download it, and give the file"),
        ("endless.png", "is larger than 0 MB; download it, and give the file"),
        ("slow.png", "can't be had (it took longer than 1 s; download it, and give the file)"),
        ("local.png", "can't be had ("),
    ],
)
def test_what_is_no_image_is_one_line(page, message, digits_run, host, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sources, "MAX_SECONDS", 1)
    if page == "endless.png":
        monkeypatch.setattr(sources, "MAX_BYTES", 300000)
    capsys.readouterr()
    argv = [
        "predict",
        f"{host}/{page}",
        "--checkpoint",
        str(digits_run / "best.pth"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"foveate: error: {host}/{page}: {message}")
    assert error.count("\n") == 1
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == []


def test_deep_colours_of_an_address_are_as_of_a_file(host, tmp_path, monkeypatch):
    import cv2
    from foveate.tasks.data.images import read_image

    deep = np.random.default_rng(0).integers(0, 4096, (9, 8, 3)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    monkeypatch.setattr(sources, "fetch", lambda address: (tmp_path / "deep.png").read_bytes())
    read = sources.read_address("http://127.0.0.1/deep.png", 3, 4095)
    assert (np.asarray(read) == np.asarray(read_image(tmp_path / "deep.png", 3, 4095))).all()
