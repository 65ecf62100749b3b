"""Vectors kept in a file, so that no picture and no text is encoded twice.

One SQLite file may hold the vectors of many encoders and be used by several processes. It is written a batch at a time,
each in a transaction: a process that is killed loses the batch it was at.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from probe.data.example import Picture
from probe.data.images import open_image, pixel_hash
from probe.errors import ProbeError, UsageError
from probe.models.encoders import BATCH, WHERE, Encoder

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix

PATIENCE = 60.0
"""Seconds to wait for another process that is writing."""

_TABLE = """
CREATE TABLE IF NOT EXISTS vectors (
    encoder TEXT NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL, vector BLOB NOT NULL, PRIMARY KEY (encoder, kind, key)
) WITHOUT ROWID
"""
_SELECT = "SELECT vector FROM vectors WHERE encoder = ? AND kind = ? AND key = ?"
_INSERT = "INSERT OR IGNORE INTO vectors VALUES (?, ?, ?, ?)"

Item = TypeVar("Item")


def cached(encoder: Encoder, path: Path) -> Encoder:
    """An encoder that looks into a file first, and adds to it what it had to compute.

    A picture is known by its pixels (:func:`probe.data.images.pixel_hash`), a text by its characters, both together
    with the encoder's name. Vectors are equal to those of the encoder up to rounding, since it may have made them in
    other batches.

    Parameters
    ----------
    encoder
        Returned as it is if it is cheap (:class:`~probe.models.encoders.Encoder`).
    path
        The file; made if there is none, its directory too.

    Returns
    -------
    Encoder
        Of the same name. Its functions raise :class:`~probe.errors.ProbeError` if the file is damaged or cannot be
        read and written.
    """
    if encoder.cheap:
        return encoder
    return replace(
        encoder,
        images=_kept(path, (encoder.name, "image"), _key_of_picture, encoder.images),
        texts=_kept(path, (encoder.name, "text"), _key_of_text, encoder.texts),
    )


def _key_of_picture(picture: Picture) -> str:
    return pixel_hash(open_image(picture, where=WHERE))


def _key_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _kept(
    path: Path,
    shelf: tuple[str, str],
    key_of: Callable[[Item], str],
    compute: Callable[[Sequence[Item]], NDArray[np.float32] | csr_matrix] | None,
) -> Callable[[Sequence[Item]], NDArray[np.float32]] | None:
    """``compute``, called only for what is not in the file yet; ``None`` if there is nothing to call."""
    if compute is None:
        return None

    def vectors(items: Sequence[Item]) -> NDArray[np.float32]:
        if not items:
            raise UsageError("There is nothing to encode: the list of pictures or texts is empty.")
        keys = [key_of(item) for item in items]
        found: dict[str, bytes] = {}
        with _opened(path) as file:
            for key in dict.fromkeys(keys):
                row = file.execute(_SELECT, (*shelf, key)).fetchone()
                if row:
                    found[key] = row[0]
            missing = {key: item for key, item in zip(keys, items, strict=True) if key not in found}
            for start in range(0, len(missing), BATCH):
                batch = dict(islice(missing.items(), start, start + BATCH))
                computed = [np.asarray(vector, "<f4").tobytes() for vector in compute(list(batch.values()))]
                new = dict(zip(batch, computed, strict=True))
                with file:  # one transaction
                    # Another process may have been faster.
                    file.executemany(_INSERT, [(*shelf, key, vector) for key, vector in new.items()])
                found |= new
        try:
            return np.stack([np.frombuffer(found[key], "<f4") for key in keys]).astype(np.float32)
        except ValueError as error:
            raise ProbeError(_damaged(path, error)) from error

    return vectors


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """The file, with its table; what SQLite says is wrong becomes a sentence."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProbeError(f"Cannot make the directory {path.parent}: {error.strerror}; choose another place.") from error
    try:
        # No write-ahead log: it does not work on the network drives that clusters share.
        with closing(sqlite3.connect(path, timeout=PATIENCE)) as file:
            file.execute(_TABLE)
            yield file
    except sqlite3.OperationalError as error:
        raise ProbeError(
            f"The file of vectors {path} cannot be read or written: {error}. Wait for other processes that use it, "
            "free some space, or choose another place."
        ) from error
    except sqlite3.DatabaseError as error:
        raise ProbeError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    return f"The file of vectors {path} is damaged: {error}. Delete it; its vectors will be computed again."
