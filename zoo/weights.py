"""Published weights: which there are (``weights.json``), where they are, and how they come here.

The table names every published weight file by ``model.tag``. Its sources stand in the order of trust: this package,
GitHub release, hub, the authors' site, a cloud share. A source's ``state`` is what was last reported of it
(``reported`` says when); nobody has opened it for this table, unless the row's ``checked`` says who has:

* ``shipped``: a file of this package, in ``zoo/shipped``;
* ``listed``: a direct address that the authors give, not reported dead;
* ``derived``: a direct address made from a share page's by its host's rule;
* ``browser``: a page for people, which no program can fetch from;
* ``dead``: reported dead. Only ``listed`` and ``derived`` ones are tried.

Files are kept where torch keeps its own (``TORCH_HOME``), those of the hub where it does (``HF_HOME``).
``HF_HUB_OFFLINE=1`` forbids all downloads. ``FOVEATE_WEIGHTS_MIRROR``, an address or a folder that holds
``MODEL.TAG/FILE``, is asked first. No author published hashes: what a file was on its first use is recorded, and
compared whenever it is used again.
"""

import contextlib
import dataclasses
import datetime
import difflib
import functools
import hashlib
import json
import logging
import os
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from ._download import DownloadError, check_host, download, sha256_of, shown
from .checkpoint import Checkpoint, CheckpointError, open_checkpoint
from .library_errors import first_line

_logger = logging.getLogger(__name__)

STATES = ("shipped", "listed", "derived", "browser", "dead")
SHIPPED = Path(__file__).with_name("shipped")
_CONDITIONS = {
    "cc-by-nc-4.0": "name its authors, and no commercial use",
    "cc-by-sa-3.0": "name its authors, and share what you make of it alike",
}
KINDS = ("package", "release", "hub", "authors", "share", "url")


class WeightsError(CheckpointError):
    """Weights that cannot be had, or are not those they were; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A place where a weight file is, or was.

    Attributes:
        kind: One of `KINDS`.
        state: One of `STATES`.
        url: Direct address.
        repo: Repository of the Hugging Face hub instead.
        file: File name, as far as published.
        size: Bytes, if known.
        sha256: Hash, if known.
        reported: Date of what ``state`` says, ``YYYY-MM`` or ``YYYY-MM-DD``.
        page: Page for people.
    """

    kind: str
    state: str
    url: str | None = None
    repo: str | None = None
    file: str | None = None
    size: int | None = None
    sha256: str | None = None
    reported: str | None = None
    page: str | None = None

    @property
    def fetchable(self) -> bool:
        """Whether there is an address to try."""
        return self.state in ("listed", "derived")

    @property
    def name(self) -> str:
        """The file's name in the cache."""
        return self.file or "weights"

    @property
    def address(self) -> str:
        """What to show of it."""
        if self.state == "shipped":
            return str(self.path)
        return f"hub: {self.repo}" if self.repo else self.url or self.page

    @property
    def path(self) -> Path:
        """Where a file of this package lies."""
        return SHIPPED / self.name


@dataclasses.dataclass(frozen=True)
class Checked:
    """What somebody found who opened a weight file, as `foveate weights verify --card` writes it.

    Attributes:
        date: When, ``YYYY-MM-DD``.
        by: Who: where the report is to be read.
        difference: Greatest absolute difference of the outputs to those of the authors' code, if compared.
        measured: Metrics, as the authors name theirs; empty if none were measured.
    """

    date: str
    by: str
    difference: float | None = None
    measured: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Weights:
    """A published weight file.

    Attributes:
        name: ``model.tag``.
        task: ``classify``, ``detect`` or ``segment``; ``other`` is of a model that isn't here, which its note tells of.
        data: Data set of the training.
        sources: Where it is, in the order of trust.
        page: Page to visit when all else fails.
        stated: The authors' numbers.
        license: SPDX name, or None if the authors state none.
        head: Kind of the detector or segmenter.
        schedule: Which of several trainings.
        note: What else one has to know.
        options: Of the segmenter's head, what its file doesn't tell.
        checked: What was found in the file whose hash the sources give; None if nobody has reported to have opened it.
    """

    name: str
    task: str
    data: str
    sources: tuple[Source, ...]
    page: str
    stated: dict[str, float] = dataclasses.field(default_factory=dict)
    license: str | None = None
    head: str | None = None
    schedule: str | None = None
    note: str | None = None
    options: dict[str, int] = dataclasses.field(default_factory=dict)
    checked: Checked | None = None

    @property
    def model(self) -> str:
        """The model's registered name."""
        return self.name.partition(".")[0]

    @property
    def state(self) -> str:
        """The best of its sources' states."""
        return min((source.state for source in self.sources), key=STATES.index)

    @property
    def reported(self) -> str | None:
        """Date of that state, if it is known of any source."""
        return next(
            (source.reported for source in self.sources if source.state == self.state and source.reported), None
        )


