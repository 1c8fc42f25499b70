"""Write any published file as safetensors, with a note of what it is."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from .contents import Contents


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--model", metavar="NAME", help="model of the file, where it can't be found out")
    parser.add_argument("--setting", help="dense setting of a backbone alone; the model's first by default")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="file.safetensors")


def run(args: argparse.Namespace) -> None:
    from ...tasks import TaskError
    from .contents import load_contents

    if args.output.suffix != ".safetensors":
        raise TaskError(f"{args.output}: the result is a file of safetensors; name it {args.output.stem}.safetensors")
    contents = load_contents(args.file, args.model, args.setting)
    count = save_contents(contents, args.output)
    print(f"{args.output}: {contents.title}, {count} tensors; {contents.report()}")


def save_contents(contents: "Contents", path: Path, license: str | None = None) -> int:
    """Write a model as safetensors, with a note of what it is, and return the number of its tensors.

    Args:
        contents: The model.
        path: File to write.
        license: SPDX name; that of the published weights by default.

    Raises:
        TaskError: If the file can't be written, or isn't what was written when it is read again.
    """
    from importlib.metadata import version

    file = contents.file
    state = {key: value.detach().cpu().contiguous().clone() for key, value in contents.state().items()}
    metadata = {
        "format": "pt",
        "model": contents.name,
        "task": contents.task,
        "head": contents.head,
        "setting": contents.setting or "",
        "num_classes": str(getattr(contents.model, "num_classes", "")),
        "weights": file.entry.name if file.entry else "",
        "license": license or (file.entry.license if file.entry else None) or "",
        "source": file.path.name,
        "source_sha256": file.sha256,
        "report": contents.report(),
        "foveate": json.dumps(contents.card()),
        "writer": f"foveate {version('foveate')}",
    }
    save_state(state, path, metadata)
    return len(state)


def save_state(state: "dict[str, Tensor]", path: Path, metadata: dict[str, str]) -> None:
    """Write tensors as safetensors, and read them again.

    Raises:
        TaskError: If the file can't be written, or isn't what was written when it is read again.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from ...tasks import TaskError
    from ...tasks.checkpoints import write_whole

    def write(temporary: str) -> None:
        save_file(state, temporary, metadata)
        written = load_file(temporary)
        if written.keys() != state.keys() or not all(torch.equal(written[key], state[key]) for key in state):
            raise TaskError(f"{path}: what was written is not what was read; the disk may be failing")

    write_whole(path, write)
