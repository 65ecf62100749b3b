"""Write a file or a Zarr store so that its name never stands for half of it.

Every writer here works beside the target, under a temporary name in the same directory (a rename is atomic only within
a file system), forces the bytes to disk and renames. Missing parent directories are made. What the system refuses (no
permission, no space, a file in the way) is a :class:`~probe.errors.ProbeError`; any other error passes through. In
either case the old file stays as it was and the temporary one is removed. Only a killed process leaves it behind, for
:func:`sweep`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.errors import ProbeError

if TYPE_CHECKING:
    import xarray as xr

CHUNK_BYTES = 4 * 2**20
"""Size of a Zarr chunk before compression: a small variable is one file, a large one can be read in pieces."""

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


def is_temporary(path: Path) -> bool:
    """Whether ``path`` has the name of something that was being written."""
    return _TEMPORARY.fullmatch(path.name) is not None


def sweep(directory: Path) -> None:
    """Remove what killed writers left below ``directory``. Nobody else may be writing there."""
    for path in sorted(directory.rglob(".*.tmp")):
        if is_temporary(path):
            _remove(path)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, or replace it, all at once.

    Raises
    ------
    ProbeError
        If the system refuses.
    """
    with _writing(path) as temporary:
        # "x" rather than tempfile: a new file gets the permissions that the user's umask gives every other file
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, line ends as they are; otherwise as :func:`write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write a JSON value, indented; otherwise as :func:`write_bytes`.

    Raises
    ------
    TypeError
        If it is not a JSON value.
    ValueError
        If it holds NaN or an infinity, which JSON does not have: write ``None``.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_zarr(path: Path, dataset: xr.Dataset) -> None:
    """Write a dataset as a Zarr v3 group, a directory, all at once.

    An existing ``path`` is moved aside and deleted only after the new store is complete and in its place. Between those
    two renames there is a moment without ``path``: a process killed just then leaves both stores under temporary names.

    Parameters
    ----------
    path
        Usually ends in ``.zarr``.
    dataset
        Variables of numbers, booleans or strings; attributes that are JSON values (a tuple comes back as a list).

    Raises
    ------
    TypeError
        If a variable holds something else.
    ProbeError
        If the system refuses.
    """
    # For every variable, so that it replaces what a dataset remembers of the file it came from (chunks, fill values).
    encoding = {str(name): _encoding(str(name), variable) for name, variable in dataset.variables.items()}
    with _writing(path) as temporary:
        # No consolidated metadata: they are not part of the Zarr v3 specification and save nothing on a local disk.
        dataset.to_zarr(temporary, mode="w-", zarr_format=3, consolidated=False, encoding=encoding)
        for entry in (*temporary.rglob("*"), temporary):
            _sync(entry)
        aside = None
        if path.exists() or path.is_symlink():
            aside = _beside(path)
            os.rename(path, aside)
        try:
            os.rename(temporary, path)
        except BaseException:
            if aside is not None:
                os.rename(aside, path)
            raise
        if aside is not None:
            _remove(aside)


def read_zarr(path: Path) -> xr.Dataset:
    """Read what :func:`write_zarr` wrote, into memory.

    Returns
    -------
    xarray.Dataset
        Identical to the one written, whatever kind of string array that had (strings come back as fixed-width NumPy
        strings). Variables are in alphabetical order, since a directory has none.

    Raises
    ------
    ProbeError
        If there is nothing, or something unreadable.
    """
    import xarray as xr

    if not path.is_dir():
        raise ProbeError(f"There is no saved dataset at {path}; check the name, or run what writes it.")
    try:
        # No times: a variable with the unit "days since 2020-01-01" is the number that was written.
        dataset = xr.load_dataset(path, engine="zarr", zarr_format=3, consolidated=False, decode_times=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ProbeError(f"{path} cannot be read ({error}); delete it and repeat the command that wrote it.") from error
    return xr.Dataset(
        {name: _fixed_width(dataset.variables[name]) for name in sorted(dataset.data_vars, key=str)},
        coords={name: _fixed_width(dataset.variables[name]) for name in sorted(dataset.coords, key=str)},
        attrs=dataset.attrs,
    )


def _encoding(name: str, variable: xr.Variable) -> dict[str, Any]:
    """How to store one variable: chunked along its first dimension, strings at variable width."""
    import numpy as np

    kind = variable.dtype.kind
    if kind not in "biufcUTO" or (kind == "O" and not all(isinstance(value, str) for value in variable.values.flat)):
        raise TypeError(f"Variable {name!r} ({variable.dtype}) cannot be stored; numbers, booleans and strings can.")
    encoding: dict[str, Any] = {}
    if kind in "UTO":
        # Zarr v3 has no specification for fixed-width strings and warns that their format may change.
        encoding["dtype"] = np.dtypes.StringDType()
    if variable.ndim:
        row_bytes = max(1, variable.nbytes // max(1, variable.shape[0]))
        rows = max(1, min(variable.shape[0], CHUNK_BYTES // row_bytes))
        encoding["chunks"] = (rows, *(max(1, size) for size in variable.shape[1:]))
    return encoding


def _fixed_width(variable: xr.Variable) -> xr.Variable:
    """The variable without traces of the file; its strings, if any, as NumPy strings of one width."""
    import numpy as np
    import xarray as xr

    values = variable.values
    if values.dtype.kind in "TO":
        values = np.array(values.ravel().tolist(), dtype=np.str_).reshape(values.shape)
    return xr.Variable(variable.dims, values, variable.attrs)


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """Give the temporary name beside ``path``; in the end make the rename last, or clean up and say what is wrong."""
    temporary = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
        finally:
            _remove(temporary)
        with suppress(OSError):  # some systems cannot sync a directory
            _sync(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise ProbeError(f"Cannot write {path}: {reason}; choose another place or free this one.") from error


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a file, a link or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