@functools.cache
def table() -> dict[str, Weights]:
    """Return every published weight file by name."""
    rows = json.loads(Path(__file__).with_name("weights.json").read_text(encoding="utf-8"))
    return {name: _entry(name, row) for name, row in rows.items()}


def _entry(name: str, row: dict) -> Weights:
    checked = Checked(**row["checked"]) if "checked" in row else None
    sources = tuple(Source(**source) for source in row["sources"])
    return Weights(name=name, **row | {"sources": sources, "checked": checked})


def published_cfg(name: str) -> dict:
    """Return what timm's table of a model shall say about the weights ``name``.

    Only links that the authors list, of weights whose license they state, are given, since timm advertises such models
    as pretrained; `fetch` tries the others all the same.
    """
    weights = table()[name]
    if weights.state == "shipped":
        return {"file": str(weights.sources[0].path), "license": weights.license, "notes": (weights.note,)}
    links = [source for source in weights.sources if source.state == "listed" and weights.license]
    direct = next((source.url for source in links if source.url), None)
    hub = next((source.repo for source in links if source.repo), None)
    top1 = weights.stated.get("top-1")
    notes = [f"ImageNet-1k top-1 {top1} (authors)"] if top1 else []
    where = {"url": direct} if direct else {"hf_hub_id": hub} if hub else {}
    return where | {"license": weights.license, "notes": (*notes, *filter(None, [weights.note]))}


def find(name: str) -> Weights:
    """Return the weights called ``name``, a ``model.tag``, or a model with one published classifier.

    Raises:
        WeightsError: If there are none; the message names the nearest.
    """
    if name in table():
        return table()[name]
    tags = [other for other in table() if other.partition(".")[0] == name]
    if not tags:
        near = difflib.get_close_matches(name, table(), n=1)
        raise WeightsError(
            f"no published weights are called {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    classifiers = [tag for tag in tags if table()[tag].task == "classify"]
    if len(classifiers) == 1:
        return table()[classifiers[0]]
    raise WeightsError(f"{name} has several published weights; name one of {', '.join(tags)}")


def read(reference: str | Path | Checkpoint, cache_dir: str | Path | None = None) -> Checkpoint:
    """Return the checkpoint that ``reference`` means, of a file that is read here once; arguments as those of `locate`.

    Raises:
        WeightsError: If there is no such file, or it can't be had.
        CheckpointError: If it can't be read.
    """
    return open_checkpoint(reference if isinstance(reference, Checkpoint) else _located(str(reference), cache_dir))


def locate(reference: str | Path, cache_dir: str | Path | None = None) -> Path:
    """Return the file that ``reference`` means, downloaded if it has to be.

    Args:
        reference: A path; an http address, after which ``#sha256=...`` may state the hash; or a ``model.tag``.
        cache_dir: Where downloads are kept instead of the usual place.

    Raises:
        WeightsError: If there is no such file, or it can't be had.
    """
    return _path_of(_located(str(reference), cache_dir))


def _located(text: str, cache_dir: str | Path | None) -> Path | Checkpoint:
    """Return the file that ``text`` means; it is read already if it has just come."""
    if text.startswith(("http://", "https://")):
        return _fetched(entry_of(text), cache_dir)
    try:
        if Path(text).exists():
            return Path(text)
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{text[:80]}: is no name of a file ({getattr(error, 'strerror', None) or error})"
        ) from error
    if text in table():
        return _fetched(table()[text], cache_dir)
    near = difflib.get_close_matches(text, table(), n=1, cutoff=0.8)
    raise WeightsError(f"{text}: no such file" + (f"; did you mean the weights {near[0]!r}?" if near else ""))


def _path_of(file: Path | Checkpoint) -> Path:
    return file.path if isinstance(file, Checkpoint) else file


