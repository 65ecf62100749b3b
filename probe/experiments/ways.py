"""Ways to answer the same queries: which vector is in the model, where, how strongly, and what is shown.

Three ways are always there: ``zero-shot``, ``few-shot``, and for each vector, if asked for, random vectors of the same
size. The oracle, each episode's own shift of attention, can be added: it is the upper bound of every vector that acts
on heads. It knows the positions of the gold answer and no others, so it cannot generate, and is compared by what is
predicted when the answer is given.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from probe.data.example import Episode
from probe.models.model import Model
from probe.trace.steer import inject
from probe.vectors.oracle import Oracle, read_oracle
from probe.vectors.random import random_like
from probe.vectors.vector import Head, InContextVector

ZERO, FEW, ORACLE, RANDOM = "zero-shot", "few-shot", "oracle", "random"
ORACLES: dict[str, dict[str, object]] = {
    "oracle, in context": {},
    "oracle": {},
    "oracle, constant size": {"mu": "mean"},
    "oracle, constant shift": {"shift": "mean"},
    "oracle, constant both": {"mu": "mean", "shift": "mean"},
    "oracle, own direction": {"shift": "direction"},
    "oracle, own length": {"shift": "size"},
    "oracle, images": {"modalities": ("visual",)},
    "oracle, text": {"modalities": ("textual",)},
    "oracle, structure": {"modalities": ("structural",)},
}
"""The oracle and what is left of it, with the choices of :class:`probe.vectors.oracle.Oracle`.

The first is read where the query stands behind its demonstrations, and is exact. All others are read where it stands by
itself, as vectors are: the two can differ much, and only the latter can be compared with vectors.
"""

IN_CONTEXT = "oracle, in context"


@dataclass(frozen=True)
class Way:
    """One way to answer.

    Attributes
    ----------
    label
        Names it in results; no two ways have the same.
    vector
        What is in the model, if anything.
    shown
        Whether the demonstrations are read too.
    kind
        ``zero-shot``, ``few-shot``, ``vector``, ``random`` or ``oracle``.
    scale, layers, heads, rows
        As in :meth:`probe.InContextVector.edits`.
    like
        Of a random vector: the label of the way that it stands beside.
    """

    label: str
    vector: InContextVector | Oracle | None = None
    shown: bool = False
    kind: str = "vector"
    scale: float = 1.0
    layers: tuple[int, ...] | None = None
    heads: tuple[Head, ...] | None = None
    rows: str | None = None
    like: str = ""

    @property
    def where(self) -> str:
        """Layers, heads and rows in words, if not all that the method acts in."""
        heads = None if self.heads is None else [f"{layer}.{head}" for layer, head in self.heads]
        rows = None if self.rows is None else [self.rows]
        named = (("layer", self.layers), ("head", heads), ("at", rows))
        words = [f"{name}{'s' * (len(x) != 1)} {', '.join(map(str, x))}" for name, x in named if x is not None]
        return "; ".join(words)

    @property
    def fitted(self) -> InContextVector | None:
        """The vector, if it is one and not an oracle."""
        return self.vector if isinstance(self.vector, InContextVector) else None

    @property
    def whole(self) -> bool:
        """Whether nothing of the vector is left out."""
        return self.layers is None and self.heads is None and self.rows is None

    @property
    def identity(self) -> list[object]:
        """What decides its numbers, as JSON values."""
        made = "" if self.fitted is None else self.fitted.identity
        return [self.label, self.kind, made, self.shown, self.scale, self.layers, self.heads, self.rows]

    def put_into(self, model: Model) -> Model:
        """The model that answers.

        Raises
        ------
        UsageError
            If the vector was made for another, or does not act where it is to.
        """
        if self.vector is None:
            return model
        return inject(model, self.vector, scale=self.scale, layers=self.layers, heads=self.heads, rows=self.rows)


def ways_for(
    vectors: Mapping[str, InContextVector], *, random: int = 1, put_back: bool = False, seed: int = 0
) -> list[Way]:
    """The ways that vectors are usually compared in.

    Parameters
    ----------
    vectors
        By label.
    random
        How many random vectors of the same size beside each.
    put_back
        Whether to read each also with the demonstrations shown again.
    seed
        Of the random vectors.
    """
    found = [Way(ZERO, kind=ZERO), Way(FEW, shown=True, kind=FEW)]
    for label, vector in vectors.items():
        found.append(Way(label, vector))
        if put_back:
            found.append(Way(f"{label} + demonstrations", vector, shown=True))
        for draw in range(random):
            # Of its own for each vector: one draw that happens to help would else be seen once for every seed.
            own = zlib.crc32(f"{label} {draw}".encode())
            other = random_like(vector, seed=own + seed)
            name = f"{RANDOM} like {label}" + (f" {draw}" if random > 1 else "")
            found.append(Way(name, other, kind=RANDOM, like=label))
    return found


def describe_ways(ways: Sequence[Way]) -> dict[str, tuple[str, object]]:
    """What is known of the vectors, from their cards."""

    def card(way: Way, *path: str) -> object:
        found: object = {} if way.fitted is None else way.fitted.card
        for name in path:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def numbers(*path: str) -> tuple[str, NDArray[np.int64]]:
        return "way", np.array([-1 if (x := card(way, *path)) is None else int(str(x)) for way in ways])

    shots = [max(x) if isinstance(x := card(way, "data", "shots"), list) and x else -1 for way in ways]
    trained = [x if isinstance(x := card(way, "training"), Mapping) else {} for way in ways]
    return {
        "kind": ("way", [way.kind for way in ways]),
        "shown": ("way", [way.shown for way in ways]),
        "scale": ("way", [way.scale for way in ways]),
        "where": ("way", [way.where for way in ways]),
        "like": ("way", [way.like for way in ways]),
        "method": ("way", ["" if way.fitted is None else way.fitted.method.label for way in ways]),
        "vector": ("way", ["" if way.fitted is None else way.fitted.identity[:12] for way in ways]),
        "training_data": ("way", [" ".join(map(str, card(way, "data", "strategies") or ())) for way in ways]),  # type: ignore[call-overload]
        "training": ("way", [" ".join(f"{k}={v}" for k, v in x.items() if k != "seed") for x in trained]),
        "training_seed": numbers("training", "seed"),
        "training_episodes": numbers("data", "episodes"),
        "training_shots": ("way", np.array(shots)),
        "n_parameters": ("way", [0 if way.fitted is None else way.fitted.n_parameters for way in ways]),
        "n_bytes": ("way", [0 if way.fitted is None else way.fitted.n_bytes for way in ways]),
    }


def oracle_ways(model: Model, episodes: Sequence[Episode], batch_size: int) -> list[Way]:
    """The oracle of episodes and its ablations."""
    found = read_oracle(model, episodes, batch_size=batch_size, by_modality=True)
    return [Way(name, replace(found, **choices), kind=ORACLE) for name, choices in ORACLES.items()]  # type: ignore[arg-type]
