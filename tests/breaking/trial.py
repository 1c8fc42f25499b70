"""Tries of one part: counted by kind, stopped when they hang, and judged."""

import contextlib
import io
import os
import pickle
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from foveate.tasks import TaskError
from foveate.tools.cli import main
from foveate.zoo import BackboneError, CheckpointError, UnknownModelError

# What a refusal is.
REFUSALS = (TaskError, CheckpointError, BackboneError, UnknownModelError)


class Wrong(AssertionError):
    """What must not come of a try."""


class Trial:
    """Tries of one part.

    Attributes:
        draw: Source of everything random.
        folder: An empty folder.
        faults: What went wrong, with the number of its try.
    """

    def __init__(self, part: str, seed: int, seconds: float, most: int, folder: Path):
        self.part, self.seed, self.most, self.folder = part, seed, most, folder
        self.draw = random.Random(f"{part} {seed}")
        self.faults: list[str] = []
        self._tried, self._wrong = Counter(), Counter()
        self._end = time.monotonic() + seconds

    def numbers(self) -> Iterator[int]:
        """Yield numbers of tries until the time is over; what a try draws depends on seed and number alone."""
        for number in range(self.most):
            if time.monotonic() > self._end:
                return
            self.draw = random.Random(f"{self.part} {self.seed} {number}")
            yield number

    def note(self, kind: str, number: int, fault: str | None) -> None:
        """Count a try."""
        self._tried[kind] += 1
        if fault is not None:
            self._wrong[kind] += 1
            self.faults.append(f"{kind}, seed {self.seed}, try {number}: {fault}")
            print(f"{self.part}: {self.faults[-1]}", file=sys.stderr, flush=True)

    def check(self, kind: str, number: int, function: Callable[[], Any], limit: int = 120) -> None:
        """Count a call, which may refuse what it is given, in one line, and must end in time."""

        def stop(*_):
            raise Wrong(f"hangs for {limit} seconds")

        before = signal.signal(signal.SIGALRM, stop)
        signal.alarm(limit)
        fault = None
        try:
            function()
        except REFUSALS as error:
            fault = "a refusal of several lines" if "\n" in str(error) else None
        except Wrong as error:
            fault = str(error)
        except BaseException:
            fault = " | ".join(traceback.format_exc().strip().splitlines()[-3:])
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        self.note(kind, number, fault)

    def table(self) -> str:
        """Return rows of kinds, tries and faults."""
        return "".join(
            f"| {self.part} | {kind} | {count} | {self._wrong[kind]} |\n" for kind, count in self._tried.items()
        )


def command(*argv: str | Path) -> None:
    """Run a command, which must end with 0, or 2 and one line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(part) for part in argv])
    lines = [line for line in err.getvalue().splitlines() if line.startswith("foveate: error: ")]
    if code == 2 and not lines:
        raise Wrong(f"{argv[0]} fails without a line")
    if code not in (0, 2) or "Traceback" in err.getvalue():
        raise Wrong(f"{argv[0]} ends with {code}: {err.getvalue()[-300:]!r}")
    if "\x1b" in out.getvalue() + err.getvalue():
        raise Wrong(f"{argv[0]} lets commands reach the terminal")


def apart(function: Callable[[], Any], limit: float = 120.0) -> Any:
    """Call a function in a process of its own and return what it returns; raise what it raises, or that it died."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.close(reading)
            try:
                answer = ("returned", function())
            except REFUSALS as error:
                answer = ("refused", str(error))
            except BaseException:
                answer = ("raised", " | ".join(traceback.format_exc().strip().splitlines()[-3:]))
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(answer, pipe)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    end, content = time.monotonic() + limit, b""
    try:
        with os.fdopen(reading, "rb") as pipe:
            os.set_blocking(reading, False)
            while time.monotonic() < end and (part := pipe.read()) != b"":
                content += part or b""
                time.sleep(0.01)
    finally:
        ended, status = os.waitpid(process, 0 if content else os.WNOHANG)
        if not ended:
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
    if not content:
        raise Wrong(f"ends the process with signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "dies")
    kind, answer = pickle.loads(content)
    if kind == "refused":
        raise TaskError(answer)
    if kind == "raised":
        raise Wrong(answer)
    return answer
