"""Downloading large files from hosts that fail: resumed where they allow it, checked, whole or not there at all."""

import base64
import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

from tqdm import tqdm

from .checkpoint import CheckpointError

# Seconds without a byte after which a host counts as stuck; attempts in a row that gain nothing; seconds between them.
TIMEOUT = 30.0
# Fewer bytes a second, over so many seconds, are given up.
SLOWEST, PATIENCE = 1000, 60.0
ATTEMPTS = 4
PAUSE = 1.0
_CHUNK = 2**20
_TEMPORARY = {408, 425, 429, 500, 502, 503, 504}


Checked = TypeVar("Checked")


class DownloadError(CheckpointError):
    """A file that could not be had from its address; the message is one line."""


class _Interrupted(Exception):
    """The transfer broke off, and may succeed when tried again."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from an encrypted address to an open one.

    Attributes:
        address: Where they have led to; None if there was none.
    """

    address: str | None = None

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise DownloadError(f"redirected from https to {newurl.split(':')[0]}, which anybody could change")
        self.address = newurl
        # urllib before Python 3.11 doesn't know 308, the permanent redirect that keeps the method.
        return super().redirect_request(req, fp, 301 if code == 308 else code, msg, headers, newurl)

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def download(
    url: str,
    path: Path,
    size: int | None = None,
    sha256: str | None = None,
    check: Callable[[Path], Checked] = lambda path: None,
) -> Checked:
    """Download ``url`` to ``path``, which appears only when it is whole and right.

    What a broken download left behind (``.part``) is continued next time, if the host allows it and says that the file
    is still the same. Proxies are those of the environment (``https_proxy`` and so on). The caller keeps other
    processes out.

    Args:
        url: Address, http or https.
        path: File to write.
        size: Size in bytes, if known.
        sha256: Hash, if known.
        check: Called with the finished file before it is moved to ``path``; raises a CheckpointError to refuse it.

    Returns:
        What ``check`` returned.

    Raises:
        DownloadError: If the host doesn't give the file, gives it up repeatedly, or gives another one.
    """
    if not url.startswith(("http://", "https://")):
        raise DownloadError("not an http address")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}-{zlib.crc32(url.encode()):08x}.part")
    idle, best = 0, -1
    while True:
        try:
            _transfer(url, part, size)
            break
        except _Interrupted as interruption:
            gained = _size_of(part) > best
            best = max(best, _size_of(part))
            idle = 0 if gained else idle + 1
            if idle >= ATTEMPTS - 1:
                raise DownloadError(f"{interruption}, {ATTEMPTS} times") from interruption
            time.sleep(PAUSE * 2**idle)
    try:
        if size is not None and part.stat().st_size != size:
            raise DownloadError(f"has {part.stat().st_size} bytes, not {size}")
        if sha256 is not None and (actual := sha256_of(part)) != sha256:
            raise DownloadError(f"wrong file: its sha256 is {actual}, not {sha256}")
        checked = check(part)
        # Bytes before name: a loss of power must not leave the name of a file that is not there.
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        return checked
    except OSError as error:
        raise _unwritten(part, error) from error
    finally:
        # Whole but wrong bytes must not be continued.
        part.unlink(missing_ok=True)
        _notes(part).unlink(missing_ok=True)


def _notes(part: Path) -> Path:
    return part.with_suffix(".json")


