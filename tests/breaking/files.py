"""Strange checkpoints: refused in one line, or read as what was written; never run, never the end of the process."""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch
from foveate.zoo.checkpoint import open_checkpoint
from foveate.zoo.loading import create_model
from safetensors.torch import save_file
from trial import Trial, Wrong, apart

MODEL = "foveate_host_atto"


def run(trial: Trial) -> None:
    state = create_model(MODEL).state_dict()
    content = {"state_dict": state, "epoch": 3, "args": {"lr": np.float64(0.1)}, "history": [1.5] * 9}
    whole, path, marker = trial.folder / "whole.pth", trial.folder / "strange.pth", trial.folder / "ran"
    torch.save(content, whole)
    kinds = {
        "flipped bits": lambda draw: _flip(draw, whole.read_bytes()),
        "cut or joined": lambda draw: _cut(draw, whole.read_bytes()),
        "changed opcodes": lambda draw: _changed_pickle(draw, whole),
        "pickles of code": lambda draw: _code(draw, whole, marker),
        "bare pickles": lambda draw: _bare(draw, state, marker),
        "strange contents": lambda draw: _saved(_strange(draw, content)),
        "strange NumPy states": lambda draw: _numpy(draw, whole),
        "safetensors": lambda draw: _safetensors(draw, state, trial.folder),
    }
    for number in trial.numbers():
        kind = list(kinds)[number % len(kinds)]
        path.write_bytes(kinds[kind](trial.draw))
        trial.check(kind, number, lambda: apart(lambda: _read(path, state)))
        if marker.exists():
            marker.unlink()
            trial.note(kind, number, "ran code")


def _read(path: Path, state: dict) -> None:
    """Load a file; where that succeeds, its weights are the ones written, or those that it was given anew."""
    opened = open_checkpoint(path)
    if path.stat().st_size and opened.content.get("changed") is None and set(opened.state) == set(state):
        different = [key for key, value in opened.state.items() if not torch.equal(value, state[key])]
        if different:
            raise Wrong(f"other weights are read as {different[0]}")
    create_model(MODEL, opened)


def _flip(draw, content: bytes) -> bytes:
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 9))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def _cut(draw, content: bytes) -> bytes:
    first, second = sorted(draw.randrange(len(content)) for _ in range(2))
    return draw.choice(
        (content[:first], content[first:], content[:first] + content[second:], content + content[:first])
    )