def entry_of(address: str) -> Weights:
    """Return an entry, as of the table, for the file at an address, after which ``#sha256=...`` may state the hash."""
    url, _, fragment = address.partition("#")
    sha256 = fragment.removeprefix("sha256=").lower() if fragment.startswith("sha256=") else None
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise WeightsError(f"{shown(url)}: a sha256 has 64 hexadecimal digits")
    try:
        file = urllib.parse.urlsplit(url).path.rpartition("/")[2]
    except ValueError as error:
        raise WeightsError(f"{shown(url)}: makes no sense as an address ({first_line(error)})") from error
    # Every file system takes 200 letters of ASCII, with what a part's name adds.
    file = file if re.fullmatch(r"\w[\w.+-]{,199}", file, re.ASCII) else None
    name = f"url-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    return Weights(name, "unknown", "unknown", (Source("url", "listed", url, file=file, sha256=sha256),), url)


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the folder of all downloads but the hub's."""
    return Path(cache_dir or Path(torch.hub.get_dir()) / "checkpoints") / "foveate"


def cached(weights: Weights, cache_dir: str | Path | None = None) -> Path | None:
    """Return the weights' file if it is here already, and is what it was when it came.

    Raises:
        WeightsError: If it has changed since, or can't be these weights.
    """
    file = _cached(weights, cache_dir)
    return None if file is None else _path_of(file)


def _cached(weights: Weights, cache_dir: str | Path | None) -> Path | Checkpoint | None:
    """Return the weights' file if it is here; it is read already if nothing was recorded of it yet."""
    for source in weights.sources:
        if source.state == "shipped":
            return _shipped(source)
        path = cache_folder(cache_dir) / weights.name / source.name
        if not path.is_file() and source.repo:
            from huggingface_hub import try_to_load_from_cache

            path = try_to_load_from_cache(source.repo, source.name, cache_dir=cache_dir)
        if isinstance(path, str | Path) and Path(path).is_file():
            return _pinned(weights, source, Path(path), cache_dir)
    return None


def _shipped(source: Source) -> Path:
    """Return a file of this package; neither cache nor network is asked for it."""
    if not source.path.is_file() or sha256_of(source.path) != source.sha256:
        raise WeightsError(f"{source.path}: is missing or damaged; install foveate again")
    return source.path


def fetch(weights: Weights, cache_dir: str | Path | None = None, renew: bool = False) -> Path:
    """Return the weights' file, from the cache, the mirror or the first source that gives it.

    Args:
        weights: Which.
        cache_dir: Where to keep it instead of the usual place.
        renew: Whether to fetch it again even if it is here, and to take the new file for the right one.

    Raises:
        WeightsError: If it can't be had; the message says why, and which page to visit.
    """
    return _path_of(_fetched(weights, cache_dir, renew))


def _fetched(weights: Weights, cache_dir: str | Path | None = None, renew: bool = False) -> Path | Checkpoint:
    """Return the weights' file, which is read already if it has just come."""
    if (not renew or weights.state == "shipped") and (file := _cached(weights, cache_dir)):
        return file
    if weights.license is None and weights.sources[0].kind != "url":
        _logger.warning(f"{weights.name}: its authors state no license; ask them before you use it")
    elif weights.license in _CONDITIONS:
        _logger.warning(f"{weights.name}: its license is {weights.license}: {_CONDITIONS[weights.license]}")
    folder = cache_folder(cache_dir) / weights.name
    addresses, failures = list(_addresses(weights)), []
    # A file of a mirror's folder is used where it is, and needs no cache that can be written.
    here = [pair for pair in addresses if _is_path(pair[1])]
    for source, address in here:
        if fetched := _try(weights, source, address, folder, renew, cache_dir, failures):
            return fetched
    if len(here) == len(addresses):
        raise _failure(weights, folder, failures)
    with _alone(folder / ".lock", f"{weights.name} is being fetched by another process; waiting for it"):
        # Another process may have fetched it meanwhile.
        if not renew and (file := _cached(weights, cache_dir)):
            return file
        for source, address in addresses[len(here) :]:
            if fetched := _try(weights, source, address, folder, renew, cache_dir, failures):
                return fetched
    raise _failure(weights, folder, failures)


def _try(
    weights: Weights,
    source: Source,
    address: str,
    folder: Path,
    renew: bool,
    cache_dir: str | Path | None,
    failures: list[str],
) -> Checkpoint | None:
    """Return what an address gives, which is recorded; if it gives nothing, ``failures`` get the reason."""
    try:
        fetched = _fetch_from(weights, source, address, folder, renew, cache_dir)
        _pinned(weights, source, fetched.path, cache_dir, address, renew)
        return fetched
    except DownloadError as error:
        failures.append(f"{shown(address)}: {error}")
        return None


def _is_path(address: str) -> bool:
    return not address.startswith(("hub: ", "http://", "https://"))


