"""What the bundled model has to be able to do, judged on an evaluation's counts.

A share should reach its bar with the lower end of its 95 % interval; from 2,000 episodes on the lower end may fall
short by 0.02 if the estimate does not. What should stay below a bar does so with its upper end. Twins and their tasks
share episodes, and so do, in part, 8 and 16 shots: taking them as independent makes the intervals of their differences
wider than they need be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from probe.data.tasks import TEXT_SUFFIX
from probe.stats import Interval, difference, mean_interval, wilson

ENOUGH = 2000
"""Episodes from which on a lower end may fall short by 0.02."""


@dataclass(frozen=True)
class Bar:
    """A demand and what was measured."""

    name: str
    demand: str
    figure: Interval
    met: bool


def at_least(name: str, figure: Interval, bound: float) -> Bar:
    """A share, or a difference, that should reach ``bound``."""
    nearly = figure.n >= ENOUGH and figure.estimate >= bound and figure.low >= bound - 0.02
    return Bar(name, f"≥ {bound:.2f}", figure, figure.low >= bound or nearly)


def at_most(name: str, figure: Interval, bound: float) -> Bar:
    """A share, or a fall, that should not exceed ``bound``."""
    return Bar(name, f"≤ {bound:.2f}", figure, figure.high <= bound)


def as_good(name: str, figure: Interval) -> Bar:
    """A difference that should not be below zero by more than 0.02."""
    return Bar(name, "≥ 0 − 0.02", figure, figure.low >= -0.02)


def by_guessing(name: str, figure: Interval, chance: float) -> Bar:
    """A share that should not be above what guessing gives: its interval reaches down to ``chance``."""
    return Bar(name, f"≤ {chance:.2f} + interval", figure, figure.low <= chance)


class Shares:
    """The accuracy cells of an evaluation by task and shots."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.cells = {(cell["task"], cell["shots"]): cell for cell in result["accuracy"]}
        self.tasks = list(dict.fromkeys(task for task, _ in self.cells))
        self.shots = sorted({shots for _, shots in self.cells})

    def __getitem__(self, cell: tuple[str, int]) -> Interval:
        """Of (task, shots)."""
        return _pool([self.cells[cell]])

    def worst(self, task: str, least: int = 0) -> Interval:
        """Of all numbers of shots from ``least`` on."""
        return min((self[task, shots] for shots in self.shots if shots >= least), key=lambda share: share.low)

    def pooled(self, task: str, least: int = 0) -> Interval:
        """All numbers of shots from ``least`` on together."""
        return _pool([self.cells[task, shots] for shots in self.shots if shots >= least])


def bars(result: dict[str, Any]) -> list[Bar]:
    """All bars, from what :func:`probe.toy.evaluate.evaluate` gives."""
    shares = Shares(result)
    twins = [(task, task + TEXT_SUFFIX) for task in shares.tasks if task + TEXT_SUFFIX in shares.tasks]
    seen = [cell for (task, shots), cell in shares.cells.items() if shots == 8 and not task.endswith(TEXT_SUFFIX)]
    same = [sum(cell[key] for cell in result["agreement"]) for key in ("same", "n")]
    return [
        at_least("vqa, worst of all shots", shares.worst("vqa"), 0.96),
        at_least("recognition, worst of 2 shots and more", shares.worst("recognition", 2), 0.96),
        at_most("recognition, 0 shots", shares["recognition", 0], 0.25),
        at_least("binding-cued, 8 shots", shares["binding-cued", 8], 0.96),
        at_least("binding-uncued, 8 shots", shares["binding-uncued", 8], 0.92),
        at_least("operator, worst of 1 shot and more", shares.worst("operator", 1), 0.97),
        by_guessing("operator, 0 shots", shares["operator", 0], 0.20),
        at_least("describe, worst of all shots", shares.worst("describe"), 0.90),
        *(
            at_most(f"{task}, fall from 8 to 16 shots", difference(shares[task, 8], shares[task, 16]), 0.02)
            for task in shares.tasks
        ),
        *(
            as_good(f"{twin} minus {task}, 1 to 16 shots", difference(shares.pooled(twin, 1), shares.pooled(task, 1)))
            for task, twin in twins
        ),
        at_most(
            "fall on held-out pairs, all tasks, 8 shots", difference(_pool(seen), _pool(result["novel_pairs"])), 0.10
        ),
        *(bar for cell in result["copying"] for bar in copying_bars(cell)),
        at_least("answers as by generate", wilson(*same), 0.98),
    ]


def copying_bars(cell: dict[str, Any]) -> list[Bar]:
    """Copying is rare on clean episodes, and can be provoked."""
    name, clean, provoked = f"copying, {cell['task']}", cell["clean"], cell["provoked"]
    return [
        at_least(f"{name}: fall when provoked", change(cell["gained"], cell["lost"], cell["n"]), 0.10),
        at_least(f"{name}: errors copied", wilson(provoked["copied"], provoked["errors"]), 0.90),
        at_most(f"{name}: copied on clean episodes", wilson(clean["copied"], cell["n"]), 0.03),
    ]


def control_bars(control: dict[str, Any], bundled: dict[str, Any]) -> list[Bar]:
    """The control recognises tasks as the bundled model does, and binds no better than who does not look."""
    ours, theirs = Shares(control), Shares(bundled)
    found = [
        as_good(
            "recognition minus the bundled model's, 2 to 16 shots",
            difference(ours.pooled("recognition", 2), theirs.pooled("recognition", 2)),
        )
    ]
    for task in ("binding-cued", "binding-uncued"):
        cell = ours.cells[task, 8]
        found.append(by_guessing(f"{task}, 8 shots", ours[task, 8], cell["majority"] / cell["n"]))
    return found


def change(lost: int, gained: int, n: int) -> Interval:
    """The change of accuracy on ``n`` episodes read twice, of which some were right only before or only after."""
    return mean_interval([-1.0] * lost + [1.0] * gained + [0.0] * (n - lost - gained))


def _pool(cells: list[dict[str, Any]]) -> Interval:
    return wilson(sum(c["right"] for c in cells), sum(c["n"] for c in cells))


def print_bars(result: dict[str, Any]) -> None:
    """Print what was asked, what was measured, and whether it is enough."""
    table = Table("measured", "bar", "figure", "n", "met")
    for bar in bars(result):
        table.add_row(bar.name, bar.demand, str(bar.figure), str(bar.figure.n), "yes" if bar.met else "NO")
    console = Console()
    console.print(f"Training seed {result['recipe']['seed']}, episodes of seed {result['seed']}.")
    console.print(table)
