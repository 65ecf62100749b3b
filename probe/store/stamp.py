"""What made a result (:func:`stamp`) and what it depends on (:func:`key`)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

PACKAGES = ("probe", "torch", "transformers", "nnsight", "xarray", "zarr")
"""The packages whose version may change a number or the way it is stored."""


def stamp(command: str | None = None) -> dict[str, object]:
    """Say what is running, where and when; nothing is imported for it.

    Parameters
    ----------
    command
        The command line; that of the process by default.

    Returns
    -------
    dict
        Flat, all values strings, so that it can be the attributes of a dataset: ``python_version``,
        ``<package>_version`` for :data:`PACKAGES` (``not installed`` where that is so), ``platform``, ``created`` (UTC,
        ISO 8601), ``command``, and ``commit`` where this package runs from a git checkout, ending in ``-dirty`` if
        tracked files were changed.
    """
    if command is None:
        command = _command_line()
    made_by: dict[str, object] = {f"{package}_version": _version(package) for package in PACKAGES}
    made_by["python_version"] = platform.python_version()
    made_by["platform"] = platform.platform()
    made_by["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    # A file name that is not UTF-8 is shown with its bytes escaped: the stamp goes into JSON and Zarr.
    made_by["command"] = os.fsencode(command).decode("utf-8", "backslashreplace")
    commit = _commit(Path(__file__).resolve().parents[2])
    if commit is not None:
        made_by["commit"] = commit
    return made_by


def key(config: Mapping[str, object]) -> str:
    """A name for a configuration: 16 hexadecimal digits of the SHA-256 of its canonical JSON.

    The order of the entries does not matter.

    Raises
    ------
    TypeError
        If an entry, which is named, is not a JSON value or a path.

    Examples
    --------
    >>> key({"model": "toy", "shots": 4}) == key({"shots": 4, "model": "toy"})
    True
    """
    text = json.dumps(canonical(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def canonical(config: Mapping[str, object]) -> dict[str, object]:
    """The same configuration in plain JSON values: paths as POSIX text, tuples as lists.

    Raises
    ------
    TypeError
        As :func:`key`.
    """
    plain: dict[str, object] = {}
    for name, value in config.items():
        if not isinstance(name, str):
            raise TypeError(f"A configuration has names for its entries; {name!r} is not text.")
        plain[name] = _plain(value, name)
    return plain


def _plain(value: object, where: str) -> object:
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"Entry {where!r} of the configuration has a name that is not text: {name!r}.")
        return {name: _plain(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    # NaN is not equal to itself: a run that depends on it could never be found again.
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise TypeError(f"Entry {where!r} of the configuration is not a JSON value: {value!r} ({type(value).__name__}).")


def _command_line() -> str:
    """The command as one would type it, without the place of the interpreter or the script."""
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = [Path(sys.argv[0]).name] if module is None else ["python", "-m", module.name.removesuffix(".__main__")]
    return shlex.join([*program, *sys.argv[1:]])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit(root: Path) -> str | None:
    """The commit that is checked out at ``root``, if ``root`` itself is a git work tree."""
    # Without this test, an environment that lies inside a user's own repository would report that one's commit.
    if not (root / ".git").exists():
        return None
    # Likewise for the variables that git sets for its hooks.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    arguments = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(arguments, capture_output=True, text=True, timeout=5, env=environment, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