def _with_pickle(whole: Path, change) -> bytes:
    """Return an archive whose pickle is changed, with the right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(out, "w") as changed:
        for name in archive.namelist():
            content = archive.read(name)
            changed.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return out.getvalue()


def _changed_pickle(draw, whole: Path) -> bytes:
    def change(content: bytes) -> bytes:
        # What is told by other weights of the same names is that it was changed.
        content = bytearray(content.replace(b"epoch", b"changed"[:5]))
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(2, len(content))
            how = draw.randrange(3)
            if how == 0:
                content[place] = draw.randrange(256)
            elif how == 1:
                del content[place : place + draw.randint(1, 9)]
            else:
                content[place:place] = bytes(draw.choices(b"}])(.tRbcq0NKMJX\x93\x85\x86\x87", k=draw.randint(1, 5)))
        return bytes(content)

    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_with_pickle(whole, change))) as archive, zipfile.ZipFile(out, "w") as changed:
        for name in archive.namelist():
            changed.writestr(name, archive.read(name))
    return out.getvalue()


def _call(draw, marker: Path) -> bytes:
    """Return opcodes that call something that leaves a mark, if they are run."""
    text = f"open({str(marker)!r}, 'w').close()"
    named, argument = draw.choice(
        (
            ("os system", f"touch {marker}"),
            ("builtins exec", text),
            ("builtins eval", text),
            ("posix system", f"touch {marker}"),
        )
    )
    argument = argument.encode()
    name = "c" + named.replace(" ", "\n") + "\n"
    return name.encode() + b"X" + struct.pack("<I", len(argument)) + argument + b"\x85R"


def _code(draw, whole: Path, marker: Path) -> bytes:
    call = _call(draw, marker)
    return _with_pickle(whole, lambda content: content[:2] + call + draw.choice((b"0", b"")) + content[2:])


def _bare(draw, state: dict, marker: Path) -> bytes:
    arrays = {key: value.numpy() for key, value in list(state.items())[:5]}
    content = pickle.dumps({"model": arrays, "matching_heuristics": True}, draw.choice((2, 4)))
    how = draw.randrange(3)
    if how == 0:
        return content[:2] + _call(draw, marker) + b"0" + content[2:]
    return _flip(draw, content) if how == 1 else os.urandom(0) + bytes(draw.choices(range(256), k=draw.randint(1, 400)))


def _saved(content) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def _strange(draw, content: dict) -> dict:
    """Return a checkpoint with some of its parts replaced, doubled, or holding itself."""
    odd = [
        None,
        {},
        [],
        "x" * 99,
        -1,
        float("nan"),
        torch.zeros(0),
        torch.zeros(3, 3, dtype=torch.complex64),
        b"",
        {"model": 3},
    ]
    odd += [
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(1, device="meta"),
        torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.qint8),
    ]
    changed = {"changed": True, "state_dict": dict(content["state_dict"])}
    for _ in range(draw.randint(1, 3)):
        key = draw.choice(list(changed["state_dict"]) or ["a"])
        how = draw.randrange(6)
        if how == 0:
            changed["state_dict"][key] = draw.choice(odd)
        elif how == 1:
            changed["state_dict"][draw.choice((3, None, "\x1b[31m", "a" * 10_000, (1, 2)))] = draw.choice(odd)
        elif how == 2:
            changed["model"] = changed
        elif how == 3:
            changed[draw.choice(("state_dict", "model", "module", "card", "state_dict_ema"))] = draw.choice(odd)
            changed["state_dict"] = changed["state_dict"] if isinstance(changed.get("state_dict"), dict) else {}
        elif how == 4:
            doubled = [1]
            for _ in range(40):
                doubled = [doubled, doubled]
            changed["card"] = {"task": "classify", "model": doubled}
        else:
            changed = {"changed": True, "state_dict": {f"module.{k}": v for k, v in changed["state_dict"].items()}}
    return changed


def _numpy(draw, whole: Path) -> bytes:
    """Put a NumPy dtype or scalar with a state of any kind in front."""
    kinds = ("V4", "O8", "f4", "m8", "S3", "U2", "i8", "f2", "b1", "c8", "x")
    code = draw.choice(kinds).encode()
    dtype = b"cnumpy\ndtype\nX" + struct.pack("<I", len(code)) + code + b"\x89\x88\x87R"
    parts = [
        b"K\x03",
        b"X\x01\x00\x00\x00" + draw.choice((b"<", b"|", b">", b"=")),
        *[draw.choice((b"N", b")", b"}", b"K\x01", b"]")) for _ in range(3)],
    ]
    parts += [b"J\xff\xff\xff\xff", b"J\xff\xff\xff\xff", b"K" + bytes([draw.randrange(256)])]
    draw.randrange(2) and draw.shuffle(parts)
    state = b"(" + b"".join(parts[: draw.randint(1, 8)]) + b"tb"
    raw = bytes(draw.choices(range(128), k=draw.randint(0, 9)))
    scalar = b"cnumpy._core.multiarray\nscalar\n" + dtype + state + b"X" + struct.pack("<I", len(raw)) + raw + b"\x86R"
    strange = draw.choice((dtype + state, scalar))
    return _with_pickle(whole, lambda content: content[:2] + strange + b"0" + content[2:])


def _safetensors(draw, state: dict, folder: Path) -> bytes:
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "whole.safetensors")
    content = (folder / "whole.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    how = draw.randrange(3)
    if how == 0:  # of the numbers there is no checksum in this format
        head = bytearray(content[8 : 8 + length])
        head[draw.randrange(len(head))] = draw.randrange(256)
        return content[:8] + bytes(head) + content[8 + length :]
    if how == 1:
        return struct.pack("<Q", draw.choice((0, 1, length - 1, length + 1, 2**40, 2**63))) + content[8:]
    return content[: draw.randrange(len(content))]
