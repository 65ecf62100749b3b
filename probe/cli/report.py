"""What a command shows while it works and when it is done: progress, tables, or JSON."""

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

from probe.segments import QUERY

if TYPE_CHECKING:
    import xarray as xr

    from probe.experiments.ranking import RankedHead

WHAT = {"visual": "demonstrations' images", "textual": "demonstrations' text"}


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

    def show(
        self, result: xr.Dataset, ranked: Sequence[RankedHead], directory: Path, picture: Path, *, reused: bool
    ) -> None:
        """Print the summary."""
        if self.quiet:
            self.out.print_json(json.dumps(summary(result, ranked, directory, picture, reused=reused)))
            return
        self.out.print(_facts(result, reused=reused))
        for modality, what in WHAT.items():
            heads = [head for head in ranked if head.modality == modality]
            if heads:
                self.out.print(_table(heads, what))
        if ranked:
            self.out.print(
                f"Ranked on one half of the episodes, reported on the other (n = {ranked[0].mass.n}). A lift of 1 is "
                "uniform attention. Attention is not use: knock a head out before you believe in it.",
                style="dim",
            )
        else:
            self.out.print("No demonstrations, so no heads to rank.")
        if "no_overlay" in result.attrs:
            self.out.print(f"Nothing is drawn on the images: {result.attrs['no_overlay']}.", style="dim")
        if "caveat" in result.attrs:
            self.out.print(result.attrs["caveat"], style="italic yellow", markup=False)
        self.out.print(f"Picture: {picture}", soft_wrap=True, highlight=False, markup=False)
        self.out.print(f"Arrays:  {directory / 'result.zarr'}", soft_wrap=True, highlight=False, markup=False)


def summary(
    result: xr.Dataset, ranked: Sequence[RankedHead], directory: Path, picture: Path, *, reused: bool
) -> dict[str, Any]:
    """The same as the tables, for programs."""
    from probe.stats import wilson

    accuracy = wilson(int(result["correct"].sum()), result.sizes["episode"])
    return {
        **result.attrs,
        "accuracy": {"estimate": accuracy.estimate, "low": accuracy.low, "high": accuracy.high, "n": accuracy.n},
        "worst_residual": float(result["residual"].max()),
        "heads": [
            {
                "modality": head.modality,
                "rank": head.rank,
                "layer": head.layer,
                "head": head.head,
                "mass": _finite(head.mass.estimate),
                "low": _finite(head.mass.low),
                "high": _finite(head.mass.high),
                "n": head.mass.n,
                "per_token": _finite(head.per_token),
                "lift": _finite(head.lift),
            }
            for head in ranked
        ],
        "directory": str(directory),
        "picture": str(picture),
        "reused": reused,
    }


def _finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if value == value else None


def _facts(result: xr.Dataset, *, reused: bool) -> Table:
    from probe.stats import wilson

    attrs = result.attrs
    accuracy = wilson(int(result["correct"].sum()), result.sizes["episode"])
    shots = sorted(set(result["shots"].values.tolist()))
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row(
        "model", escape(f"{attrs['model']} ({attrs['model_family']}, {attrs['dtype']}, {attrs['attn_implementation']})")
    )
    table.add_row(
        "episodes",
        escape(
            f"{attrs['n_done']} of {attrs['data'] if 'data' in attrs else attrs['task']}, "
            f"{', '.join(map(str, shots))} shots, seed {attrs['seed']}"
        ),
    )
    table.add_row("right answers", escape(f"{accuracy} (95 %, Wilson)"))
    table.add_row("unknown words", f"{attrs['unknown_word_share']:.1%}")
    resized = int(result["n_resized"].sum())
    scale = f", to {attrs['image_scale']:.2g} of their sides on average" if resized else ""
    table.add_row("images resized", f"{attrs['images_resized']}{scale}")
    table.add_row(
        "check",
        f"head outputs rebuilt from q, k, v to {float(result['residual'].max()):.1e} "
        f"(bound {attrs['residual_bound']:g})",
    )
    if "cross_mass" in result:
        table.add_row("cross-attention", escape(_cross_attention(result)))
    if reused:
        table.add_row("", "this run was finished before and is shown again")
    return table


def _cross_attention(result: xr.Dataset) -> str:
    """What the first answer row reads of the images where they are no tokens of the text."""
    row = result["cross_mass"].isel(row=0).mean(("episode", "cross_layer", "head"))
    if not bool(row.notnull().any()):
        return "these episodes have no images to read"
    query = float(row.where((row["role"] == "image") & (row["demonstration"] == QUERY)).sum())
    demonstrations = float(row.where(row["demonstration"] >= 0).sum())
    layers = ", ".join(map(str, result["cross_layer"].values.tolist()))
    gates = result["cross_gate"].values
    return (
        f"layers {layers}: mass {query:.2f} on the query's images, {demonstrations:.2f} on the demonstrations'; gates "
        f"{gates.min():.2g} to {gates.max():.2g}"
    )


def _table(heads: Sequence[RankedHead], what: str) -> Table:
    table = Table(title=f"Heads that attend most to the {what}", title_justify="left")
    for name, justify in (
        ("layer.head", "left"),
        ("mass [95 % interval]", "right"),
        ("per token", "right"),
        ("lift", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for head in heads:
        table.add_row(f"{head.layer}.{head.head}", escape(str(head.mass)), f"{head.per_token:.2g}", f"{head.lift:.2f}")
    return table
