"""The summary of ``probe saliency``: flows by layer, as tables or as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape

from probe.cli.report import Reporter, finite, table
from probe.measures.saliency_summary import summarise_saliency

if TYPE_CHECKING:
    import xarray as xr
    from rich.table import Table

TABLES = {
    "Flows of “Label words are anchors”": ("wp", "pq", "ww"),
    "Flows into the demonstrations' answers, and the rest": ("image->answer", "question->answer", "rest"),
    "Flows from the demonstrations to q": ("answer->q", "image->q", "question->q"),
    "Flows from the query to q": ("query image->q", "query question->q"),
}
"""Which flows stand beside each other."""


def show(reporter: Reporter, result: xr.Dataset, directory: Path, picture: Path, *, reused: bool) -> None:
    """Print the summary."""
    summary = summarise_saliency(result)
    if reporter.quiet:
        paths = {"directory": str(directory), "picture": str(picture), "reused": reused}
        reporter.json({**result.attrs, "loss_mean": float(result["loss"].mean()), "flows": _as_json(summary), **paths})
        return
    reporter.facts(result, _facts(result), reused=reused)
    power = exponent(summary)
    for title, flows in TABLES.items():
        reporter.out.print(_table(summary, title, flows, power))
    reporter.note(
        "Means over legal pairs with 95 % intervals over episodes (BCa); p: the demonstrations' answers, q: the row "
        "that predicts the answer, ww: all pairs beside wp and pq. A gradient is a first-order estimate, and vanishes "
        "where the model is sure: compare flows and layers of one run, and check by a knockout (probe knockout)."
    )
    if "image_flows" in result.attrs:
        reporter.note(f"Flows from images are missing. They are {result.attrs['image_flows']}.")
    reporter.ending(result, picture, directory)


def exponent(summary: xr.Dataset) -> int:
    """The power of ten in which the largest mean has three digits before the point."""
    largest = float(np.nan_to_num(summary["saliency"].sel(end="estimate").values).max())
    return math.floor(math.log10(largest)) - 2 if largest > 0 else 0


def _facts(result: xr.Dataset) -> list[tuple[str, str]]:
    loss = result["loss"].values
    return [
        ("loss", f"-log p(gold answer): mean {loss.mean():.3g} nats, median {np.median(loss):.3g}"),
        (
            "check",
            f"head outputs rebuilt from q, k, v to {float(result['residual'].max()):.1e} "
            f"(bound {result.attrs['residual_bound']:g})",
        ),
    ]


def _table(summary: xr.Dataset, title: str, flows: Sequence[str], power: int) -> Table:
    """One row for each layer."""
    made = table(f"{title}, in 1e{power} nats per pair", ("layer", *flows))
    for layer in summary["layer"].values.tolist():
        part = summary["saliency"].sel(layer=layer)
        made.add_row(str(layer), *(_cell(part.sel(flow=flow).values.tolist(), power) for flow in flows))
    return made


def _cell(ends: Sequence[float], power: int) -> str:
    estimate, low, high = (_number(value / 10.0**power) for value in ends)
    if ends[0] != ends[0]:
        return "–"
    return estimate + (escape(f" [{low}, {high}]") if ends[1] == ends[1] else "")


def _number(value: float) -> str:
    """Three digits, or two behind the point."""
    return f"{value:.{0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2}f}"


def _as_json(summary: xr.Dataset) -> dict[str, Any]:
    """By flow and layer."""
    ends = summary["end"].values.tolist()

    def cell(flow: str, layer: int) -> dict[str, Any]:
        part = summary.sel(flow=flow, layer=layer)
        values = dict(zip(ends, map(finite, part["saliency"].values.tolist()), strict=True))
        return {**values, "n": int(part["n"])}

    layers = summary["layer"].values.tolist()
    return {flow: {str(layer): cell(flow, layer) for layer in layers} for flow in summary["flow"].values.tolist()}
