"""In-context vectors beside what they stand for: how well the same queries are answered in each way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe.measures.vector_groups import alone, is_part, over_seeds, put_back
from probe.measures.vector_summary import summarise_vectors
from probe.plots import style

SKY = "#56b4e9"
COLOURS = {
    "live": style.BLUE,
    "mimic": style.VERMILLION,
    "m2iv": style.GREEN,
    "mean-difference": style.PURPLE,
    "fitted-shift": style.ORANGE,
    "hificl": "#882255",
    "lora": "#7a5c3a",
    "task-vector": "#332288",
    "function-vector": "#44aa99",
    "i2cl": "#999933",
    "icv": "#117733",
    "mtv": "#aa4499",
}
"""Of each method, the same in all figures; :data:`SKY` of any other."""

PANELS = {
    "accuracy": ("accuracy", "share of queries", 0.46),
    "log_probability": ("log p of the answer", "nats", 0.27),
    "copied": ("copy rate", "share of queries", 0.27),
}
ROW, LABEL = 46, 6.6
"""Pixels that a row takes, and a character of its label."""

MARKS = {
    "vector": ("vector", "circle", 10, 0.06),
    "seed": ("one seed", "circle-open", 5, 0.28),
    "back": ("vector and demonstrations", "diamond-open", 8, -0.14),
    "random": ("random vector of its size", "square", 6, -0.31),
}
"""Name, mark, its size and how far above its row it stands."""

INTERVALS = (
    "Intervals of 95 % over queries: of shares Wilson’s, else BCa; of several seeds, the mean of theirs. "
    "Dots: seeds, each by itself."
)
ORACLE = (
    "An oracle has each query’s own shift of attention, at the positions of the gold answer. It cannot generate: "
    "accuracy is that each token of the answer is the most probable behind those before it, and there is no copy rate."
)


def colour_of(method: str) -> str:
    """The colour of a method, whatever its options."""
    return COLOURS.get(method.partition(" ")[0], SKY)


def plot_vectors(result: xr.Dataset) -> go.Figure:
    """Draw how well queries are answered in each way, a row for each vector.

    Under each vector stand the same vector with the demonstrations shown too, and random vectors of its size; the lines
    are zero-shot and few-shot. Vectors that differ in their seed alone are one row, with a dot for each. Parts of
    vectors are left to :func:`~probe.plots.vector_parts.plot_vector_parts`.

    Parameters
    ----------
    result
        Of ``probe.experiments.compare.compare``.

    Returns
    -------
    plotly.graph_objects.Figure
    """
    each = summarise_vectors(result, distances=False)
    ways = over_seeds(each)
    rows = ways.isel(way=alone(ways) & ~is_part(ways))
    references = ways.isel(
        way=[int(np.flatnonzero(ways["kind"].values == kind)[0]) for kind in ("few-shot", "zero-shot")]
    )
    labels = [*references["way"].values.tolist(), *rows["way"].values.tolist()]
    widths = [width for _, _, width in PANELS.values()]
    figure = make_subplots(cols=len(PANELS), shared_yaxes=True, column_widths=widths, horizontal_spacing=0.04)
    drawn: set[str] = set()
    for column, measure in enumerate(PANELS, start=1):
        for place, ends in enumerate(references[measure].values):
            reference(figure, ends, few=place == 0, row=1, col=column)
            points = _points(references.isel(way=[place]), np.array([-place]), measure, style.INK, "vector")
            figure.add_trace(points, row=1, col=column)
        drawn |= _rows(figure, each, ways, rows, measure, column)
        title, unit, _ = PANELS[measure]
        style.heading(figure, title, row=1, col=column)
        figure.update_xaxes(title_text=unit, gridcolor=style.GRID, row=1, col=column)
        if measure != "log_probability":
            figure.update_xaxes(range=[-0.03, 1.03], row=1, col=column)
    _legend(figure, drawn)
    body = max(190, ROW * len(labels))
    note = "A random vector has the norms of the one above it: it shows what putting anything of that size in does."
    facts = [INTERVALS, ORACLE] if "oracle" in ways["kind"].values else [INTERVALS]
    style.finish(figure, result, "Vectors in the place of demonstrations", facts, body=body, extra=46, note=note)
    for place in range(1, len(labels)):
        figure.add_hline(y=0.5 - place, line={"color": style.GRID, "width": 1}, layer="below")
    figure.update_yaxes(range=[0.5 - len(labels), 0.5], showgrid=False, ticks="")
    places = [-place for place in range(len(labels))]
    figure.update_yaxes(tickvals=places, ticktext=[style.escape(label) for label in labels], row=1, col=1)
    figure.update_layout(
        margin_l=margin(labels),
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1 + 24 / body, "yanchor": "bottom"},
    )
    return figure


def margin(labels: list[str]) -> int:
    """Pixels that labels need on the left."""
    return int(24 + LABEL * max(map(len, labels)))


def reference(figure: go.Figure, ends: npt.NDArray[np.float64], *, few: bool, row: int, col: int) -> None:
    """The line of few-shot or (dotted) zero-shot through all rows, over its interval."""
    place: dict[str, Any] = {"row": row, "col": col, "exclude_empty_subplots": False}
    if not np.isnan(ends).any():
        figure.add_vrect(
            x0=ends[1], x1=ends[2], fillcolor=style.FAINT, opacity=0.09, line_width=0, layer="below", **place
        )
    line = {"color": style.FAINT, "width": 1, "dash": "solid" if few else "dot"}
    figure.add_vline(x=ends[0], line=line, **place)


def _rows(
    figure: go.Figure, each: xr.Dataset, ways: xr.Dataset, rows: xr.Dataset, measure: str, column: int
) -> set[str]:
    """The vectors, and what stands beside them; of which kinds there are some."""
    drawn = set()
    for place, label in enumerate(rows["way"].values.tolist(), start=2):
        row = rows.sel(way=label)
        beside = {
            "random": ways.isel(way=(ways["kind"].values == "random") & (ways["like"].values == label)),
            "back": ways.isel(way=put_back(ways, row)),
            "seed": each.isel(way=each["group_of"].values == label),
            "vector": rows.sel(way=[label]),
        }
        for kind, them in beside.items():
            if them.sizes["way"] > (1 if kind == "seed" else 0):
                colour = style.FAINT if kind == "random" else colour_of(str(row["method"].values))
                y = np.full(them.sizes["way"], -place + MARKS[kind][3])
                figure.add_trace(_points(them, y, measure, colour, kind), row=1, col=column)
                drawn.add(kind)
    return drawn


def _legend(figure: go.Figure, drawn: set[str]) -> None:
    """One entry for each kind of mark, in no method's colour."""
    for kind, (name, symbol, size, _) in MARKS.items():
        if kind in drawn:
            colour = style.FAINT if kind == "random" else style.INK
            marker = {
                "color": colour,
                "symbol": symbol,
                "size": size,
                "line": {"width": 1.5 if "open" in symbol else 0},
            }
            figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=name), row=1, col=1)


