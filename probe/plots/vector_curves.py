"""What more training buys: accuracy of vectors by the number of training episodes, and of shots in them."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe.errors import UsageError
from probe.measures.vector_groups import alone, is_part, over_seeds
from probe.measures.vector_summary import summarise_vectors
from probe.plots import style
from probe.plots.vector_distance import DASHES
from probe.plots.vectors import INTERVALS, LABEL, colour_of

AXES = {"training_episodes": "training episodes", "training_shots": "shots in training"}
BODY = 340
RANDOM_COLOUR = "#a3a9b4"


def sizes(result: xr.Dataset) -> dict[str, list[int]]:
    """Sizes of the training by which vectors differ: of each axis of :data:`AXES`, if there is more than one."""
    vectors = result.isel(way=alone(result) & ~is_part(result))
    found = {axis: sorted({int(size) for size in vectors[axis].values if size > 0}) for axis in AXES}
    return {axis: those for axis, those in found.items() if len(those) > 1}


def plot_vector_curves(result: xr.Dataset) -> go.Figure:
    """Draw accuracy over training episodes and over shots, a line for each method.

    Grey, the random vectors of their size; the lines across are zero-shot and few-shot.

    Parameters
    ----------
    result
        Of ``probe.experiments.compare.compare``.

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    UsageError
        If all vectors are from as many episodes and shots.
    """
    there = sizes(result)
    if not there:
        raise UsageError("All vectors of this comparison were trained on as many episodes with as many shots.")
    each = summarise_vectors(result, distances=False)
    ways = over_seeds(each)
    chosen = ways.isel(way=alone(ways) & ~is_part(ways))
    figure = make_subplots(cols=len(there), shared_yaxes=True, horizontal_spacing=0.06)
    named: set[str] = set()
    for column, (axis, places) in enumerate(there.items(), start=1):
        _references(figure, ways, column, named=column == len(there))
        known = chosen.isel(way=chosen[axis].values > 0)
        lines = _lines(known, axis)
        step = 0.014 * np.log(places[-1] / places[0])
        for rank, (name, line, dash) in enumerate(lines):
            # Lines stand beside each other, so that their intervals do not cover one another.
            aside = step * (rank - (len(lines) - 1) / 2)
            _draw(figure, each, ways, line, axis, (name, dash, aside), column, first=name not in named, rank=rank)
            named.add(name)
        ticks = {"tickvals": np.log(places).tolist(), "ticktext": [str(place) for place in places]}
        figure.update_xaxes(title_text=f"{AXES[axis]}, log scale", showgrid=False, **ticks, row=1, col=column)
    figure.update_yaxes(range=[-0.03, 1.06], gridcolor=style.GRID, title_text="accuracy", col=1)
    figure.update_yaxes(range=[-0.03, 1.06], gridcolor=style.GRID, col=2)
    note = "Other episodes for training would give other vectors: an interval over queries says nothing of that."
    width = style.WIDTH if len(there) > 1 else 820
    style.finish(
        figure,
        result,
        "What more training buys",
        [INTERVALS],
        body=max(BODY, style.LINE * (len(named) + 5)),
        width=width,
        note=note,
    )
    figure.update_layout(
        margin_r=int(110 + LABEL * max(map(len, named))),
        legend={"x": 1.0, "xanchor": "left", "y": 1, "yanchor": "top", "traceorder": "normal", "xref": "paper"},
    )
    figure.update_layout(legend_x=1 + 70 / (width - figure.layout.margin.l - figure.layout.margin.r))
    return figure


def _references(figure: go.Figure, ways: xr.Dataset, column: int, *, named: bool) -> None:
    """Zero-shot and few-shot, across."""
    for kind, dash in (("zero-shot", "dot"), ("few-shot", "solid")):
        (estimate, low, high), *_ = ways["accuracy"].values[ways["kind"].values == kind]
        line = {"color": style.FAINT, "width": 1, "dash": dash}
        place = {"row": 1, "col": column, "exclude_empty_subplots": False}
        figure.add_hrect(y0=low, y1=high, fillcolor=style.FAINT, opacity=0.09, line_width=0, layer="below", **place)
        figure.add_hline(y=estimate, line=line, **place)
        if named:
            figure.add_annotation(
                text=kind,
                x=1,
                xref="x domain",
                y=estimate,
                xanchor="left",
                xshift=4,
                showarrow=False,
                row=1,
                col=column,
                font={"size": 11, "color": style.FAINT},
            )


def _lines(ways: xr.Dataset, axis: str) -> list[tuple[str, xr.Dataset, str]]:
    """Name, points and dash of each line: what differs in one size alone."""
    (other,) = set(AXES) - {axis}
    alike = ["method", "kind", "where", "scale", other]

    def keys() -> list[Hashable]:
        return list(zip(*(ways[name].values.tolist() for name in alike), strict=True))

    points = list(zip(keys(), ways[axis].values.tolist(), strict=True))
    if len(set(points)) < len(points):  # how they were trained differs too
        alike.append("training")
    found = keys()
    lines = [ways.isel(way=[key == of for key in found]).sortby(axis) for of in dict.fromkeys(found)]
    lines.sort(key=lambda line: -int(line[other].values[0]))  # solid: the largest
    colours = [colour_of(str(line["method"].values[0])) for line in lines]
    dashes = [DASHES[colours[:place].count(colour) % len(DASHES)] for place, colour in enumerate(colours)]
    return [(_name(line, ways, other), line, dash) for line, dash in zip(lines, dashes, strict=True)]


def _name(line: xr.Dataset, ways: xr.Dataset, other: str) -> str:
    """The method, and what else tells a line from others."""
    first = line.isel(way=0)
    words = [str(first["method"].values), str(first["where"].values)]
    if float(first["scale"]) != 1:
        words.append(f"× {float(first['scale']):g}")
    if len(set(ways[other].values.tolist())) > 1:
        words.append(f"{int(first[other])} {other.removeprefix('training_')}")
    if len(set(ways.isel(way=ways["method"].values == first["method"].values)["training"].values.tolist())) > 1:
        words.append(str(first["training"].values))
    return ", ".join(filter(None, words))


def _draw(
    figure: go.Figure,
    each: xr.Dataset,
    ways: xr.Dataset,
    line: xr.Dataset,
    axis: str,
    look: tuple[str, str, float],
    column: int,
    *,
    first: bool,
    rank: int,
) -> None:
    """One line with its seeds, and the random vectors beside it."""
    name, dash, aside = look
    colour = colour_of(str(line["method"].values[0]))
    labels = line["way"].values.tolist()
    random = ways.isel(way=(ways["kind"].values == "random") & np.isin(ways["like"].values, labels)).sortby(axis)
    beside = go.Scatter(
        x=np.log(random[axis].values) + aside,
        y=random["accuracy"].values[:, 0],
        mode="lines+markers",
        line={"color": RANDOM_COLOUR, "width": 0.8, "dash": dash},
        marker={"color": RANDOM_COLOUR, "size": 5, "symbol": "square"},
        hovertext=[style.escape(label) for label in random["way"].values],
        hovertemplate="<b>%{hovertext}</b><br>accuracy %{y:.3f}<extra></extra>",
        name="random vectors",
        legendgroup="random",
        legendrank=1001,
        showlegend=column == 1 and rank == 0,
    )
    seeds = each.isel(way=np.isin(each["group_of"].values, labels))
    dots = go.Scatter(
        x=np.log(seeds[axis].values) + aside,
        y=seeds["accuracy"].values[:, 0],
        mode="markers",
        marker={"color": colour, "size": 5, "symbol": "circle-open", "line": {"width": 1.2}},
        hovertext=[style.escape(label) for label in seeds["way"].values],
        hovertemplate="<b>%{hovertext}</b><br>accuracy %{y:.3f}<extra></extra>",
        showlegend=False,
        legendgroup=name,
    )
    n = [int(ways["n"])] * len(labels)
    points = style.points(
        np.log(line[axis].values) + aside,
        line["accuracy"].values,
        n,
        labels,
        what=style.escape(name),
        quantity="accuracy",
        colour=colour,
        symbol="circle",
        mode="lines+markers",
        name=style.escape(name),
        showlegend=first,
        legendgroup=name,
    )
    points.update(line_dash=dash)
    for trace in (beside, dots, points):
        if len(trace.x):
            figure.add_trace(trace, row=1, col=column)