def _failure(weights: Weights, folder: Path, failures: list[str]) -> WeightsError:
    """Return the error that says what was tried, and what to do."""
    if not any(source.fetchable for source in weights.sources):
        when = f" ({weights.reported})" if weights.reported else ""
        reason = "its links are reported dead" if weights.state == "dead" else "only a browser can fetch it"
        failures.append(reason + when)
    elif _offline():
        tried = "".join(f"; {failure}" for failure in failures)
        return WeightsError(
            f"{weights.name} is not in {folder}, and HF_HUB_OFFLINE forbids to fetch it; run "
            f"`foveate weights fetch {weights.name}` where there is a network{tried}"
        )
    changed = any("wrong file" in failure for failure in failures)
    renewal = f", or run `{_renewal(weights)}` if the new file is right" if changed else ""
    return WeightsError(f"{weights.name} can't be had: {'; '.join(failures)}; {_way_out(weights)}{renewal}")


def _renewal(weights: Weights) -> str:
    """Return the command that fetches a file again."""
    name = shown(weights.page) if weights.sources[0].kind == "url" else weights.name
    return f"foveate weights fetch --renew {name}"


def _way_out(weights: Weights) -> str:
    if weights.sources[0].kind == "url":
        return "check the address"
    return (
        f"visit {weights.page} and give the file (train: model.checkpoint=FILE, export: --checkpoint FILE, Python: "
        "checkpoint=FILE), or set FOVEATE_WEIGHTS_MIRROR"
    )


def _offline() -> bool:
    settings = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(setting.upper() in ("1", "ON", "YES", "TRUE") for setting in settings)


def _addresses(weights: Weights) -> Iterator[tuple[Source, str]]:
    """Yield what to try, as source and address."""
    mirror = os.environ.get("FOVEATE_WEIGHTS_MIRROR", "").rstrip("/")
    remote = mirror.startswith(("http://", "https://"))
    if mirror and weights.sources[0].kind != "url" and not (remote and _offline()):
        for file in dict.fromkeys(source.name for source in weights.sources):
            source = next(source for source in weights.sources if source.name == file)
            yield source, f"{mirror}/{weights.name}/{file}"
    if not _offline():
        for source in weights.sources:
            if source.fetchable:
                yield source, source.address


def _fetch_from(
    weights: Weights,
    source: Source,
    address: str,
    folder: Path,
    renew: bool,
    cache_dir: str | Path | None,
) -> Checkpoint:
    pin = {} if renew else pins(cache_dir).get(f"{weights.name}/{source.name}", {})
    sha256 = source.sha256 or pin.get("sha256")
    if address.startswith("hub: "):
        from huggingface_hub import constants, hf_hub_download

        if not _offline():
            check_host(constants.ENDPOINT)
        try:
            path = Path(hf_hub_download(source.repo, source.name, cache_dir=cache_dir, force_download=renew))
        except Exception as error:
            # The errors of the HTTP library below have no base class that it names.
            raise DownloadError(first_line(error)) from error
        return _checked(weights, path, sha256)
    if _is_path(address):
        path = Path(address)
        if not path.is_file():
            raise DownloadError("no such file")
        return _checked(weights, path, sha256)
    path = folder / source.name
    check = functools.partial(_checked, weights)
    return dataclasses.replace(download(address, path, source.size, sha256, check), path=path)


def _checked(weights: Weights, path: Path, sha256: str | None = None) -> Checkpoint:
    """Read a file; raise a DownloadError unless it is a whole and safe checkpoint of these weights' model.

    If a hash is given, it must have that.
    """
    if sha256 is not None and (actual := sha256_of(path)) != sha256:
        raise DownloadError(f"wrong file: its sha256 is {actual}, not {sha256}")
    with open(path, "rb") as file:
        start = file.read(64)
    if start.lstrip()[:1] == b"<":
        raise DownloadError("the host answers with a web page, not with the file")
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        raise DownloadError(str(error).removeprefix(f"{path}: ")) from error
    if fault := _fault_of(weights, checkpoint):
        raise DownloadError(fault)
    return checkpoint


def _fault_of(weights: Weights, checkpoint: Checkpoint) -> str | None:
    """Return why a file can't be these weights, by the names and shapes in it; None if it can be."""
    # That file builds models, which load their weights by this one.
    from .variants import identity_fault

    return identity_fault(weights.model, weights.task, checkpoint)


