"""What taking something away costs, beside what taking away as much at random costs."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots

from probe.measures.effects import effects
from probe.plots import style

TITLES = {"log_probability": "log p of the answer", "correct": "accuracy", "copied": "copy rate"}
UNITS = {"log_probability": "change, nats", "correct": "change of the share", "copied": "change of the share"}
CONTROLS = {
    "keys": ("as many random tokens", style.ORANGE, "square"),
    "heads": ("random heads", style.GREEN, "diamond"),
}
ROW = 30
LABELS = 6.4
"""Pixels that a character of a label takes."""


def plot_knockout(result: xr.Dataset) -> go.Figure:
    """Draw the effects of interventions, a row for each and a panel for each measure.

    Points are means over episodes of paired differences, with 95 % intervals; beside them, smaller, those of the random
    controls. Where all rows take away one thing in windows of layers or in single heads, reading down is reading
    through the model.

    Parameters
    ----------
    result
        Of :func:`probe.knockout`.

    Returns
    -------
    plotly.graph_objects.Figure
    """
    summary = effects(result)
    measures, labels = summary["measure"].values.tolist(), summary["intervention"].values.tolist()
    places = np.arange(len(labels))[::-1]
    figure = make_subplots(cols=len(measures), shared_yaxes=True, horizontal_spacing=0.035)
    for column, measure in enumerate(measures, start=1):
        of = summary.sel(measure=measure)
        figure.add_vline(x=0, line={"color": style.FAINT, "width": 1}, row=1, col=column)
        for kind, (name, colour, symbol) in CONTROLS.items():
            ends = of["of_control"].sel(control=kind).values
            if not np.isnan(ends).all():
                points = _points(ends, places - 0.24, labels, name, colour, symbol, 6, column == 1)
                figure.add_trace(points, row=1, col=column)
        points = _points(of["effect"].values, places, labels, "taken away", style.INK, "circle", 9, column == 1)
        figure.add_trace(points, row=1, col=column)
        as_is = float(of["as_is"])
        style.heading(figure, f"{TITLES[measure]}, as is {as_is:.2f}", row=1, col=column)
        figure.update_xaxes(title_text=UNITS[measure], gridcolor=style.GRID, row=1, col=column)
    drawn = int(result.attrs.get("controls", 0))
    facts = [
        "Means over episodes of the paired change, with 95 % intervals (of shares Newcombe’s, else BCa). "
        + (f"Random controls: as many at random, mean of {drawn} draws." if drawn else "No random control was drawn.")
    ]
    style.finish(
        figure,
        result,
        "What taking it away costs",
        facts,
        body=max(150, ROW * len(labels)),
        extra=46,
        note="Others may stand in for what is taken away: an effect is a lower bound of its use.",
    )
    figure.update_yaxes(range=[-0.7, len(labels) - 0.3], showgrid=False, ticks="")
    figure.update_yaxes(tickvals=places.tolist(), ticktext=[style.escape(label) for label in labels], row=1, col=1)
    figure.update_layout(
        margin_l=int(24 + LABELS * max(map(len, labels))),
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "yref": "paper"},
    )
    figure.update_layout(legend_y=1 + 24 / max(150, ROW * len(labels)))
    return figure


def _points(
    ends: ArrayLike,
    places: ArrayLike,
    labels: list[str],
    name: str,
    colour: str,
    symbol: str,
    size: int,
    first: bool,
) -> go.Scatter:
    """Estimates with horizontal intervals; what is missing is left out."""
    ends = np.asarray(ends)
    estimates, low, high = ends.T
    return go.Scatter(
        x=estimates,
        y=places,
        mode="markers",
        name=name,
        legendgroup=name,
        showlegend=first,
        marker={"color": colour, "symbol": symbol, "size": size},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": np.nan_to_num(high - estimates),
            "arrayminus": np.nan_to_num(estimates - low),
            "thickness": 1.5 if size > 6 else 1,
            "width": 3 if size > 6 else 0,
            "color": colour,
        },
        customdata=ends,
        hovertext=[style.escape(label) for label in labels],
        hovertemplate=(
            f"<b>{name}</b>, %{{hovertext}}<br>%{{x:+.3g}} [%{{customdata[1]:+.3g}}, %{{customdata[2]:+.3g}}]"
            "<extra></extra>"
        ),
    )
