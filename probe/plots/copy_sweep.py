"""Copying of a planted wrong answer, by how often it is repeated and how like the demonstrations are."""

from __future__ import annotations

import plotly.colors
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe.errors import UsageError
from probe.plots import style
from probe.stats import Interval, wilson


def plot_copy_sweep(result: xr.Dataset) -> go.Figure:
    """Draw how often a planted wrong answer is given.

    One line for each level of likeness, from the nearest demonstrations (dark) to the farthest (light); on the left the
    planted answer, on the right the right one. Points have 95 % intervals over queries (Wilson).

    Parameters
    ----------
    result
        Of :func:`probe.copy_sweep`, or of ``probe copy-rate --sweep``, where the names begin with ``sweep_``.

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    UsageError
        If the result has no sweep.
    """
    prefix = "sweep_" if "sweep_said_planted" in result else ""
    if f"{prefix}said_planted" not in result:
        raise UsageError("This result has no sweep; run `probe copy-rate --sweep`.")
    levels, repetitions = result["level"].values.tolist(), result["repetition"].values.tolist()
    episode = f"{prefix}episode"
    similar = result[f"{prefix}similarity"].mean(episode).values.tolist()
    shades = [0.9 - 0.62 * i / max(1, len(levels) - 1) for i in range(len(levels))]
    colours = plotly.colors.sample_colorscale(style.SEQUENTIAL, shades)
    figure = make_subplots(
        cols=2,
        horizontal_spacing=0.08,
        subplot_titles=["<b>says the planted answer</b>", "<b>says the right answer</b>"],
    )
    figure.update_annotations(font_size=13)
    for column, name in enumerate(("said_planted", "correct"), start=1):
        values = result[f"{prefix}{name}"].transpose("level", "repetition", episode)
        for i, (level, colour) in enumerate(zip(levels, colours, strict=True)):
            points = [wilson(int(flags.sum()), len(flags)) for flags in values.values[i]]
            aside = 0.06 * (i - (len(levels) - 1) / 2)
            label = f"{_words(level)}, mean cosine {similar[i]:.2f}"
            figure.add_trace(_line(repetitions, points, aside, colour, label, legend=column == 1), row=1, col=column)
    n = result.sizes[episode]
    encoder = result.attrs.get("encoder")
    facts = ["Points have 95 % intervals over queries (Wilson). Every level asks the same queries."]
    if encoder:
        facts.append(f"Likeness: cosine of {encoder}.")
    style.finish(
        figure,
        result,
        "Copying of a planted wrong answer",
        facts,
        body=330,
        n=f"{n} queries",
        width=900,
        extra=84,
        note="Planting is an intervention: what rises with it is caused by it.",
    )
    figure.update_xaxes(title_text="demonstrations that give the planted answer", tickvals=repetitions, showgrid=False)
    figure.update_yaxes(range=[-0.02, 1.02], gridcolor="#e6e8ec", title_text="share of queries", col=1)
    figure.update_yaxes(range=[-0.02, 1.02], gridcolor="#e6e8ec", col=2)
    figure.update_layout(legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.11, "yanchor": "bottom"})
    return figure


def _words(level: float) -> str:
    return {0.0: "the nearest", 1.0: "the farthest"}.get(level, f"{level:.0%} down the ranking")


def _line(
    places: list[int], points: list[Interval], aside: float, colour: str, label: str, *, legend: bool
) -> go.Scatter:
    return go.Scatter(
        x=[place + aside for place in places],
        y=[point.estimate for point in points],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [point.high - point.estimate for point in points],
            "arrayminus": [point.estimate - point.low for point in points],
            "thickness": 1.5,
            "width": 3,
        },
        customdata=[[place, point.low, point.high, point.n] for place, point in zip(places, points, strict=True)],
        hovertemplate=(
            "planted in %{customdata[0]}: %{y:.3f} [%{customdata[1]:.3f}, %{customdata[2]:.3f}]<br>"
            f"n = %{{customdata[3]}}<extra>{label}</extra>"
        ),
        mode="lines+markers",
        line={"color": colour, "width": 2},
        marker={"color": colour, "size": 8},
        name=label,
        legendgroup=label,
        showlegend=legend,
    )
