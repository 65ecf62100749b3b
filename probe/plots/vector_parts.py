"""What parts of a vector are worth: some of its layers, heads or positions only."""

from __future__ import annotations

import re

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe.errors import UsageError
from probe.measures.vector_groups import alone, is_part, over_seeds
from probe.measures.vector_summary import summarise_vectors
from probe.plots import style
from probe.plots.vectors import colour_of, margin, reference

MOST, MANY, GAP = 3, 40, 70
"""Vectors side by side; parts of one that are a few; pixels between panels."""

WHOLE = "all of it"
BAR_FACT = (
    "Accuracy with a part of a vector: bars start at zero-shot (dotted), the line is few-shot. Intervals of 95 % over "
    "queries, of the paired difference to zero-shot (Newcombe); of several seeds, the mean. Dots: single seeds."
)
MAP_FACT = (
    "Gain of accuracy over zero-shot, paired, with one head of a vector at a time; 95 % intervals (Newcombe) on hover. "
    "The largest of so many is large by chance too: choose heads on other queries than those of a claim."
)
NOTE = "Parts are not independent: what one does with the others need not be what it does by itself."


def has_parts(result: xr.Dataset) -> bool:
    """Whether some vector was also used in parts."""
    return bool((alone(result) & is_part(result)).any())


def plot_vector_parts(result: xr.Dataset) -> go.Figure:
    """Draw the accuracy with parts of vectors, a panel for each vector and a bar for each of its parts.

    Bars start at zero-shot: their length is what a part gains or costs, and the intervals are those of this paired
    difference. The line is few-shot. More than :data:`MANY` single heads are a map of gains, layer by head.

    Parameters
    ----------
    result
        Of ``probe.experiments.compare.compare``, with ways that use a vector in some layers, heads or rows.

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    UsageError
        If the result has no parts.
    """
    if not has_parts(result):
        raise UsageError("This comparison has no vector in parts; compare again with --parts layers, heads or rows.")
    each = summarise_vectors(result, distances=False)
    ways = over_seeds(each)
    parts = is_part(ways)
    taken = ways.isel(way=alone(ways) & (parts | np.isin(ways["vector"].values, ways["vector"].values[parts])))
    whole = taken.isel(way=taken["where"].values == "")
    labels = list(dict.fromkeys(taken["where"].values.tolist()))
    is_map = len(labels) > MANY and all(map(_head, filter(None, labels)))
    across = min(MOST, whole.sizes["way"])
    down = -(-whole.sizes["way"] // across)
    panel = 300 if is_map else max(120, (24 if len(labels) <= MANY else 15) * len(labels))
    body = down * panel + (down - 1) * GAP
    figure = make_subplots(
        rows=down,
        cols=across,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=GAP / body if down > 1 else 0,
    )
    zero, few = (
        float(ways["accuracy"].values[ways["kind"].values == kind][0, 0]) for kind in ("zero-shot", "few-shot")
    )
    for number, name in enumerate(whole["way"].values.tolist()):
        place = {"row": number // across + 1, "col": number % across + 1}
        of = taken.isel(way=taken["vector"].values == whole["vector"].values[number])
        if is_map:
            figure.add_trace(_map(of), **place)
        else:
            reference(figure, np.array([zero, np.nan, np.nan]), few=False, **place)
            reference(figure, np.array([few, np.nan, np.nan]), few=True, **place)
            figure.add_traces(_bars(of, each, labels, zero), rows=place["row"], cols=place["col"])
        style.heading(figure, style.escape(name), **place)
    fact = MAP_FACT if is_map else BAR_FACT
    style.finish(figure, result, "Parts of vectors", [fact], body=body, extra=34, note=NOTE)
    figure.update_xaxes(title_text="head" if is_map else "accuracy", row=down)
    if is_map:
        figure.update_yaxes(title_text="layer", col=1)
        figure.update_layout(
            coloraxis={"colorscale": style.DIVERGING, "cmid": 0, "colorbar": {"thickness": 12, "title": "gain"}}
        )
        return figure
    names = [style.escape(label or WHOLE) for label in labels]
    figure.update_xaxes(
        range=[-0.02, max(1.04, zero + np.nanmax(taken["to_zero_shot"].values) + 0.02)], gridcolor=style.GRID
    )
    figure.update_yaxes(tickvals=list(range(len(labels))), range=[len(labels) - 0.5, -0.5], showgrid=False, ticks="")
    figure.update_yaxes(ticktext=names, col=1)
    figure.update_layout(margin_l=margin(names), showlegend=False, bargap=0.3)
    return figure


def _head(where: str) -> tuple[int, int] | None:
    """Layer and head, if it is a single one."""
    found = re.fullmatch(r"head (\d+)\.(\d+)", where)
    return (int(found[1]), int(found[2])) if found else None


def _map(of: xr.Dataset) -> go.Heatmap:
    """What each head gains, layer by head; what was not read is left blank."""
    heads = {head: place for place, where in enumerate(of["where"].values) if (head := _head(str(where)))}
    shape = tuple(1 + max(head[axis] for head in heads) for axis in (0, 1))
    gains = np.full((*shape, 3), np.nan)
    for head, place in heads.items():
        gains[head] = of["to_zero_shot"].values[place]
    return go.Heatmap(
        z=gains[..., 0],
        customdata=gains,
        coloraxis="coloraxis",
        hoverongaps=False,
        hovertemplate=(
            "layer %{y}, head %{x}<br>accuracy %{z:+.3f} [%{customdata[1]:+.3f}, %{customdata[2]:+.3f}] to zero-shot"
            "<extra></extra>"
        ),
    )


def _bars(of: xr.Dataset, each: xr.Dataset, labels: list[str], zero: float) -> list[go.Bar | go.Scatter]:
    """The bars of one vector, and its seeds."""
    places = np.array([labels.index(where) for where in of["where"].values])
    gains, low, high = of["to_zero_shot"].values.T
    colour = colour_of(str(of["method"].values[0]))
    bars = go.Bar(
        x=gains,
        base=zero,
        y=places,
        orientation="h",
        marker={"color": colour, "opacity": [0.85 if where == "" else 0.5 for where in of["where"].values]},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": high - gains,
            "arrayminus": gains - low,
            "thickness": 1.5,
            "width": 3,
            "color": style.INK,
        },
        customdata=np.column_stack([of["accuracy"].values[:, 0], of["to_zero_shot"].values]),
        hovertext=[style.escape(label) for label in of["way"].values],
        hovertemplate=(
            "<b>%{hovertext}</b><br>accuracy %{customdata[0]:.3f}<br>"
            "%{customdata[1]:+.3f} [%{customdata[2]:+.3f}, %{customdata[3]:+.3f}] to zero-shot<extra></extra>"
        ),
    )
    found: list[go.Bar | go.Scatter] = [bars]
    for label, place in zip(of["way"].values, places, strict=True):
        seeds = each.isel(way=each["group_of"].values == label)
        if seeds.sizes["way"] > 1:
            dots = go.Scatter(
                x=seeds["accuracy"].values[:, 0],
                y=np.full(seeds.sizes["way"], place - 0.2),
                mode="markers",
                marker={"color": colour, "size": 5, "symbol": "circle-open", "line": {"width": 1.2}},
                hovertext=[style.escape(name) for name in seeds["way"].values],
                hovertemplate="<b>%{hovertext}</b><br>accuracy %{x:.3f}<extra></extra>",
            )
            found.append(dots)
    return found
