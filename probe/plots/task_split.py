"""Recognising a task and learning one: accuracy by shots with right, random, renamed and exchanged labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe.measures.split_summary import summarise_split
from probe.plots import style

MARKS = {
    "gold": ("gold", style.INK, "circle"),
    "random": ("random (TR)", style.BLUE, "square"),
    "abstract": ("abstract (TL)", style.VERMILLION, "diamond"),
    "flipped": ("flipped", style.PURPLE, "triangle-down"),
    "words": ("words", style.GREEN, "star"),
}
"""Name, colour and mark of each setting, the same in all panels."""

ASIDE = {"gold": -0.28, "random": -0.14, "abstract": 0.0, "flipped": 0.14, "words": 0.28}
"""Marks stand beside each other, so that their intervals do not cover one another."""

HEIGHT, GAP_X, GAP_Y = 280, 76, 54
WIDTHS = (0.48, 0.23, 0.29)

EXPLAINED = (
    "The demonstrations’ labels are right (gold), drawn at random (random: recognition, TR), symbols in their place "
    "(abstract: learning, TL), exchanged (flipped); or there are none and the question tells the symbols (words)."
)

NOTE = (
    "The best guess is the best of three that need no input: chance, the label commonest in the pool, the label "
    "commonest in context. With right labels recognition and learning cannot be told apart; what abstract labels have "
    "beyond guessing was learned from the demonstrations."
)


def plot_task_split(result: xr.Dataset) -> go.Figure:
    """Draw recognition (TR) and learning (TL) by shots.

    *a* is the accuracy of choosing among the labels in every setting, with the best guess that needs no input dotted
    beside it, and each seed by itself where there are several. *b* is what is left of it beyond guessing, for random
    labels (TR) and for symbols (TL): 0 is guessing, 1 is always right. *c* is about free answers: how often they are
    one of the labels at all (the TR ratio), and how often a wrong one is a demonstration's answer.

    Parameters
    ----------
    result
        Of :func:`probe.task_split`. With a dimension ``shown`` besides, such as images and words, there is one row of
        panels for each of its labels.

    Returns
    -------
    plotly.graph_objects.Figure
    """
    rows = {str(label): result.sel(shown=label) for label in result["shown"].values} if "shown" in result.dims else {}
    summaries = [summarise_split(part) for part in rows.values()] or [summarise_split(result)]
    body = len(summaries) * HEIGHT + (len(summaries) - 1) * GAP_Y
    width = style.WIDTH - style.MARGIN_LEFT - style.MARGIN_RIGHT
    figure = make_subplots(
        rows=len(summaries),
        cols=3,
        column_widths=list(WIDTHS),
        horizontal_spacing=GAP_X / width,
        vertical_spacing=GAP_Y / body,
    )
    seeds = summaries[0].sizes["seed"]
    unread = result.attrs.get("no_words")
    facts = [
        EXPLAINED,
        "Points: shares of episodes with 95 % intervals over episodes (Wilson), n on hover; b takes the guess as "
        "known. TR ratio: free answers that are one of the labels. n/a: no free answer was wrong.",
        *([f"Small circles: the {seeds} seeds, each by itself."] if seeds > 1 else []),
        *([f"The setting “words” was not read: {unread}"] if unread else []),
    ]
    style.finish(figure, result, "Recognising a task and learning one", facts, body=body, extra=72, note=NOTE)

    shots = [str(k) for k in result["shot"].values]
    places = list(range(len(shots)))
    figure.update_xaxes(range=[-0.5, len(shots) - 0.5], tickvals=places, ticktext=shots, showgrid=False)
    figure.update_xaxes(title={"text": "shots", "standoff": 6}, row=len(summaries))
    figure.update_yaxes(title={"standoff": 8}, gridcolor=style.GRID, tickformat=".2~f", range=[-0.04, 1.04])
    figure.update_yaxes(range=_beyond(summaries), zeroline=True, zerolinecolor=style.FAINT, col=2)
    for row, summary in enumerate(summaries, start=1):
        _draw_accuracy(figure, summary, row)
        _draw_corrected(figure, summary, row)
        _draw_free_answers(figure, summary, row)
        names = ("accuracy", "(accuracy − guess) ÷ (1 − guess)", "share of free answers")
        for col, name in enumerate(names, start=1):
            label = f"<b>shown: {style.escape(list(rows)[row - 1])}</b><br>" if rows and col == 1 else ""
            figure.update_yaxes(title_text=label + name, row=row, col=col)
    style.heading(figure, "a   choosing among the labels", row=1, col=1)
    style.heading(figure, "b   beyond guessing", row=1, col=2)
    style.heading(figure, "c   TR ratio of free answers", row=1, col=3)
    legend = {"orientation": "h", "xanchor": "left", "yanchor": "bottom", "font_size": 12, "traceorder": "normal"}
    third = 1 - WIDTHS[2] * (1 - 2 * GAP_X / width)
    # One above the other: the first may be as wide as the figure.
    figure.update_layout(
        legend={**legend, "x": 0, "y": 1 + 44 / body}, legend2={**legend, "x": third, "y": 1 + 24 / body}
    )
    return figure


def _places(summary: xr.Dataset, setting: str) -> np.ndarray:
    return np.arange(summary.sizes["shot"]) + ASIDE[setting]


def _settings(summary: xr.Dataset, *wanted: str) -> list[str]:
    """Those of the settings that the result has, in their order of drawing."""
    return [name for name in wanted or MARKS if name in summary["setting"].values]


def _beyond(summaries: list[xr.Dataset]) -> list[float]:
    """The range of panel b, the same in all rows."""
    ends = [summary["corrected"].sel(setting=_settings(summary, "random", "abstract")).values for summary in summaries]
    return [min(0.0, *(np.nan_to_num(values).min(initial=0) for values in ends)) - 0.05, 1.05]


def _points(summary: xr.Dataset, variable: str, setting: str, **options: Any) -> go.Scatter:
    """The line of a setting by shots."""
    name, colour, symbol = MARKS[setting]
    return style.points(
        _places(summary, setting),
        summary[variable].sel(setting=setting).values,
        summary["n"].sel(setting=setting).values,
        [style.shots_in_words(k) for k in summary["shot"].values.tolist()],
        **{
            "what": setting,
            "quantity": variable,
            "colour": colour,
            "symbol": symbol,
            "mode": "lines+markers",
            "name": name,
            "showlegend": False,
            **options,
        },
    )


def _draw_accuracy(figure: go.Figure, summary: xr.Dataset, row: int) -> None:
    """Panel a, and the legend of the settings."""
    settings = _settings(summary)
    for setting in settings:
        name, colour, _ = MARKS[setting]
        x = _places(summary, setting)
        guess = go.Scatter(
            x=x,
            y=summary["guess"].sel(setting=setting).values,
            mode="lines+markers",
            line={"color": colour, "width": 1, "dash": "dot"},
            marker={"color": colour, "size": 8, "symbol": "line-ew-open", "line": {"width": 1.5}},
            hovertemplate=f"{setting}, best guess: %{{y:.3g}}<extra></extra>",
            name="best guess without input",
            legendrank=1001,
            showlegend=row == 1 and setting == settings[0],
        )
        figure.add_trace(guess, row=row, col=1)
        seeds = summary["by_seed"].sel(setting=setting)
        if seeds.sizes["seed"] > 1:
            dots = go.Scatter(
                x=np.repeat(x + 0.06, seeds.sizes["seed"]),
                y=seeds.transpose("shot", "seed").values.ravel(),
                customdata=np.tile(seeds["seed"].values, len(x)),
                mode="markers",
                marker={"color": colour, "size": 4, "symbol": "circle-open", "line": {"width": 1}},
                hovertemplate=f"{setting}, seed %{{customdata}}: %{{y:.3g}}<extra></extra>",
                name="one seed",
                legendrank=1002,
                showlegend=row == 1 and setting == settings[0],
            )
            figure.add_trace(dots, row=row, col=1)
        there = bool(summary["accuracy"].sel(setting=setting).notnull().any())
        line = _points(summary, "accuracy", setting, name=name if there else f"{name} (not read)", showlegend=row == 1)
        figure.add_trace(line, row=row, col=1)


def _draw_corrected(figure: go.Figure, summary: xr.Dataset, row: int) -> None:
    """Panel b."""
    settings = _settings(summary, "random", "abstract")
    for setting in settings:
        figure.add_trace(_points(summary, "corrected", setting, quantity="corrected accuracy"), row=row, col=2)
    if not settings:
        style.hold(figure, row=row, col=2)
        style.say(figure, "neither random labels<br>nor symbols were read", row=row, col=2)


def _draw_free_answers(figure: go.Figure, summary: xr.Dataset, row: int) -> None:
    """Panel c."""
    style.hold(figure, row=row, col=3)
    for setting in _settings(summary, "gold", "random", "abstract"):
        figure.add_trace(_points(summary, "in_labels", setting, quantity="TR ratio"), row=row, col=3)
    if "abstract" not in summary["setting"]:
        return
    # Without demonstrations there is nothing to copy.
    shown = summary.isel(shot=summary["shot"].values > 0)
    _, colour, _ = MARKS["abstract"]
    first = summary.sizes["shot"] - shown.sizes["shot"]
    copies = _points(
        shown.assign(n=shown["n_wrong"]),
        "wrong_copied",
        "abstract",
        quantity="wrong answers that are copies",
        symbol="diamond-open",
        name="wrong ones that are copies (TL)",
        legend="legend2",
        showlegend=row == 1,
    )
    copies.update(x=copies.x + first + ASIDE["flipped"], line_dash="dash")
    figure.add_trace(copies, row=row, col=3)
    missing = np.isnan(copies.y) & (shown["n"].sel(setting="abstract").values > 0)
    style.write(figure, "n/a", copies.x[missing], 0, colour, row=row, col=3)
