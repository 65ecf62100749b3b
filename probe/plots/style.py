"""What all figures share: type, colours, the lines under the title, and the hatching of what is missing."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
import xarray as xr

from probe.errors import UsageError

WIDTH = 1100
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"
INK, FAINT, WARNING = "#1f2430", "#5b6270", "#9a3b00"
BLUE, VERMILLION, GREEN, PURPLE, ORANGE = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"
"""Of Okabe and Ito's palette, which the colour-blind can tell apart."""

COLOURS = {"visual": BLUE, "textual": VERMILLION}
GRID = "#e6e8ec"

SEQUENTIAL = "dense"
"""From cmocean: perceptually even, light for little, safe for the colour-blind."""

DIVERGING = "RdBu_r"
"""From ColorBrewer: blue below the middle, white in the middle, red above; safe for the colour-blind."""

NOT_USE = (
    "Attention mass says where a head looks, not whether the model uses what is there: read it beside a knockout of "
    "the same heads."
)
_BUTTONS = ("pan", "select", "lasso", "zoomIn", "zoomOut", "autoScale")
CONFIG = {
    "displaylogo": False,
    # plotly's own tool bar offers to upload the figure to its makers; results may be private.
    "plotlyServerURL": "",
    "showSendToCloud": False,
    "modeBarButtonsToRemove": ["sendChartToCloud", *(f"{name}2d" for name in _BUTTONS)],
    "toImageButtonOptions": {"format": "svg"},
}
"""How plotly.js shows figures in what this room writes: quiet, offline, and saved as SVG by its camera button."""

MARGIN_LEFT, MARGIN_RIGHT = 76, 84
LINE = 17


def finish(
    figure: go.Figure,
    result: xr.Dataset,
    title: str,
    facts: Sequence[str],
    *,
    body: int,
    n: str | None = None,
    width: int = WIDTH,
    extra: int = 0,
    note: str = NOT_USE,
) -> go.Figure:
    """Give a figure its size, type, title and the lines that every figure carries.

    Parameters
    ----------
    figure
        With traces and axes.
    result
        What it shows; its attributes name the model and, for the bundled one, the caveat.
    title
        What the figure shows.
    facts
        Sentences about this figure and its scales, a line each; model, data and n are said before them. Plain text,
        escaped here.
    body
        Height in pixels of the plotting area.
    n
        What the figure rests on, in words; by default, all episodes of the result.
    width
        Width in pixels of the whole figure.
    extra
        Pixels to leave between the lines under the title and the plotting area, for headings.
    note
        What has to be minded with every figure of its kind; by default, of attention.

    Returns
    -------
    plotly.graph_objects.Figure
        The same figure.
    """
    columns = int((width - 40) / 6.5)
    first = f"{source(result)}, {n or episodes_in_words(result)}."
    sentences = [(first, INK), *((fact, FAINT) for fact in facts), (note, FAINT), (caveat(result), WARNING)]
    lines = [(line, colour) for text, colour in sentences for line in textwrap.wrap(text, columns)]
    subtitle = "<br>".join(f'<span style="color:{colour}">{escape(line)}</span>' for line, colour in lines)
    top = 40 + LINE * len(lines) + 14 + extra
    bottom = 48
    figure.update_layout(
        template="none",
        width=width,
        height=top + body + bottom,
        margin={"l": MARGIN_LEFT, "r": MARGIN_RIGHT, "t": top, "b": bottom},
        font={"family": FONT, "size": 12, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        title={
            "text": f"<b>{escape(title)}</b>",
            "font": {"size": 17},
            "subtitle": {"text": subtitle, "font": {"size": 12}},
            "x": 0,
            "xref": "container",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"l": 14, "t": 14},
        },
        hoverlabel={"font": {"family": FONT}, "align": "left"},
    )
    figure.update_xaxes(ticks="outside", ticklen=3, tickcolor="#9aa1ad", zeroline=False, title_font_size=12)
    figure.update_yaxes(ticks="outside", ticklen=3, tickcolor="#9aa1ad", zeroline=False, title_font_size=12)
    return figure


def source(result: xr.Dataset) -> str:
    """The model and the data, in words, from the attributes."""
    model = result.attrs.get("model", "unnamed model")
    data = result.attrs.get("task") or result.attrs.get("data")
    return f"{model} on {data}" if data else f"{model}"


def caveat(result: xr.Dataset) -> str:
    """The caveat of the bundled model; empty on any other."""
    return str(result.attrs.get("caveat") or "")


def episodes_in_words(result: xr.Dataset) -> str:
    """How many episodes, which half of them if it is only one, and how many failed."""
    n = result.sizes["episode"]
    words = f"n = {n} episode{'s' if n != 1 else ''}"
    halves = {str(half) for half in result["half"].values} if "half" in result.coords else set()
    if len(halves) == 1:
        words += f" ({halves.pop()} half)"
    failed = int(result.attrs.get("n_failed", 0))
    return words + (f", {failed} of {result.attrs.get('n_attempted', n + failed)} attempted failed" if failed else "")


def shots_in_words(number: int) -> str:
    """As it is written under a column or in a hover."""
    return f"{number} shot{'s' if number != 1 else ''}"


