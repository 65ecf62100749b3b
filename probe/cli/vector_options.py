"""Options of ``probe vector``: what vectors are found from and how, where they act, and on what they are tried."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cyclopts import Parameter

from probe.cli.options import Material, Source, parse_heads, parse_layers
from probe.errors import UsageError

if TYPE_CHECKING:
    from probe.data.example import Episode
    from probe.vectors.method import Method
    from probe.vectors.training import Training
    from probe.vectors.vector import InContextVector

VECTORS = "vectors"
"""Where a run keeps what it found."""

TASK = "operator:3"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Lessons(Material):
    """Which model learns from which episodes."""

    episodes: int = 320
    default_task: ClassVar[str] = TASK

    def read(self, shots: int) -> list[Episode]:
        """The episodes with so many demonstrations."""
        return Source(**{**asdict(self), "task": None if self.data else self.task or TASK}, shots=shots).read_episodes()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Learning:
    """How vectors are trained.

    Parameters
    ----------
    epochs
        How often each episode is read.
    batch_size
        Episodes in one step.
    speed
        Factor on the step sizes that were published for models of billions of parameters; the bundled one needs about
        20 for live and i2cl and 4 for the others.
    patience
        Epochs without a better validation after which training stops; 0 never stops early.
    validation
        Share of the episodes that validate.
    """

    epochs: int = 20
    batch_size: int = 32
    speed: float | None = None
    patience: int = 0
    validation: float = 0.2

    def of(self, method: Method, model: str, seed: int) -> Training:
        """What it means for a method."""
        from probe.models.names import BUNDLED
        from probe.vectors.training import Training

        own = {**asdict(self), "seed": seed}
        if self.speed is None:
            own["speed"] = SPEED.get(method.name, 1.0) if model in BUNDLED else 1.0
        return Training(**own)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Several:
    """How many vectors are found in one go.

    Parameters
    ----------
    shots
        Demonstrations in each episode; several with commas.
    sizes
        How many of the episodes are used; several with commas. The default is all.
    seeds
        Of the start, the order and the choice of what validates; several with commas.
    """

    shots: str = "8"
    sizes: str | None = None
    seeds: str = "0"


SPEED = {"live": 20.0, "mimic": 4.0, "m2iv": 4.0, "hificl": 4.0, "i2cl": 20.0, "lora": 4.0}
"""What the bundled models need, whose states are small and few."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Queries(Source):
    """Which model answers which queries.

    Parameters
    ----------
    shots
        Demonstrations of each query, for the comparison with them; the default, -1, is as many as the vectors were
        fitted with.
    """

    shots: int = -1
    episodes: int = 256
    seed: int = 1


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Placing:
    """Where a vector acts.

    Parameters
    ----------
    scale
        Factor on what it adds.
    layers
        In which layers, such as 3, or 0,2,5, or 0:4 for 0 to 3; the default is all that it acts in.
    heads
        In which heads (layer.head, with commas), for methods that act on heads.
    rows
        At which positions: all, answer (those that predict the answer), first (its first token), or tokens such as
        query/image; the default is the method's own.
    """

    scale: float = 1.0
    layers: str | None = None
    heads: str | None = None
    rows: str | None = None

    def options(self) -> dict[str, Any]:
        """As :func:`probe.inject` takes them."""
        return {
            "scale": self.scale,
            "layers": parse_layers(self.layers),
            "heads": parse_heads(self.heads),
            "rows": self.rows,
        }


def parse_methods(text: str) -> list[Method]:
    """Read methods with their options: ``live,mimic:size=shared:ce=0``.

    Raises
    ------
    UsageError
        If there is no such method or option, or one is given twice.
    """
    from probe.vectors.methods import method_of

    found = []
    for part in text.split(","):
        name, *options = (piece.strip() for piece in part.split(":"))
        given: dict[str, object] = {}
        for option in options:
            key, equals, value = option.partition("=")
            if not equals:
                raise UsageError(f"--method {part!r}: write an option as {name}:NAME=VALUE.")
            given[key] = _value(value)
        found.append(method_of(name, given))
    labels = [method.label for method in found]
    if repeated := {label for label in labels if labels.count(label) > 1}:
        raise UsageError(f"--method names {', '.join(sorted(repeated))} twice.")
    return found


def _value(text: str) -> object:
    """A number, true or false, or a word."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def parse_numbers(option: str, text: str, least: int) -> list[int]:
    """Read numbers with commas, each ``least`` or more."""
    try:
        numbers = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a list of numbers; write 8, or 2,4,8.") from None
    if min(numbers) < least:
        raise UsageError(f"{option} must be {least} or more; got {min(numbers)}.")
    return numbers


def load_vectors(places: tuple[Path, ...]) -> dict[str, InContextVector]:
    """Vectors by label, from their own directories or from those of runs.

    Raises
    ------
    UsageError
        If no place is named.
    ProbeError
        If there is none.
    """
    from probe.vectors.vector import CARD, InContextVector

    if not places:
        raise UsageError("Name a vector, or the run directory of probe vector train, which holds several.")
    found: dict[str, InContextVector] = {}
    for place in places:
        inside = sorted(card.parent for card in (place / VECTORS).glob(f"*/{CARD}"))
        for directory in inside or [place]:
            label = directory.name if directory.name not in found else str(directory)
            found[label] = InContextVector.load(directory)
    return found


def same_task(source: Queries, vectors: dict[str, InContextVector]) -> Queries:
    """If nothing else was asked for, the task and the number of shots that the vectors were fitted on."""
    if source.shots < 0:
        shots = {k for v in vectors.values() for k in v.card.get("data", {}).get("shots", ())}
        if len(shots) != 1:
            raise UsageError(
                f"The vectors were fitted with {', '.join(map(str, sorted(shots))) or 'no known number of'} shots: say "
                "with how many to compare them (--shots)."
            )
        source = replace(source, shots=shots.pop())
    if source.task is not None or source.data is not None:
        return source
    strategies = {name for v in vectors.values() for name in v.card.get("data", {}).get("strategies", ())}
    tasks = {name.removeprefix("synthetic:") for name in strategies if name.startswith("synthetic:")}
    if len(strategies) != 1 or not tasks:
        raise UsageError(
            "The vectors were not all fitted on one synthetic task: say what to ask, with --task or --data."
        )
    return replace(source, task=tasks.pop())
