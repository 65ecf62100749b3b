"""Copying of a planted wrong answer, by how often it is repeated and how like the demonstrations are."""

from __future__ import annotations

import numpy as np
import plotly.colors
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe.errors import UsageError
from probe.plots import style
from probe.stats import wilson


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
    titles = ("says the planted answer", "says the right answer")
    figure = make_subplots(
        cols=2,
        horizontal_spacing=0.08,
        subplot_titles=[f"<b>{title}</b>" for title in titles],
    )
    figure.update_annotations(font_size=13)
    for column, name in enumerate(("said_planted", "correct"), start=1):
        values = result[f"{prefix}{name}"].transpose("level", "repetition", episode)
        for i, (level, colour) in enumerate(zip(levels, colours, strict=True)):
            shares = [wilson(int(flags.sum()), len(flags)) for flags in values.values[i]]
            aside = 0.06 * (i - (len(levels) - 1) / 2)
            label = f"{_words(level)}, mean cosine {similar[i]:.2f}"
            line = style.points(
                [times + aside for times in repetitions],
                np.array([share.ends for share in shares]),
                [share.n for share in shares],
                [f"planted in {times}" for times in repetitions],
                what=label,
                quantity=titles[column - 1],
                colour=colour,
                symbol="circle",
                mode="lines+markers",
                name=label,
                legendgroup=label,
                showlegend=column == 1,
            )
            figure.add_trace(line, row=1, col=column)
    n = result.sizes[episode]
    attempted = int(result.attrs.get(f"{prefix}n_attempted", n))
    encoder = result.attrs.get("encoder")
    facts = ["Points have 95 % intervals over queries (Wilson). Every level asks the same queries."]
    if attempted > n:
        facts.append(f"{attempted - n} more queries leave no wrong answer to plant.")
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
    figure.update_yaxes(range=[-0.02, 1.02], gridcolor=style.GRID, title_text="share of queries", col=1)
    figure.update_yaxes(range=[-0.02, 1.02], gridcolor=style.GRID, col=2)
    figure.update_layout(legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.11, "yanchor": "bottom"})
    return figure


def _words(level: float) -> str:
    return {0.0: "the nearest", 1.0: "the farthest"}.get(level, f"{level:.0%} down the ranking")