def _size_of(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _transfer(url: str, part: Path, size: int | None) -> None:
    """Fetch what ``part`` lacks, or all."""
    start = _size_of(part)
    notes = {} if not start else _read_notes(part)
    start, validator = (start, notes.get("validator")) if notes else (0, None)
    if start and start == notes.get("total"):
        return  # it was whole when the process was killed; what it is, is checked next
    headers = {"User-Agent": "foveate", "Accept-Encoding": "identity"}
    if start and validator:
        # The host sends the rest if the file is still the same, and else all of it.
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    with _ask(url, headers, part) as response:
        if response.headers.get_content_type() == "text/html":
            raise DownloadError("the host answers with a web page, not with the file")
        length = _count(response.headers.get("Content-Length"))
        etag, changed = response.headers.get("ETag"), response.headers.get("Last-Modified")
        if response.status == 206:
            total = _total_of_rest(response.headers, part, start, notes)
        else:
            start, total = 0, length
        if size is not None and total is not None and total != size:
            raise DownloadError(f"has {total} bytes, not {size}")
        _check_space(part.parent, (total or size or 0) - start)
        # Only a strong validator promises the same bytes.
        validator = etag if (etag or "").startswith('"') else changed
        notes = {"url": shown(url), "validator": validator, "etag": etag, "changed": changed, "total": total}
        try:
            _notes(part).write_text(json.dumps(notes))
            file = open(part, "ab" if start else "wb")  # noqa: SIM115 (closed below, where what happens is another fault)
        except OSError as error:
            raise _unwritten(part, error) from error
        bar = tqdm(
            total=total,
            initial=start,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            desc=part.name[1:-14],
            disable=None,
        )
        with file, bar:
            try:
                _receive(response, file, bar, part)
            except (TimeoutError, ConnectionError, http.client.HTTPException) as error:
                raise _Interrupted(_reason(error)) from error
    if total is not None and _size_of(part) < total:
        raise _Interrupted(f"the connection ends after {_size_of(part)} of {total} bytes")
    if total is not None and _size_of(part) > total:
        arrived = _size_of(part)
        part.unlink(missing_ok=True)
        _notes(part).unlink(missing_ok=True)
        raise DownloadError(f"the host sends {arrived} bytes of a file that it says has {total}")


def _total_of_rest(headers: http.client.HTTPMessage, part: Path, start: int, notes: dict) -> int | None:
    """Return how long a file is whose rest a host sends; a rest of another file, or another part, is interrupted."""
    begin, _, total = headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    if begin.partition("-")[0] != str(start):
        part.unlink(missing_ok=True)
        raise _Interrupted("the host sends another part of the file than asked for")
    now = {"etag": headers.get("ETag"), "changed": headers.get("Last-Modified"), "total": _count(total)}
    # Some hosts send the rest of whatever they have now, whatever was asked for. One that checked says what it checked
    # once more; one that has nothing to check the file by is never asked for the rest.
    differs = notes.get("validator") not in (None, now["etag"], now["changed"]) if start else False
    differs |= any(None not in (value, notes.get(key)) and value != notes[key] for key, value in now.items())
    if differs:
        part.unlink(missing_ok=True)
        raise _Interrupted("the host has another file now")
    return notes.get("total") if now["total"] is None else now["total"]


def _receive(response: http.client.HTTPResponse, file: BinaryIO, bar: tqdm, part: Path) -> None:
    """Write what arrives, unless it hardly does: a limit on the time between bytes never sees that."""
    if response.isclosed():
        return
    arrived, rates, ended = 0, [], threading.Event()

    def watch():
        before = 0
        while not ended.wait(PATIENCE):
            rate, before = (arrived - before) / PATIENCE, arrived
            if rate < SLOWEST:
                rates.append(rate)
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)  # ends the reading too, wherever it waits
                return

    connection = socket.fromfd(response.fileno(), socket.AF_INET, socket.SOCK_STREAM)
    threading.Thread(target=watch, daemon=True).start()
    try:
        while chunk := response.read1(_CHUNK):
            _append(file, chunk, part)
            bar.update(len(chunk))
            arrived += len(chunk)
    except (OSError, http.client.HTTPException):
        if not rates:
            raise
    finally:
        ended.set()
        connection.close()
    if rates:
        raise DownloadError(f"the host sends {rates[0]:.0f} bytes a second: given up")