def _hover(ways: xr.Dataset) -> list[str]:
    """The name of each way, and what it recovers."""
    rows = zip(ways["way"].values.tolist(), ways["recovered"].values.tolist(), strict=True)
    return [
        style.escape(label) + ("" if math.isnan(of[0]) else f"<br>recovers {of[0]:.2f} [{of[1]:.2f}, {of[2]:.2f}]")
        for label, of in rows
    ]


def _points(ways: xr.Dataset, y: npt.NDArray[np.float64], measure: str, colour: str, kind: str) -> go.Scatter:
    """Estimates with horizontal intervals; seeds have none here."""
    name, symbol, size, _ = MARKS[kind]
    ends = ways[measure].values
    estimates, low, high = ends.T
    drawn = kind != "seed"
    return go.Scatter(
        x=estimates,
        y=y,
        mode="markers",
        name=name,
        showlegend=False,
        marker={"color": colour, "symbol": symbol, "size": size, "line": {"width": 1.5 if "open" in symbol else 0}},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": np.nan_to_num(high - estimates) * drawn,
            "arrayminus": np.nan_to_num(estimates - low) * drawn,
            "thickness": 2 if kind == "vector" else 1,
            "width": 3 if kind == "vector" else 0,
            "color": colour,
        },
        customdata=ends,
        hovertext=_hover(ways),
        hovertemplate=(
            f"<b>%{{hovertext}}</b><br>{PANELS[measure][0]} %{{x:.3f}} [%{{customdata[1]:.3f}}, %{{customdata[2]:.3f}}]"
            "<extra></extra>"
        ),
    )
