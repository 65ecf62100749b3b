"""Mass on each demonstration by its place: which ones are looked at, their pictures or their text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe.plots import style
from probe.segments import CONTENT, by_demonstration, mass_by_demonstration, select_row
from probe.stats import Interval, mean_interval

LEVEL = 0.95
WIDTHS = {1: 680, 2: 900, 3: style.WIDTH}
"""Of the figure, by the number of panels beside each other: one need not be as wide as three."""

ASIDE = {"visual": -0.09, "textual": 0.09}
"""Points of the two modalities stand beside each other, so that their intervals do not cover one another."""


def plot_mass_by_demonstration(
    result: xr.Dataset, *, row: str = "answer", heads: Sequence[tuple[int, int]] | None = None
) -> go.Figure:
    """Draw the mass on the visual and on the textual tokens of each demonstration.

    One panel for the mean over all heads, and one for each head that is asked for. A point is the mean over the
    episodes that have that many demonstrations, with a 95 % interval over these episodes. The dotted lines are
    uniform attention: the share of visible keys that these tokens are.

    Parameters
    ----------
    result
        As in ``docs/results.md``. If ``heads`` were chosen for what they do on some episodes, give the other half:
        ``result.isel(episode=(result["half"] == "report").values)``.
    row
        One label of the coordinate ``row``.
    heads
        Labels (layer, head).

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    UsageError
        If there is no such row or head, or no demonstration at all.
    """
    chosen = list(heads or [])
    mass = mass_by_demonstration(result, row=row).transpose("modality", "demonstration", "episode", "layer", "head")
    # Over episodes that have the tokens, zeros kept: a layer whose window hides a demonstration counts with nothing.
    selected = select_row(result, row)
    uniform = by_demonstration(selected["visible_share"].where(selected["n_tokens"] > 0)).mean("episode")
    panels = [("mean of all heads", mass.mean(["layer", "head"]), uniform.mean("layer"))]
    for (layer, head), (i, j) in zip(chosen, style.head_places(result, chosen), strict=True):
        panels.append((style.head_name(layer, head), mass.isel(layer=i, head=j), uniform.isel(layer=i)))

    places = mass["demonstration"].values
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    height, gap = 250, 84
    body = rows * height + (rows - 1) * gap
    figure = make_subplots(
        rows=rows,
        cols=columns,
        horizontal_spacing=0.07,
        vertical_spacing=gap / body if rows > 1 else 0,
        subplot_titles=[f"<b>{name}</b>" for name, *_ in panels],
    )
    figure.update_annotations(font_size=13)
    counts: set[int] = set()
    for number, (_, values, uniform_share) in enumerate(panels):
        place = {"row": number // columns + 1, "col": number % columns + 1}
        for modality in CONTENT:
            by_place = values.sel(modality=modality).values
            points = [mean_interval(by_place[i], LEVEL) for i in range(len(by_place))]
            counts |= {point.n for point in points if point.n}
            share = uniform_share.sel(modality=modality).values
            figure.add_trace(_uniform_line(places, share, modality, number == 0), **place)
            figure.add_trace(_points(places, points, modality, number == 0), **place)

    facts = ["Points: means over the episodes that have such a demonstration, with 95 % intervals over episodes (BCa)."]
    if len(counts) > 1:
        span = f"{min(counts)} to {max(counts)}"
        facts.append(f"n is {span} from point to point, as some episodes have no such tokens (n on hover).")
    if len(panels) > 1:
        halves = set(result["half"].values.tolist()) if "half" in result.coords else set()
        both = " Heads chosen on some episodes are to be reported on the others." if len(halves) > 1 else ""
        facts.append("Every panel has a scale of its own." + both)
    title = f"Mass of the row “{row}” on each demonstration"
    style.finish(figure, result, title, facts, body=body, width=WIDTHS[columns], extra=62)
    figure.update_xaxes(
        range=[places[0] - 0.5, places[-1] + 0.5],
        showgrid=False,
        title={"text": "demonstration (0 is read first)", "standoff": 6},
        **style.sparse_ticks(places.tolist(), most=16 if columns < 3 else 10),
    )
    figure.update_yaxes(rangemode="tozero", gridcolor=style.GRID, nticks=6, tickformat=".2~g", title={"standoff": 6})
    figure.update_yaxes(title_text="mass", col=1)
    figure.update_layout(
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1 + 34 / body, "yanchor": "bottom", "font_size": 12}
    )
    return figure


def _points(places: np.ndarray, points: list[Interval], modality: str, legend: bool) -> go.Scatter:
    ends = np.array([(point.estimate, point.low, point.high) for point in points])
    there = np.isfinite(ends[:, 0]).any()
    return style.points(
        places + ASIDE[modality],
        ends,
        [point.n for point in points],
        [f"demonstration {place}" for place in places],
        what=modality,
        quantity="mass",
        colour=style.COLOURS[modality],
        symbol="circle" if modality == "visual" else "square",
        mode="lines+markers",
        name=f"{modality} tokens" if there else f"{modality} tokens (these episodes have none)",
        legendgroup=modality,
        legendrank=1,
        showlegend=legend,
    )


def _uniform_line(places: np.ndarray, share: np.ndarray, modality: str, legend: bool) -> go.Scatter:
    return go.Scatter(
        x=places + ASIDE[modality],
        y=share,
        mode="lines",
        line={"color": style.COLOURS[modality], "width": 1.5, "dash": "dot"},
        hovertemplate=f"{modality}, uniform attention: %{{y:.3g}}<extra></extra>",
        name=f"{modality}, uniform attention",
        legendgroup=modality,
        legendrank=2,
        showlegend=legend and bool(np.isfinite(share).any()),
    )