def points(
    x: npt.ArrayLike,
    ends: npt.NDArray[np.float64],
    n: npt.ArrayLike,
    labels: Sequence[str],
    *,
    what: str,
    quantity: str,
    colour: str,
    symbol: str,
    size: int = 8,
    **options: Any,
) -> go.Scatter:
    """Estimates with their intervals; what is missing is left out.

    Parameters
    ----------
    x
        Where each point stands.
    ends
        Shape (point, 3): estimate, low and high. A point without an interval has NaN for its ends.
    n
        What each point rests on.
    labels
        Of each point, for the hover. Plain text, escaped here.
    what, quantity
        For the hover: of what the points are, and what is measured.
    colour, symbol, size
        Of the marks; small ones have intervals without ends.
    options
        Of plotly's scatter; by default marks without a line.
    """
    ends = np.asarray(ends, dtype=float).reshape(-1, 3)
    estimates, low, high = ends.T
    return go.Scatter(
        x=np.asarray(x),
        y=estimates,
        error_y={
            "type": "data",
            "symmetric": False,
            "array": np.nan_to_num(high - estimates),
            "arrayminus": np.nan_to_num(estimates - low),
            "thickness": 1.5,
            "width": 3 if size >= 8 else 0,
        },
        customdata=np.column_stack([ends, np.asarray(n)]),
        hovertext=[escape(label) for label in labels],
        hovertemplate=(
            f"<b>{what}</b>, %{{hovertext}}<br>{quantity} %{{y:.3g}} [%{{customdata[1]:.3g}}, %{{customdata[2]:.3g}}]"
            "<br>n = %{customdata[3]}<extra></extra>"
        ),
        line={"color": colour, "width": 1.5},
        marker={"color": colour, "size": size, "symbol": symbol},
        **{"mode": "markers", **options},
    )


def heading(figure: go.Figure, text: str, *, row: int, col: int, above: int = 6) -> None:
    """Write the heading of a panel so many pixels above its left end."""
    figure.add_annotation(
        text=f"<b>{text}</b>",
        xref="x domain",
        yref="y domain",
        x=0,
        y=1,
        xanchor="left",
        yanchor="bottom",
        yshift=above,
        showarrow=False,
        font={"size": 13},
        row=row,
        col=col,
    )


def hold(figure: go.Figure, *, row: int, col: int) -> None:
    """Keep the place of a panel that may have no trace: plotly.js would not draw it, nor its words."""
    figure.add_trace(go.Scatter(x=[None], y=[None], hoverinfo="skip", showlegend=False), row=row, col=col)


def say(figure: go.Figure, text: str, *, row: int, col: int) -> None:
    """Write into the middle of a panel why it is empty."""
    figure.add_annotation(
        text=text,
        xref="x domain",
        yref="y domain",
        x=0.5,
        y=0.5,
        showarrow=False,
        bgcolor="white",
        borderpad=3,
        row=row,
        col=col,
    )


def write(figure: go.Figure, text: str, x: Iterable[float], y: float, colour: str, *, row: int, col: int) -> None:
    """Write small words in the place of points."""
    font = {"size": 10, "color": colour}
    for at in x:
        figure.add_annotation(
            text=text, x=at, y=y, font=font, showarrow=False, bgcolor="white", borderpad=1, row=row, col=col
        )


def head_name(layer: int, head: int) -> str:
    """The name of a head in titles."""
    return f"layer {layer}, head {head}"


def head_places(result: xr.Dataset, heads: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Positions on the axes ``layer`` and ``head`` of heads that are named by their labels.

    Raises
    ------
    UsageError
        If the result has no such head.
    """
    layers, numbers = result["layer"].values.tolist(), result["head"].values.tolist()
    for layer, head in heads:
        if layer not in layers or head not in numbers:
            raise UsageError(
                f"The result has no head (layer {layer}, head {head}); its layers are {_span(layers)}, "
                f"its heads {_span(numbers)}."
            )
    return [(layers.index(layer), numbers.index(head)) for layer, head in heads]


def sparse_ticks(labels: Sequence[object], most: int = 8) -> dict[str, object]:
    """Axis options that label at most so many of the positions 0, 1, …, evenly."""
    step = next(step for step in (1, 2, 4, 5, 8, 10, 20, 50, 100, 1000) if len(labels) <= most * step or step == 1000)
    places = list(range(0, len(labels), step))
    return {"tickmode": "array", "tickvals": places, "ticktext": [str(labels[place]) for place in places]}


def hatch(missing: npt.NDArray[np.bool_]) -> go.Scatter:
    """Grey hatching over the missing cells of a heat map whose cells are centred on whole numbers.

    Parameters
    ----------
    missing
        Shape (rows, columns), true where there is no value.
    """
    x: list[float | None] = []
    y: list[float | None] = []
    for row in range(missing.shape[0]):
        for first, last in _runs(missing[row]):
            x += [first - 0.5, last + 0.5, last + 0.5, first - 0.5, first - 0.5, None]
            y += [row - 0.5, row - 0.5, row + 0.5, row + 0.5, row - 0.5, None]
    return go.Scatter(
        x=x,
        y=y,
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor="#ececec",
        fillpattern={"shape": "/", "size": 6, "solidity": 0.18, "fgcolor": "#8d8d8d", "bgcolor": "#ececec"},
        hoverinfo="skip",
        showlegend=False,
    )


def escape(text: str) -> str:
    """For plotly's own small HTML, which knows no ``&quot;``."""
    return html.escape(text, quote=False)


def _runs(flags: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and last place of every run of true values: fewer and cleaner shapes than one for each cell."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(int)))
    return [(int(first), int(end) - 1) for first, end in zip(edges[::2], edges[1::2], strict=True)]


def _span(labels: list[int]) -> str:
    if labels == list(range(labels[0], labels[-1] + 1)) and len(labels) > 1:
        return f"{labels[0]} to {labels[-1]}"
    return ", ".join(str(label) for label in labels)
