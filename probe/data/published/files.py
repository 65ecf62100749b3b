"""Files of JSON, whose entries say where they stand when something is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from probe.data.readers import KINDS, image_file, kind_of, texts
from probe.errors import ProbeError


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of the list that a file holds.

    Attributes
    ----------
    path
        The file.
    number
        Which of the list, from 1.
    record
        The object.
    named_by
        The field that names it.
    """

    path: Path
    number: int
    record: dict[str, Any]
    named_by: str

    @property
    def where(self) -> str:
        """The place, for a message."""
        name = self.record.get(self.named_by)
        named = f", {self.named_by} {str(name)[:100]}" if type(name) in (str, int) else ""
        return f"{self.path}, entry {self.number}{named}"

    def refuse(self, what: str) -> NoReturn:
        """Raise an error on this entry."""
        raise ProbeError(f"{self.where}: {what}")

    def value(self, key: str, *kinds: type) -> Any:
        """The value of a field, which must be there and of one of the types."""
        found = self.record.get(key)
        if found is None:
            self.refuse(f"there is no {key!r}; complete the entry, or check that this is the file that was meant.")
        if type(found) not in kinds:  # not isinstance, to which true is a whole number
            expected = " or ".join(KINDS[kind] for kind in kinds)
            self.refuse(f"{key!r} must be {expected}, found {kind_of(found)}; correct it.")
        return found

    def text(self, key: str) -> str:
        """A field that is a string with something in it; white space at both ends goes."""
        return texts(self.value(key, str), key, self.where, several=False)[0].strip()

    def text_or_number(self, key: str) -> str:
        """A field that is a string or a whole number, as a string."""
        found = self.value(key, str, int)
        return self.text(key) if isinstance(found, str) else str(found)

    def images(self, key: str, directory: Path) -> tuple[Path, ...]:
        """The files that a field names, relative to ``directory``."""
        names = texts(self.value(key, str, list), key, self.where)
        return tuple(image_file(directory, name, self.where) for name in names)

    def changed(self, **fields: Any) -> Entry:
        """The entry with other values in these fields."""
        return replace(self, record=self.record | fields)

    def others(self, *used: str) -> dict[str, Any]:
        """What else the entry holds."""
        return {key: value for key, value in self.record.items() if key not in used}


def read_json(path: Path, what: str) -> Any:
    """Read a file of JSON.

    Raises
    ------
    ProbeError
        If the file, which should hold ``what``, cannot be read or is not JSON; then with line and column.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ProbeError(
            f"{path}, which should hold {what}, cannot be read ({error.strerror}); correct the path or put the file "
            "there."
        ) from None
    except UnicodeDecodeError as error:
        raise ProbeError(
            f"{path}, byte {error.start}: this is not UTF-8 ({error.reason}); if the file is packed, unpack it."
        ) from None
    except json.JSONDecodeError as error:
        raise ProbeError(
            f"{path}, line {error.lineno}, column {error.colno}: this is not JSON ({error.msg}); download the file "
            "again."
        ) from None
    except RecursionError:
        raise ProbeError(f"{path} is nested too deeply to be {what}; download the file again.") from None


def entries_of(found: Any, path: Path, noun: str, *, named_by: str) -> list[Entry]:
    """The objects of a list, ``noun`` in the file, which must have some."""
    if not isinstance(found, list):
        kind = "missing" if found is None else kind_of(found)
        raise ProbeError(f"{path}: {noun} must be a list of objects, found {kind}; check that this is the right file.")
    if not found:
        raise ProbeError(f"{path}: {noun} is empty; download the file again.")
    for number, record in enumerate(found, start=1):
        if not isinstance(record, dict):
            raise ProbeError(f"{path}, entry {number} of {noun}: this is {kind_of(record)}, not an object; correct it.")
    return [Entry(path, number, record, named_by) for number, record in enumerate(found, start=1)]


def by_name(entries: Iterable[Entry]) -> dict[str | int, Entry]:
    """Entries by the field that names them; two of one name are refused."""
    named: dict[str | int, Entry] = {}
    for entry in entries:
        name = entry.value(entry.named_by, str, int)
        if name in named:
            entry.refuse(f"entry {named[name].number} has this {entry.named_by} too; take one of them out.")
        named[name] = entry
    return named


def find(directory: Path, name: str, below: Sequence[str], what: str) -> Path:
    """Find a file or directory of a data set, in ``directory`` or in the first of the directories ``below`` it.

    Raises
    ------
    ProbeError
        If it is in none of them.
    """
    for place in (directory, *(directory / inner for inner in below)):
        if (place / name).exists():
            return place / name
    also = f" or below it in {', '.join(below)}" if below else ""
    raise ProbeError(f"There is no {name} in {directory}{also}; put {what} there.")
