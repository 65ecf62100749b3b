"""What a command shows while it works and when it is done: progress, facts, notes, or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    import xarray as xr


class Reporter:
    """Speaks to a person on a terminal, or (``quiet``) only in JSON on standard output."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.out = Console(soft_wrap=False)
        self.err = Console(stderr=True)

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Say what takes a moment."""
        if self.quiet:
            yield
            return
        with self.err.status(f"{what} …"):
            yield

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar on standard error; yields a function that takes the number done."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.err, disable=self.quiet) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)

    def json(self, value: dict[str, Any]) -> None:
        """Print the summary for programs."""
        self.out.print_json(json.dumps(value))

    def facts(self, result: xr.Dataset, more: Sequence[tuple[str, str]] = (), *, reused: bool) -> None:
        """Print what was run: the model, the episodes, and ``more``, whose texts are shown as they are."""
        attrs = result.attrs
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold")
        table.add_column()
        table.add_row(
            "model",
            escape(f"{attrs['model']} ({attrs['model_family']}, {attrs['dtype']}, {attrs['attn_implementation']})"),
        )
        shots = sorted(set(result["shots" if "shots" in result.coords else "shot"].values.tolist()))
        table.add_row(
            "episodes",
            escape(
                f"{attrs['n_done']} of {attrs['data'] if 'data' in attrs else attrs['task']}, "
                f"{', '.join(map(str, shots))} shots, seed {attrs['seed']}"
            ),
        )
        if left_out := attrs.get("n_left_out"):
            table.add_row("left out", f"{left_out} queries that a vector was fitted on")
        for name, text in more:
            table.add_row(name, escape(text))
        if reused:
            table.add_row("", "this run was finished before and is shown again")
        self.out.print(table)

    def note(self, text: str) -> None:
        """Print how to read the tables."""
        self.out.print(text, style="dim", markup=False)

    def ending(self, result: xr.Dataset, picture: Path, directory: Path) -> None:
        """Print the model's caveat and where the files are."""
        if "caveat" in result.attrs:
            self.out.print(result.attrs["caveat"], style="italic yellow", markup=False)
        self.out.print(f"Picture: {picture}", soft_wrap=True, highlight=False, markup=False)
        self.out.print(f"Arrays:  {directory / 'result.zarr'}", soft_wrap=True, highlight=False, markup=False)


def table(title: str, columns: Sequence[str]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    made = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        made.add_column(column, justify="left" if place == 0 else "right", no_wrap=place == 0)
    return made


def finite(value: float) -> float | None:
    """For JSON, which knows no NaN."""
    return value if value == value else None
