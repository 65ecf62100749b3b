"""A run directory: opened by one process at a time, continued where it stopped, never mixed with anything else."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from probe.errors import ProbeError, UsageError
from probe.store.atomic import is_temporary, read_zarr, sweep, write_json, write_zarr
from probe.store.stamp import canonical, key, stamp

if TYPE_CHECKING:
    import xarray as xr

RECORD, PARTS, RESULT, LOCK = "run.json", "parts", "result.zarr", ".lock"
Keep = Callable[[str, Callable[[], "xr.Dataset"]], "xr.Dataset"]
"""Gives a part by its name, computing it only if it is not there; :meth:`Run.part` is one."""

OWN = (RECORD, PARTS, RESULT, LOCK)
RUNNING, FINISHED = "running", "finished"


class Run:
    """An open run directory; made by :func:`open_run` only.

    Attributes
    ----------
    directory
        Where it is.
    record
        What ``run.json`` says: ``key``, ``config``, ``stamp``, ``state``.
    """

    def __init__(self, directory: Path, record: dict[str, Any]) -> None:
        self.directory = directory
        self.record = record

    @property
    def finished(self) -> bool:
        """Whether the result is there."""
        return bool(self.record["state"] == FINISHED)

    @property
    def has_parts(self) -> bool:
        """Whether some part is done."""
        return any((self.directory / PARTS).glob("*.zarr"))

    def part(self, name: str, compute: Callable[[], xr.Dataset]) -> xr.Dataset:
        """Give a part of the work from disk if it was done before, else do it and keep it.

        What is returned has been read from disk in either case, so that a run that was interrupted and one that was not
        go on with the same data.

        Parameters
        ----------
        name
            Letters, digits, ``.``, ``_`` and ``-``. It has to mean the same work each time the run is opened.
        compute
            Called without arguments if the part is missing.

        Raises
        ------
        ValueError
            If the name cannot be one of a file.
        RuntimeError
            If the run is finished.
        ProbeError
            If the part cannot be written or read.
        """
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is None:
            raise ValueError(f"A part is named with letters, digits, '.', '_' and '-', not {name!r}.")
        self._check_running()
        path = self.directory / PARTS / f"{name}.zarr"
        if not path.exists():
            write_zarr(path, compute())
        return read_zarr(path)

    def finish(self, dataset: xr.Dataset) -> None:
        """Write the result, then call the run finished, then delete its parts: killed in between, nothing is lost.

        Raises
        ------
        RuntimeError
            If the run is finished.
        ProbeError
            If it cannot be written.
        """
        self._check_running()
        write_zarr(self.directory / RESULT, dataset)
        record = {**self.record, "state": FINISHED}
        write_json(self.directory / RECORD, record)
        self.record = record
        shutil.rmtree(self.directory / PARTS, ignore_errors=True)

    def result(self) -> xr.Dataset:
        """Read the result.

        Raises
        ------
        ProbeError
            If the run is not finished.
        """
        if not self.finished:
            raise ProbeError(f"The run in {self.directory} is not finished; repeat its command and it goes on.")
        return read_zarr(self.directory / RESULT)

    def path(self, name: str) -> Path:
        """Where a file of the caller's own goes (nothing is made).

        Raises
        ------
        ValueError
            If the name leads out of the directory or is one of the run's own.
        """
        relative = Path(name)
        if relative.is_absolute() or not relative.parts or ".." in relative.parts or relative.parts[0] in OWN:
            raise ValueError(f"A run cannot have a file of the name {name!r}.")
        return self.directory / relative

    def _check_running(self) -> None:
        if self.finished:
            raise RuntimeError(f"The run in {self.directory} is finished: read result() instead of adding to it.")


@contextmanager
def open_run(directory: Path, config: Mapping[str, object], *, command: str | None = None) -> Iterator[Run]:
    """Start a run in ``directory``, or go on with the one that is there.

    A directory that is missing or empty becomes a run directory. If the ``with`` block then raises before anything was
    written, the directory is left as it was found (missing, or empty). In every other case what was written stays.

    Parameters
    ----------
    directory
        Made if missing, with its parents.
    config
        All that decides the numbers: JSON values or paths, by name. Files have to be named by their content (a hash),
        since a path does not say what is in it.
    command
        The command line for the stamp; that of the process by default.

    Yields
    ------
    Run

    Raises
    ------
    UsageError
        If the directory belongs to a run with another configuration, or holds files but no run.
    ProbeError
        If another process has the run open, the place cannot be written, or ``run.json`` is damaged.
    TypeError
        If an entry of ``config`` is not a JSON value.
    """
    directory = Path(directory)
    wanted = canonical(config)
    made = _make(directory)
    with _lock(directory):
        sweep(directory)
        path = directory / RECORD
        fresh = not path.exists()
        if fresh:
            record: dict[str, Any] = {"key": key(wanted), "config": wanted, "stamp": stamp(command), "state": RUNNING}
        else:
            record = _read_record(path)
            _check_same(directory, record["config"], wanted)
        if record["state"] == FINISHED:
            shutil.rmtree(directory / PARTS, ignore_errors=True)  # left by a process killed at the very end
        try:
            if fresh:
                write_json(path, record)
            yield Run(directory, record)
        except BaseException:
            if fresh:
                _take_back(directory, made)
            raise


def _make(directory: Path) -> list[Path]:
    """Make the directory; return what was missing, deepest first. Refuse one that holds somebody's files."""
    try:
        missing = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        entries = sorted(entry for entry in directory.iterdir() if entry.name != LOCK and not is_temporary(entry))
    except OSError as error:
        reason = error.strerror or error
        raise ProbeError(f"Cannot make the run directory {directory}: {reason}; choose another directory.") from error
    if entries and not (directory / RECORD).exists():
        raise UsageError(
            f"{directory} holds other files ({entries[0].name}, …) and no run; choose a new or an empty directory."
        )
    return missing


