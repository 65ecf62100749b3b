"""Flows of saliency by layer: where labels gather what they hold, and where it is read."""

from __future__ import annotations

import math

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe.measures.saliency_summary import summarise_saliency
from probe.plots import style

PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a   label words as anchors", ("wp", "pq", "ww")),
    ("b   within a demonstration", ("image->answer", "question->answer")),
    ("c   to q, the row that answers", ("answer->q", "image->q", "question->q", "query image->q", "query question->q")),
)
"""The flows of each panel."""

MARKS: dict[str, tuple[str, str, str, str]] = {
    "wp": ("all → answers (wp)", style.GREEN, "square", "solid"),
    "pq": ("answers → q (pq)", style.INK, "circle", "solid"),
    "ww": ("the rest (ww)", style.FAINT, "x-thin-open", "dot"),
    "image->answer": ("image → its answer", style.BLUE, "square", "solid"),
    "question->answer": ("question → its answer", style.VERMILLION, "diamond", "solid"),
    "answer->q": ("demonstrations’ answers", style.INK, "circle", "solid"),
    "image->q": ("their images", style.BLUE, "square", "solid"),
    "question->q": ("their questions", style.VERMILLION, "diamond", "solid"),
    "query image->q": ("query’s image", style.BLUE, "square-open", "dash"),
    "query question->q": ("query’s question", style.VERMILLION, "diamond-open", "dash"),
}
"""Name, colour, mark and line of each flow: blue is visual, vermillion textual, dashed the query's."""

HEIGHT, GAP_X = 340, 40
WIDTHS = (0.32, 0.3, 0.38)
LEGEND = 108
"""Pixels above the panels: a heading, and up to five names of lines."""

DECADES = 4
"""So far below the highest point the scale ends."""

NOTE = (
    "A gradient is a first-order estimate: it misses what other paths would take over, and vanishes where the model is "
    "sure. Read flows and layers of one figure against each other, and check them by a knockout of the same pairs."
)


def plot_saliency(result: xr.Dataset) -> go.Figure:
    """Draw the flows of saliency by layer.

    *a* are the flows of "Label words are anchors": into the demonstrations' answers, from these to q (the row that
    predicts the answer), and all other pairs. *b* is what a demonstration's answer takes from the image and the
    question of the same demonstration. *c* is what q takes, from the demonstrations and from the query. Lines are means
    over episodes of the mean over pairs; bands are 95 % intervals over episodes. The scale is logarithmic and the same
    in all panels; it ends :data:`DECADES` decades below the highest point, and what is less, or 0, stands at its edge.

    Parameters
    ----------
    result
        Of :func:`probe.saliency`.

    Returns
    -------
    plotly.graph_objects.Figure
    """
    summary = summarise_saliency(result)
    width = style.WIDTH - style.MARGIN_LEFT - style.MARGIN_RIGHT
    figure = make_subplots(cols=len(PANELS), column_widths=list(WIDTHS), horizontal_spacing=GAP_X / width)
    bottom, top = _range(summary)
    facts = [
        "Saliency |Σ A·∂L/∂A| (sum over heads), L = −log p(right answer), mean over pairs of positions; q is the row "
        "that predicts the answer.",
        "Lines: means over episodes, with 95 % intervals over episodes (BCa) as bands. The scale is logarithmic and "
        f"the same in all panels; what is below {bottom:.1g}, or 0, stands at its lower edge.",
        *(["No image is a token of this model’s text: flows from images are undefined."] if _no_images(result) else []),
    ]
    style.finish(figure, result, "What the right answer depends on", facts, body=HEIGHT, extra=LEGEND + 24, note=NOTE)
    layers = result["layer"].values.tolist()
    for column, (heading, flows) in enumerate(PANELS, start=1):
        style.hold(figure, row=1, col=column)
        for flow in flows:
            for trace in _line(summary, flow, column, bottom):
                figure.add_trace(trace, row=1, col=column)
        style.heading(figure, heading, row=1, col=column, above=LEGEND)
    ticks = style.sparse_ticks(layers)
    figure.update_xaxes(range=[-0.3, len(layers) - 0.7], showgrid=False, title_text="layer", title_standoff=6, **ticks)
    figure.update_yaxes(
        type="log",
        range=[math.log10(bottom), math.log10(top)],
        gridcolor=style.GRID,
        dtick=1,
        exponentformat="power",
        title={"standoff": 8},
    )
    figure.update_yaxes(showticklabels=False, ticks="", col=2)
    figure.update_yaxes(showticklabels=False, ticks="", col=3)
    figure.update_yaxes(title_text="saliency (nats per pair)", col=1)
    _legends(figure)
    return figure


def _range(summary: xr.Dataset) -> tuple[float, float]:
    """The ends of the scale."""
    drawn = summary["saliency"].sel(flow=list(MARKS)).values
    highest = float(np.nan_to_num(drawn).max()) or 1.0
    return float(f"{highest / 10**DECADES:.0e}"), 1.5 * highest


def _no_images(result: xr.Dataset) -> bool:
    return "image_flows" in result.attrs


def _line(summary: xr.Dataset, flow: str, column: int, bottom: float) -> list[go.Scatter]:
    """The band and the line of one flow."""
    name, colour, symbol, dash = MARKS[flow]
    part = summary.sel(flow=flow)
    ends = part["saliency"].transpose("layer", "end").values
    estimate, low, high = ends.T
    places = np.arange(len(ends))
    there = np.isfinite(low) & np.isfinite(high)
    legend = "legend" if column == 1 else f"legend{column}"
    band = go.Scatter(
        x=np.concatenate([places[there], places[there][::-1]]),
        y=np.maximum(np.concatenate([high[there], low[there][::-1]]), bottom),
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=_faint(colour),
        hoverinfo="skip",
        showlegend=False,
        legendgroup=flow,
    )
    line = go.Scatter(
        x=places,
        y=np.maximum(estimate, bottom),
        customdata=np.column_stack([ends, part["n"].values, part["layer"].values]),
        hovertemplate=(
            f"<b>{name}</b>, layer %{{customdata[4]}}<br>%{{customdata[0]:.3g}} "
            "[%{customdata[1]:.3g}, %{customdata[2]:.3g}]<br>n = %{customdata[3]}<extra></extra>"
        ),
        mode="lines+markers",
        cliponaxis=False,
        line={"color": colour, "width": 1.5, "dash": dash},
        marker={"color": colour, "size": 7, "symbol": symbol, "line": {"color": colour, "width": 1.5}},
        name=name if np.isfinite(estimate).any() else f"{name} (none here)",
        legend=legend,
        legendgroup=flow,
    )
    return [band, line]


def _faint(colour: str) -> str:
    """The same colour, nearly transparent."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def _legends(figure: go.Figure) -> None:
    """One above each panel, so that lines are named where they are."""
    for column in range(1, len(PANELS) + 1):
        number = "" if column == 1 else str(column)
        place = {"x": figure.layout[f"xaxis{number}"].domain[0], "xanchor": "left", "yanchor": "top"}
        style_of = {"y": 1 + LEGEND / HEIGHT, "font_size": 12, "traceorder": "normal", "bgcolor": "rgba(0,0,0,0)"}
        figure.update_layout({f"legend{number}": {**place, **style_of}})
