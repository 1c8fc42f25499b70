"""A file that was fetched stays the same: recorded hashes, the cache, a mirror, other processes."""

import hashlib
import multiprocessing
import os
from pathlib import Path

import filelock
import pytest
import timm
import torch
from foveate.zoo import variants, weights
from foveate.zoo.checkpoint import Checkpoint
from foveate.zoo.weights import Source, Weights, WeightsError, fetch

NAME = "nat_atto.somebody_in1k"


def test_a_known_hash_and_size_are_held(host, home, payload, published):
    right = hashlib.sha256(payload).hexdigest()
    address = host.address("ok/file.pth")
    with pytest.raises(WeightsError, match=f"wrong file: its sha256 is {right}, not {'0' * 64}"):
        fetch(published(address, sha256="0" * 64))
    with pytest.raises(WeightsError, match=f"has {len(payload)} bytes, not 5"):
        fetch(published(address, size=5))
    assert not (home / NAME / "file.pth").exists()
    assert fetch(published(address, sha256=right, size=len(payload))).read_bytes() == payload


def test_the_first_hash_is_recorded_and_held(host, home, payload, state, tmp_path, published):
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


def test_a_cached_file_that_was_changed_is_refused(host, home, payload, published):
    path = fetch(published(host.address("ok/file.pth")))
    os.utime(path, ns=(1, 1))
    assert fetch(published(host.address("ok/file.pth"))) == path, "touched, but the same"
    path.write_bytes(payload[:-1] + b"x")
    with pytest.raises(WeightsError, match="has changed: its sha256 is"):
        fetch(published(host.address("ok/file.pth")))


def test_the_cache_is_used_and_offline_mode_obeyed(host, home, monkeypatch, published):
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


def test_the_mirror_comes_first_and_revives_dead_links(host, home, payload, monkeypatch, tmp_path, published):
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


def _fetch(entry, results):
    try:
        results.put(fetch(entry).read_bytes())
    except Exception as error:
        results.put(repr(error))


def test_processes_share_one_download(host, home, payload, published):
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


def test_an_unwritable_cache_is_named(tmp_path, monkeypatch, published):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match=r"can't be written .*set TORCH_HOME"):
        fetch(published("http://127.0.0.1:1/file.pth"))


@pytest.mark.parametrize("content", ["", '{"a": {"sha', "[]", '{"a": 1}', "[" * 100_000])
def test_records_that_can_not_be_read_are_set_aside(content, host, home, payload, published):
    entry = published(host.address("ok/file.pth"))
    fetch(entry)
    (home / "pins.json").write_text(content)
    assert fetch(entry).read_bytes() == payload
    assert (home / "pins.broken.json").read_text() == content
    assert list(weights.pins()) == [f"{NAME}/file.pth"]


def test_what_a_killed_process_left_of_the_records_is_written_over(host, home, monkeypatch, published):
    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(weights.os, "replace", killed)
        patched.setattr(weights.os, "getpid", lambda: 1)
        with pytest.raises(KeyboardInterrupt):
            weights._write_pins(None, {})
    fetch(published(host.address("ok/file.pth")))
    assert sorted(path.name for path in home.iterdir()) == [".pins.lock", NAME, "pins.json"]


def test_a_hash_counts_for_a_file_that_is_here(host, home, payload):
    address = host.address("ok/file.pth")
    digest = hashlib.sha256(payload).hexdigest()
    assert weights.locate(f"{address}#sha256={digest}").read_bytes() == payload
    with pytest.raises(WeightsError, match=f"as asked for.*--renew {address}`"):
        weights.locate(f"{address}#sha256={'0' * 64}")


def test_a_file_of_the_same_size_and_time_is_looked_at(host, home, published):
    entry = published(host.address("ok/file.pth"))
    path = fetch(entry)
    status, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(WeightsError, match="has changed"):
        fetch(entry)


def test_another_process_is_not_waited_for_without_end(host, home, monkeypatch, published):
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


def test_another_models_file_is_not_recorded_and_the_right_one_is_taken_then(home, mirror, payload, other, published):
    entry = published("http://127.0.0.1:9/file.pth")
    file = mirror / "file.pth"
    file.write_bytes(other.read_bytes())
    with pytest.raises(WeightsError, match=rf"{file}: the checkpoint is not one of nat_atto: \d+ of \d+ entries match"):
        fetch(entry)
    assert not weights.pins()
    file.write_bytes(payload)
    assert fetch(entry) == file
    assert list(weights.pins()) == [f"{NAME}/file.pth"]


def test_a_file_put_into_the_cache_must_be_the_models(home, other, payload, published):
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


def test_a_mirrors_folder_needs_no_cache(mirror, payload, tmp_path, monkeypatch, caplog, published):
    (tmp_path / "file").write_text("no folder can be made here")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file" / "torch"))
    (mirror / "file.pth").write_bytes(payload)
    assert fetch(published("http://127.0.0.1:9/file.pth")) == mirror / "file.pth"
    assert "hashes are not recorded" in caplog.text