def pins(cache_dir: str | Path | None = None) -> dict[str, dict]:
    """Return what every file was on its first use, by ``model.tag/file``: sha256, size, date and address."""
    path = cache_folder(cache_dir) / "pins.json"
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(records, dict) or not all(_is_pin(record) for record in records.values()):
            raise ValueError("no records")
        return records
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        # After a loss of power, say. It stays to be looked at.
        aside = path.with_name("pins.broken.json")
        with contextlib.suppress(OSError):
            os.replace(path, aside)
        _logger.warning(
            f"{path}: can't be read ({first_line(error)}); it is {aside.name} now, and files are taken anew"
        )
        return {}


def _is_pin(record: object) -> bool:
    return isinstance(record, dict) and isinstance(record.get("sha256"), str) and isinstance(record.get("date"), str)


def _pinned(
    weights: Weights,
    source: Source,
    path: Path,
    cache_dir: str | Path | None,
    address: str | None = None,
    renew: bool = False,
) -> Path | Checkpoint:
    """Return ``path`` if it is what it was on its first use, which is recorded if this is it.

    On its first use, a file for which no address is given is read, and must be one of the weights' model.
    """
    key = f"{weights.name}/{source.name}"
    known = None if renew else pins(cache_dir).get(key)
    status = path.stat()
    # The last is of the file's entry, which nobody can set back.
    seen = {"size": status.st_size, "changed": status.st_mtime_ns, "entry": status.st_ctime_ns}
    if known and source.sha256 and known.get("sha256") != source.sha256:
        raise WeightsError(
            f"{path}: its sha256 is {known.get('sha256')}, not {source.sha256} as asked for; run "
            f"`{_renewal(weights)}`, or check the hash"
        )
    if known and all(known.get(name) == value for name, value in seen.items()):
        return path
    actual = sha256_of(path)
    expected, since = (known["sha256"], f"on {known['date']}") if known else (source.sha256, "by its publisher")
    if expected and actual != expected:
        raise WeightsError(
            f"{path}: has changed: its sha256 is {actual}, but {expected} was recorded {since}; run "
            f"`{_renewal(weights)}`"
        )
    file: Path | Checkpoint = path
    if not known and address is None:
        file = open_checkpoint(path)
        if fault := _fault_of(weights, file):
            raise WeightsError(f"{path}: {fault}; run `{_renewal(weights)}`, or remove the file")
    today = known["date"] if known else datetime.date.today().isoformat()
    came_from = shown(address) if address else (known or {}).get("address")
    record = {"sha256": actual, **seen, "date": today, "address": came_from}
    _write_pins(cache_dir, {key: record})
    return file


def _write_pins(cache_dir: str | Path | None, changes: dict[str, dict]) -> None:
    folder = cache_folder(cache_dir)
    try:
        with _alone(folder / ".pins.lock", "waiting for another process to record its weights"):
            records = pins(cache_dir) | changes
            temporary = folder / ".pins-new.json"  # the lock's holder alone writes it, over what a killed one left
            try:
                with open(temporary, "w", encoding="utf-8") as file:
                    file.write(json.dumps(records, indent=1))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, folder / "pins.json")
            except OSError as error:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise WeightsError(f"{folder / 'pins.json'}: can't be written ({error.strerror})") from error
    except WeightsError as error:
        # A cache may be read-only, and its files are used all the same.
        _logger.warning(f"{error}: hashes are not recorded")


def _patience() -> float:
    """Return for how many seconds another process is waited for."""
    text = os.environ.get("FOVEATE_WEIGHTS_WAIT", "600")
    try:
        return max(0.0, float(text))
    except ValueError:
        raise WeightsError(f"FOVEATE_WEIGHTS_WAIT is {text!r}, but must be seconds, such as 600") from None


@contextlib.contextmanager
def _alone(path: Path, message: str) -> Iterator[None]:
    """Keep other processes out as long as the context lasts."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(f"{path.parent} can't be written ({error.strerror}); set TORCH_HOME to another") from error
    lock = FileLock(path)
    try:
        lock.acquire(timeout=2)
    except Timeout:
        _logger.warning(message)
        patience = _patience()
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            raise WeightsError(
                f"{path.parent}: another process has kept it for {patience:g} seconds; end that one, or set "
                "FOVEATE_WEIGHTS_WAIT to more seconds"
            ) from None
    except OSError as error:  # of a folder that can't be written, or knows no locks
        raise WeightsError(f"{path.parent} can't be locked ({error.strerror}); set TORCH_HOME to another") from error
    try:
        yield
    finally:
        lock.release()
