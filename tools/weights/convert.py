"""Write any published file as safetensors, with a note of what it is."""

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--model", metavar="NAME", help="model of the file, where it can't be found out")
    parser.add_argument("--setting", help="dense setting of a backbone alone; the model's first by default")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="file.safetensors")


def run(args: argparse.Namespace) -> None:
    from importlib.metadata import version

    import torch
    from safetensors.torch import load_file, save_file

    from ...tasks import TaskError
    from ...tasks.checkpoints import write_whole
    from .contents import load_contents

    if args.output.suffix != ".safetensors":
        raise TaskError(f"{args.output}: the result is a file of safetensors; name it {args.output.stem}.safetensors")
    contents = load_contents(args.file, args.model, args.setting)
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
        "license": (file.entry.license if file.entry else None) or "",
        "source": file.path.name,
        "source_sha256": file.sha256,
        "report": contents.report(),
        "foveate": json.dumps(contents.card()),
        "writer": f"foveate {version('foveate')}",
    }

    def write(path: str) -> None:
        save_file(state, path, metadata)
        written = load_file(path)
        if written.keys() != state.keys() or not all(torch.equal(written[key], state[key]) for key in state):
            raise TaskError(f"{args.output}: what was written is not what was read; the disk may be failing")

    write_whole(args.output, write)
    print(f"{args.output}: {contents.title}, {len(state)} tensors; {contents.report()}")
