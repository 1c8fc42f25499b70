"""The command `foveate`: finds the command asked for, and turns expected errors into one line."""

import argparse
import contextlib
import ctypes
import difflib
import importlib
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

# Name, and what it does. A command is a module of that name, with add_arguments(parser) and run(args).
COMMANDS = {
    "demo": "train, evaluate and predict on the bundled digits, with pictures, in about a minute",
    "train": "train a model as a recipe says",
    "eval": "measure a checkpoint on held-out data",
    "predict": "find what is in images: classes, objects, regions; with pictures and JSON",
    "curves": "draw and compare the learning curves of runs",
    "data": "check a data set before it is trained on, or convert it: COCO, YOLO",
    "browse": "look at the training data as the model sees it, after augmentation",
    "recipes": "list the recipes: model, data, what they were run on, result",
    "config": "print a recipe with every setting, overrides applied",
    "export": "write a model for use elsewhere: ONNX, torch.export, safetensors",
    "list": "list the models",
    "info": "describe a model: cost, inputs, weights, recipes",
    "weights": "list, fetch, verify, convert and publish weights",
    "attend": "see what attention uses on an image, measure heads, judge explanations",
    "probe": "measure what frozen models know: k-NN, linear and attentive probes on their features",
    "embed": "write the embeddings of a folder's images for other tools: npz, parquet",
    "compare": "train and time one host with every attention of foveate",
    "bench": "time our kernels and models against their peers on this machine",
    "run": "run a script of timm's, such as its train.py, with our models registered",
}

_LONGEST = 255  # bytes of a name, with every usual file system

EXAMPLES = """\
examples, each on the bundled data; the later ones use what the first ones left:
  foveate demo --output runs/demo
  foveate train classify/nat_atto_digits epochs=3 --output runs/digits
  foveate eval classify/nat_atto_digits runs/digits/best.pth
  foveate predict runs/demo/heldout --checkpoint runs/digits/best.pth
  foveate curves runs/demo/run runs/digits
  foveate export runs/digits/best.pth runs/digits/model.pt2"""


class _Parser(argparse.ArgumentParser):
    """Answers a wrong argument in one line."""

    def error(self, message: str):
        option = re.match(r"unrecognized arguments: --([a-z][\w.]*)[ =](\S+)$", message)
        if option and any(action.metavar == "KEY=VALUE" for action in self._actions):
            message += f"; settings are given as {option[1]}={option[2]}"
        message = _printable(message)
        self.exit(2, f"foveate: error: {message}; see `{self.prog} --help`\n")


def usage() -> str:
    """Return what `foveate` prints when it is given nothing to do."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return (
        "usage: foveate COMMAND ...   (foveate COMMAND --help says more, foveate --version which this is)\n\n"
        f"commands:\n{commands}\n\n{EXAMPLES}"
    )


def _share_cores() -> None:
    """Say how long OpenMP's threads spin while they wait, unless the user has; it reads this as torch loads it."""
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    # Who spins starves whoever shares the cores; who sleeps at once takes twice as long for a small model's steps.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if hasattr(os, "getloadavg") and os.getloadavg()[0] < (os.cpu_count() or 1):
        os.environ["GOMP_SPINCOUNT"] = "3000"


# Of glibc's malloc.h, and the most it takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = (-1, 2**31 - 1), (-3, 2**25)


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory, up to 2 GB, unless the user has set how its malloc works.

    It gives it back to the system after every step, from which it comes back as fresh pages, a fault and zeros each.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    with contextlib.suppress(OSError, TypeError, AttributeError):  # no glibc here
        mallopt = ctypes.CDLL(None).mallopt
        for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(*option)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments after ``foveate``; those of the process by default.

    Returns:
        Exit code: 0; 2 if something that was asked for can't be done; 130 if interrupted; 141 if nobody
        reads on.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "torch" not in sys.modules and argv[:1] != ["bench"]:  # which measures what users of the library get
        _share_cores()
        _keep_freed_memory()
    if "matplotlib" not in sys.modules:
        # Pictures are written, not shown; a notebook's own choice is one that this process may not have.
        os.environ["MPLBACKEND"] = "agg"
    warnings.formatwarning = _warning_in_a_line
    try:
        return _run(argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Who read the output, such as `head`, has enough; Python would complain of what is left in its buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"foveate {version('foveate')}")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(COMMANDS)}"
        return _fail(f"unknown command {name!r}; {hint}")

    command = importlib.import_module(f".{name}", __package__)
    parser = _Parser(
        prog=f"foveate {name}", description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_arguments(parser)
    for before, argument in zip(["", *argv], argv, strict=False):
        if argument == "--output=" or (not argument and before == "--output"):
            return _fail("--output is empty; name a folder or a file")
    try:
        # argparse can't mix the arguments of a command with those of its action, or of a script.
        mixed = not hasattr(command, "ACTIONS") and name != "run"
        parse = parser.parse_intermixed_args if mixed else parser.parse_args
        arguments = parse(argv[1:])
        if reason := _strange_path(arguments):
            return _fail(reason)
        if name == "run":
            return command.run(arguments) or 0
        with contextlib.redirect_stdout(_Printable(sys.stdout)):
            return command.run(arguments) or 0
    except SystemExit as stop:
        return stop.code
    except Exception as error:
        # These import torch; whatever raised one of them has done so.
        from ..tasks import TaskError
        from ..tasks.extras import missing
        from ..zoo import BackboneError, CheckpointError, UnknownModelError

        if isinstance(error, ModuleNotFoundError) and (reason := missing(error.name)) is not None:
            return _fail(reason)
        if not isinstance(error, TaskError | BackboneError | CheckpointError | UnknownModelError):
            raise
        return _fail(str(error))


_PACKAGE = Path(__file__).parents[1]
_format_warning = warnings.formatwarning


def _warning_in_a_line(message, category, filename: str, lineno: int, line: str | None = None) -> str:
    """Return a warning of ours to a user without the line of code that it comes from, and others as Python does."""
    if category is UserWarning and Path(filename).is_relative_to(_PACKAGE):
        return f"foveate: note: {_printable(' '.join(str(message).split()))}\n"
    return _format_warning(message, category, filename, lineno, line)


def _fail(message: str) -> int:
    # Some libraries put several lines into a message.
    print(f"foveate: error: {_printable(' '.join(message.split()))}", file=sys.stderr)
    return 2


def _strange_path(arguments: argparse.Namespace) -> str | None:
    """Return what is wrong with a path among the arguments that no file system takes."""
    for name, value in vars(arguments).items():
        for path in value if isinstance(value, list) else [value]:
            if not isinstance(path, Path):
                continue
            if "\0" in str(path):
                return f"{name}: {str(path)[:60]!r} is no path: it holds a NUL"
            if any(len(os.fsencode(part)) > _LONGEST for part in path.parts):
                return f"{name}: {str(path)[:60]}... is no path: a name has at most {_LONGEST} bytes"
    return None


def _printable(text: str) -> str:
    from ..tasks import printable

    return printable(text)


class _Printable:
    """A stream in whose lines names of others, of files or classes, can't command the terminal."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write."""
        return self._stream.write(_printable(text))

    def __getattr__(self, name: str):
        return getattr(self._stream, name)
