"""One run in a folder at a time."""

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .. import TaskError

_LOCK, _HOLDER = ".lock", ".lock.json"


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[str | None]:
    """Keep other runs out of a folder as long as the context lasts.

    The lock is the operating system's, which takes it from a process that ends, however it ends: none is ever stale.
    On network folders it holds between machines as far as their servers have locks; where there are none, nothing
    keeps a second run out, and that is said. Of the processes and nodes of one run the first alone holds it.

    Args:
        folder: Folder of the run, which exists.

    Yields:
        None, or what to say where nothing is locked.

    Raises:
        TaskError: If another run is going on there; the message names its process and host.
    """
    lock, holder, remark = FileLock(folder / _LOCK), folder / _HOLDER, None
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise TaskError(f"{folder}: {_describe(holder)}; wait until it has ended, or choose another --output") from None
    except (OSError, NotImplementedError) as error:
        remark = f"{folder} can't be locked ({error}): let no second run write there"
    try:
        if remark is None:
            record = {"process": os.getpid(), "machine": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S%z")}
            with contextlib.suppress(OSError):  # the check of the folder says what is wrong with it
                holder.write_text(json.dumps(record))
        yield remark
    finally:
        if remark is None:
            for file in (holder, folder / _LOCK):
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)
            lock.release()


def _describe(holder: Path) -> str:
    try:
        record = json.loads(holder.read_text())
        return (
            f"process {record['process']} on {record['machine']} has been writing a run there since {record['since']}"
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process is writing a run there"
