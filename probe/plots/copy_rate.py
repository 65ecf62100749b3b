"""Copying: how often, how often that is no mistake, which demonstration is copied, and what it harms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe.errors import UsageError
from probe.measures.copy_summary import PUBLISHED, summarise_copying
from probe.plots import style

MOST = 10
"""Columns beside each other; with more groups than that, one number of shots is drawn."""

MARKS = {
    "copy_rate": ("copy rate", style.BLUE, "circle"),
    "gold_shown": ("right answer shown", style.FAINT, "diamond"),
    "harmful": ("harmful copying", style.VERMILLION, "square"),
    "counterfactual": ("counterfactual copying", style.GREEN, "triangle-up"),
    "null": ("permutation null", style.ORANGE, "x"),
    "excess": ("excess: copy rate − null", style.PURPLE, "star"),
}
"""Name, colour and mark of each measure: a colour means the same in all panels."""

ASIDE = {"copy_rate": -0.32, "v1": -0.19, "v2": -0.08, "gold_shown": 0.05, "harmful": 0.18, "counterfactual": 0.31}
"""Where the marks stand in the column of their strategy, a column being 1 wide."""

TYPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star")
"""Marks of answer types, whose colour is that of harmful copying."""

COLUMN, NARROWEST, SIDE = 88, 400, 190
"""Pixels: the width of a column, the least of all columns together, and the width of the panel beside them."""

HEIGHTS, GAP_X, GAP_Y = (250, 150, 120), 88, 92

PUBLISHED_TITLE = "copy rates published (not this model)"

NOTE = (
    "A copy rate alone does not show copying: a model that is right says what a demonstration says wherever one shows "
    "the right answer. Harmful copying (wrong, and a demonstration’s answer) and counterfactual copying (how much more "
    "often a planted wrong answer is given when it is there) are free of that."
)


def plot_copy_rate(result: xr.Dataset, *, shots: int | None = None) -> go.Figure:
    """Draw copying by strategy, by place and by answer type, and against its null.

    Every strategy with its number of shots is a column. *a* puts the copy rate beside how often the right answer was
    there to be copied, and beside copying that does harm or is caused by planting an answer; hollow marks are the
    copy rates published for OpenFlamingo (:data:`~probe.measures.copy_summary.PUBLISHED`). *b* shows which
    demonstration is copied, of the answers that one alone gives; the dotted line is that of a model to which all
    places are the same. *c* is harmful copying by answer type. *d* holds the copy rate of random demonstrations
    (``RS``) against its permutation null, at every number of shots of the result.

    Parameters
    ----------
    result
        Of :func:`probe.copy_rate`.
    shots
        Draw the columns with so many demonstrations only. By default all, if they are no more than :data:`MOST`, else
        those with the largest number of shots.

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    UsageError
        If nothing was read with so many shots.
    """
    summary = summarise_copying(result)
    summary = summary.isel(group=summary["shots"].values > 0)  # without demonstrations there is nothing to copy
    drawn = summary.isel(group=_choose(summary, shots))
    columns = drawn.sizes["group"]
    main, body = max(NARROWEST, COLUMN * columns), sum(HEIGHTS) + 2 * GAP_Y
    total = main + GAP_X + SIDE
    figure = make_subplots(
        rows=3,
        cols=2,
        specs=[[{}, None], [{}, {"rowspan": 2}], [{}, None]],
        column_widths=[main, SIDE],
        row_heights=list(HEIGHTS),
        horizontal_spacing=GAP_X / total,
        vertical_spacing=GAP_Y / body,
    )
    facts = [
        "Points: shares of queries with 95 % intervals over queries (Wilson; BCa for null and differences), n on "
        "hover; n/a: no answer could be planted, or no query has that type. b rests on the copied answers that one "
        "demonstration alone gives; dotted: all places the same.",
        "Hollow marks: copy rates of OpenFlamingo v1 and v2 on the slides for arXiv 2312.01571, whose shots and data "
        "are not stated; published, not this model.",
    ]
    if columns < summary.sizes["group"]:
        number = style.shots_in_words(int(drawn["shots"][0]))
        facts.append(f"a, b and c show what was read with {number}; the result holds other numbers too.")
    title = "Copying of the demonstrations’ answers"
    width = style.MARGIN_LEFT + total + style.MARGIN_RIGHT
    style.finish(figure, result, title, facts, body=body, width=width, extra=26, note=NOTE)

    borders = {"tickvals": np.arange(1, columns) - 0.5, "showgrid": True, "gridcolor": style.GRID, "ticks": ""}
    figure.update_xaxes(range=[-0.5, columns - 0.5], showgrid=False, ticks="", minor=borders, col=1)
    figure.update_yaxes(title={"text": "share of queries", "standoff": 8}, gridcolor=style.GRID, tickformat=".2~f")
    _draw_rates(figure, drawn, measured="planted_after" in result)
    _draw_places(figure, drawn)
    _draw_types(figure, drawn)
    _draw_null(figure, summary)

    legend = {"xanchor": "left", "yanchor": "top", "font_size": 12, "tracegroupgap": 0, "traceorder": "normal"}
    side, above_null, above_types = (main + GAP_X) / total, sum(HEIGHTS[1:]) + GAP_Y + 4, HEIGHTS[2] + 4
    figure.update_layout(
        legend={**legend, "x": side, "y": 1},
        legend2={**legend, "x": side, "y": 1 - 100 / body, "title": {"text": PUBLISHED_TITLE, "font_size": 12}},
        legend3={**legend, "x": side, "y": above_null / body, "yanchor": "bottom"},
        legend4={**legend, "x": 0, "y": above_types / body, "yanchor": "bottom", "orientation": "h"},
    )
    return figure


def _choose(summary: xr.Dataset, shots: int | None) -> list[int]:
    """Places of the groups to draw."""
    numbers = summary["shots"].values.tolist()
    if shots is None:
        shots = max(numbers) if len(numbers) > MOST else None
    elif shots not in numbers:
        there = ", ".join(map(str, sorted(set(numbers))))
        raise UsageError(f"There is no copying to draw with {shots} shots; this result has {there}.")
    return [place for place, number in enumerate(numbers) if shots in (None, number)]


def _points(part: xr.Dataset, measure: str, x: np.ndarray, **options: Any) -> go.Scatter:
    """The points of a measure, one for each group."""
    name, colour, symbol = MARKS[measure]
    return style.points(
        x,
        part["rate"].sel(measure=measure).values,
        part["n"].sel(measure=measure).values,
        part["group"].values.tolist(),
        **{"what": name, "quantity": "share", "colour": colour, "symbol": symbol, "name": name, **options},
    )


def _draw_rates(figure: go.Figure, drawn: xr.Dataset, *, measured: bool) -> None:
    """Panel a."""
    style.heading(figure, "a   copying by strategy", row=1, col=1)
    places = np.arange(drawn.sizes["group"])
    for measure in ("copy_rate", "gold_shown", "harmful", "counterfactual"):
        name, colour, _ = MARKS[measure]
        x = places + ASIDE[measure]
        missing = np.isnan(drawn["rate"].sel(measure=measure, end="estimate").values)
        if missing.all():
            name += "<br>(no answer to plant)" if measured else "<br>(not measured)"
        else:
            style.write(figure, "n/a", x[missing], 0, colour, row=1, col=1)
        figure.add_trace(_points(drawn, measure, x, name=name, legend="legend"), row=1, col=1)
    strategies = drawn["strategy"].values.tolist()
    known = [place for place, name in enumerate(strategies) if name in PUBLISHED]
    for version, symbol in enumerate(("circle-open", "square-open")):
        figure.add_trace(
            go.Scatter(
                x=[place + ASIDE[f"v{version + 1}"] for place in known],
                y=[PUBLISHED[strategies[place]][version] / 100 for place in known],
                mode="markers",
                marker={"color": style.BLUE, "size": 8, "symbol": symbol, "line": {"width": 1.5}},
                name=f"OpenFlamingo v{version + 1}",
                hovertemplate=f"published for OpenFlamingo v{version + 1}: %{{y:.4f}}<extra></extra>",
                legend="legend2",
            ),
            row=1,
            col=1,
        )
    lowest = np.nan_to_num(drawn["rate"].sel(measure="counterfactual").values).min()
    figure.update_yaxes(range=[min(-0.04, lowest - 0.04), 1.04], row=1, col=1)
    n = drawn["n"].sel(measure="copy_rate").values
    labels = [f"{label}<br>{_faint(f'n = {k}')}" for label, k in zip(_labels(drawn), n, strict=True)]
    figure.update_xaxes(tickvals=places, ticktext=labels, row=1, col=1)


def _draw_places(figure: go.Figure, drawn: xr.Dataset) -> None:
    """Panel b."""
    style.heading(figure, "b   which demonstration is copied", row=2, col=1)
    style.hold(figure, row=2, col=1)
    told = (drawn["n_profile"] > 0) & (drawn["shots"] > 1)
    top = max(0.4, np.nan_to_num(drawn["profile"].where(told).values).max())
    tick_places: list[float] = []
    tick_labels: list[str] = []
    for column, (shots, n) in enumerate(zip(drawn["shots"].values, drawn["n_profile"].values, strict=True)):
        if not told[column]:
            why = "one only" if shots == 1 else "none copied<br>by itself"
            style.write(figure, why, [column], top / 2, style.FAINT, row=2, col=1)
            continue
        x = column + _spread(shots)
        few = slice(None, None, math.ceil(shots / 4))
        tick_places += x[few].tolist()
        tick_labels += [str(place) for place in range(shots)[few]]
        uniform = go.Scatter(
            x=x[[0, -1]] + [-0.08, 0.08],
            y=[1 / shots] * 2,
            mode="lines",
            line={"color": style.INK, "width": 1.5, "dash": "dot"},
            hovertemplate="uniform: %{y:.3g}<extra></extra>",
            showlegend=False,
        )
        figure.add_trace(uniform, row=2, col=1)
        points = style.points(
            x,
            drawn["profile"].isel(group=column, place=slice(shots)).values,
            np.full(shots, n),
            [f"{drawn['group'].values[column]}, demonstration {place}" for place in range(shots)],
            what="copied",
            quantity="share",
            colour=style.BLUE,
            symbol="circle",
            size=6,
            mode="lines+markers",
            showlegend=False,
        )
        figure.add_trace(points, row=2, col=1)
        style.write(figure, f"n = {n}", [column], 1.12 * top, style.FAINT, row=2, col=1)
    figure.update_yaxes(title_text="share of copies", range=[-0.05 * top, 1.22 * top], nticks=4, row=2, col=1)
    figure.update_xaxes(tickvals=tick_places, ticktext=tick_labels, ticks="outside", row=2, col=1)
    figure.update_xaxes(title={"text": "demonstration (0 is read first)", "standoff": 6}, row=2, col=1)


def _draw_types(figure: go.Figure, drawn: xr.Dataset) -> None:
    """Panel c."""
    style.heading(figure, "c   harmful copying by type of the right answer", row=3, col=1, above=26)
    places = np.arange(drawn.sizes["group"])
    types = drawn["answer_type"].values.tolist()
    top = 0.2  # at least, so that chance does not look like much
    for number, (kind, aside) in enumerate(zip(types, _spread(len(types)), strict=True)):
        part = drawn.sel(answer_type=kind).drop_vars(("rate", "n")).rename(rate_by_type="rate", n_by_type="n")
        name, x = style.escape(kind), places + aside
        options = {"what": f"harmful copying, {name}", "symbol": TYPES[number % len(TYPES)], "name": name}
        figure.add_trace(_points(part, "harmful", x, legend="legend4", showlegend=True, **options), row=3, col=1)
        seen = part["n"].sel(measure="harmful").values > 0
        style.write(figure, "n/a", x[~seen], 0, MARKS["harmful"][1], row=3, col=1)
        top = max(top, *part["rate"].sel(measure="harmful", end="high").values[seen])
    figure.update_yaxes(range=[-0.07 * top, 1.07 * top], nticks=4, row=3, col=1)
    figure.update_xaxes(tickvals=places, ticktext=_labels(drawn), row=3, col=1)


def _draw_null(figure: go.Figure, summary: xr.Dataset) -> None:
    """Panel d: all numbers of shots, as the null grows with them."""
    style.heading(figure, "d   RS against its null", row=2, col=2, above=66)
    random = summary.isel(group=summary["strategy"].values == "RS").sortby("shots")
    n = random.sizes["group"]
    if not n:
        style.hold(figure, row=2, col=2)
        style.say(figure, "no demonstrations<br>drawn at random (RS),<br>so no null", row=2, col=2)
        figure.update_xaxes(visible=False, row=2, col=2)
        figure.update_yaxes(visible=False, row=2, col=2)
        return
    for measure, aside in (("copy_rate", -0.16), ("null", 0.0), ("excess", 0.16)):
        x = np.arange(n) + aside
        figure.add_trace(_points(random, measure, x, mode="lines+markers", legend="legend3"), row=2, col=2)
    shots = [str(k) for k in random["shots"].values]
    figure.update_xaxes(range=[-0.6, n - 0.4], showgrid=False, tickvals=list(range(n)), ticktext=shots, row=2, col=2)
    figure.update_xaxes(title={"text": "shots", "standoff": 6}, row=2, col=2)
    figure.update_yaxes(rangemode="tozero", zeroline=True, zerolinecolor=style.FAINT, row=2, col=2)


def _spread(n: int) -> np.ndarray:
    """Where n marks stand in a column."""
    return np.linspace(-0.32, 0.32, n) if n > 1 else np.zeros(1)


def _labels(drawn: xr.Dataset) -> list[str]:
    """Of the columns: strategy and number of shots."""
    pairs = zip(drawn["strategy"].values.tolist(), drawn["shots"].values.tolist(), strict=True)
    return [f"<b>{style.escape(name)}</b><br>{_faint(style.shots_in_words(k))}" for name, k in pairs]


def _faint(text: str) -> str:
    return f'<span style="color:{style.FAINT}">{text}</span>'