def _read_notes(part: Path) -> dict:
    """Return what was noted of the answer that a part is of; nothing if that can't be read."""
    try:
        notes = json.loads(_notes(part).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return notes if isinstance(notes, dict) and "validator" in notes else {}


def _count(text: str | None) -> int | None:
    """Return a number of bytes as a host says it; None if it says none, or one that no file has."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 19 else None


def _append(file: BinaryIO, chunk: bytes, part: Path) -> None:
    """Write, or leave nothing behind on a disk that is full."""
    try:
        file.write(chunk)
        file.flush()
    except OSError as error:
        raise _unwritten(part, error) from error


def _unwritten(part: Path, error: OSError) -> DownloadError:
    """Remove a part that can't be written, and return what to say."""
    part.unlink(missing_ok=True)
    _notes(part).unlink(missing_ok=True)
    return DownloadError(f"{part.parent}: {error.strerror}; free space, or set TORCH_HOME to another disk")


def shown(address: str) -> str:
    """Return an address without what only its owner should know: user, password and query."""
    try:
        parts = urllib.parse.urlsplit(address)
        _ = parts.port
    except ValueError:  # of a password with a slash, say
        return re.sub("//.*@", "//", address.partition("?")[0])
    if parts.scheme not in ("http", "https"):
        return address
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" + ("?..." if parts.query else "")


def _ask(url: str, headers: dict[str, str], part: Path) -> http.client.HTTPResponse:
    """Return the host's answer, whose body is not read yet."""
    redirects = _Redirects()
    opener = urllib.request.build_opener(redirects)
    try:
        request = _request(url, headers)
        return _in_time(lambda: opener.open(request, timeout=TIMEOUT))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            part.unlink(missing_ok=True)
            raise _Interrupted("the host offers no such part of the file") from error
        if error.code in _TEMPORARY:
            raise _Interrupted(f"the host answers {error.code} {error.reason}") from error
        raise DownloadError(f"the host answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        if isinstance(getattr(error, "reason", error), socket.gaierror):
            raise _nameless(redirects.address or url) from error
        raise _Interrupted(_reason(error)) from error
    except (ValueError, LookupError) as error:  # of addresses and redirects that make no sense
        raise DownloadError(f"the address, or one that it redirects to, makes no sense ({_reason(error)})") from error


def _request(url: str, headers: dict[str, str]) -> urllib.request.Request:
    """Return a request; user and password of an address, which urllib takes for its host, go to that host alone."""
    parts = urllib.parse.urlsplit(url)
    owner, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers=headers)
    if owner:
        secret = base64.b64encode(urllib.parse.unquote(owner).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {secret}")
    return request


def _in_time(ask: Callable[[], http.client.HTTPResponse]) -> http.client.HTTPResponse:
    """Return an answer; one whose first lines drip is given up, which a limit on the time between bytes never sees."""
    answers: list[http.client.HTTPResponse] = []
    errors: list[BaseException] = []

    def wait():
        try:
            answers.append(ask())
        except BaseException as error:
            errors.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(PATIENCE + TIMEOUT)
    if errors:
        raise errors[0]
    if not answers:
        raise DownloadError(f"the host has not answered for {PATIENCE + TIMEOUT:g} seconds: given up")
    return answers[0]


def check_host(url: str) -> None:
    """Raise a DownloadError if the name of an address's host is nobody's, which other libraries try for a minute."""
    if urllib.request.getproxies():
        return  # which knows the names
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(url).hostname, None)
    except socket.gaierror as error:
        raise _nameless(url) from error


def _nameless(url: str) -> DownloadError:
    return DownloadError(f"no network, or no host of the name {urllib.parse.urlsplit(url).hostname}")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(f"needs {needed} bytes, but {folder} has {free} left; set TORCH_HOME to another disk")


def _reason(error: BaseException) -> str:
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return f"the host sends nothing for {TIMEOUT:g} seconds"
    return (str(reason) or type(reason).__name__).splitlines()[0]