def _lock(directory: Path) -> BinaryIO:
    """Hold the directory's lock until the file is closed, or say at once that somebody else does.

    The system frees the lock when the process ends, however it ends.
    """
    import fcntl  # here, because some systems lack it and the rest of the room works without

    path = directory / LOCK
    file = None
    try:
        file = path.open("ab")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The holder may have taken the directory back between our opening the file and locking it.
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise BlockingIOError
        return file
    except OSError as error:
        if file is not None:
            file.close()
        if isinstance(error, BlockingIOError):
            problem = f"Another process is working in {directory}; wait until it has ended, or"
        else:
            problem = f"Cannot lock the run directory {directory}: {error.strerror or error};"
        raise ProbeError(f"{problem} choose another directory.") from error


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["state"] in (RUNNING, FINISHED) and record["key"] == key(record["config"]):
            return dict(record)
        reason = "its entries contradict each other"
    except KeyError as error:
        reason = f"there is no {error}"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = str(error)
    raise ProbeError(f"{path} is not the record of a run ({reason}); restore it or choose another directory.")


def _check_same(directory: Path, old: Mapping[str, object], new: Mapping[str, object]) -> None:
    """Refuse if the configurations differ, and name the entries that do."""
    if key(old) == key(new):
        return
    before, now = _flat(old), _flat(new)
    changes = "; ".join(
        f"{name} was {_short(before.get(name, 'absent'))}, now {_short(now.get(name, 'absent'))}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    )
    raise UsageError(
        f"{directory} holds a run with other settings ({changes}); choose another directory, or go back to them."
    )


def _flat(config: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Every entry as JSON text under its dotted name."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return flat


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _take_back(directory: Path, made: list[Path]) -> None:
    """Undo the start of a run if nothing was written since. The error on its way says what went wrong, not this."""
    with suppress(OSError):
        (directory / PARTS).rmdir()
    with suppress(OSError):
        if not {entry.name for entry in directory.iterdir()} - {RECORD, LOCK}:
            (directory / RECORD).unlink(missing_ok=True)
            (directory / LOCK).unlink()
            for path in made:
                path.rmdir()
