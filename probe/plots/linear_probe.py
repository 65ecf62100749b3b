"""What linear probes read from the residual stream: accuracy by layer, a panel for each target."""

from __future__ import annotations

import math

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe.measures.probe_summary import LEVEL, summarise_probes
from probe.plots import style

MARKS = {
    "demo_answer": ("last demonstration’s answer", style.VERMILLION, "diamond"),
    "image": ("query’s image tokens", style.BLUE, "square"),
    "question": ("query’s question", style.GREEN, "triangle-up"),
    "answer": ("row that answers", style.INK, "circle"),
}
"""Name, colour and mark of each position, the same in all panels."""

COLUMNS, HEIGHT, GAP_X, GAP_Y = 4, 220, 40, 74
FEW_LAYERS = 12
"""With more layers than this, marks are small."""

NOTE = (
    "That a probe can tell something does not say that the model uses it: read it beside a knockout. High accuracy on "
    "the control task says that the probe could learn types by heart."
)


def plot_linear_probe(result: xr.Dataset) -> go.Figure:
    """Draw accuracy by layer, a panel for each target and a line for each position.

    Full lines are the accuracy of the probe, with intervals; marks are filled where the permutation test finds that
    something is told, with the error held over all layers and positions of the panel. Dashed lines are the same probe
    on the control task, whose labels are a random function of the input's type. The dotted line is the best guess that
    needs no vector.

    Parameters
    ----------
    result
        Of :func:`probe.linear_probe`.

    Returns
    -------
    plotly.graph_objects.Figure
    """
    summary = summarise_probes(result)
    targets = summary["target"].values.tolist()
    rows = math.ceil(len(targets) / COLUMNS)
    columns = math.ceil(len(targets) / rows)
    body = rows * HEIGHT + (rows - 1) * GAP_Y
    width = style.WIDTH - style.MARGIN_LEFT - style.MARGIN_RIGHT
    figure = make_subplots(
        rows=rows,
        cols=columns,
        horizontal_spacing=GAP_X / width,
        vertical_spacing=GAP_Y / body if rows > 1 else 0,
    )
    missing = [name for name in targets if not (result["n_types"].sel(target=name) > 0)]
    facts = [
        "Points: share of episodes told by a probe that saw no episode of their group, with 95 % intervals (Wilson), n "
        f"on hover. Filled: p ≤ {LEVEL:g} over all layers and positions of the panel ({result.attrs['permutations']} "
        "permutations). Layer: the stream that enters its attention.",
        "Control task: the same probe on labels that are a random function of the input’s type. Best guess: of chance, "
        "the commonest label, that of the same question, and the demonstrations’ commonest answer.",
        *([f"No control task for {', '.join(missing)}: types would be labels."] if missing else []),
    ]
    style.finish(figure, result, "What can be read linearly", facts, body=body, extra=74, note=NOTE)
    layers = summary["layer"].values.tolist()
    places = list(range(len(layers)))
    figure.update_xaxes(range=[-0.5, len(layers) - 0.5], showgrid=False, **style.sparse_ticks(layers))
    figure.update_yaxes(range=[-0.04, 1.04], gridcolor=style.GRID, tickformat=".2~f", title={"standoff": 8})
    for number, target in enumerate(targets):
        row, col = divmod(number, columns)
        _draw_target(figure, summary.sel(target=target), places, row + 1, col + 1, first=number == 0)
        n_labels = int(result["n_labels"].sel(target=target))
        style.heading(figure, f"{style.escape(str(target))}  ({n_labels} labels)", row=row + 1, col=col + 1)
        if col == 0:
            figure.update_yaxes(title_text="accuracy", row=row + 1, col=1)
        if number + columns >= len(targets):
            figure.update_xaxes(title={"text": "layer", "standoff": 6}, row=row + 1, col=col + 1)
    for spare in range(len(targets), rows * columns):
        row, col = divmod(spare, columns)
        figure.update_xaxes(visible=False, row=row + 1, col=col + 1)
        figure.update_yaxes(visible=False, row=row + 1, col=col + 1)
    figure.update_layout(
        legend={
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1 + 30 / body,
            "yanchor": "bottom",
            "font_size": 12,
            "traceorder": "normal",
        }
    )
    return figure


def _draw_target(figure: go.Figure, summary: xr.Dataset, places: list[int], row: int, col: int, *, first: bool) -> None:
    """One panel."""
    layers = [f"layer {layer}" for layer in summary["layer"].values.tolist()]
    positions = summary["position"].values.tolist()
    size = 8 if len(layers) <= FEW_LAYERS else 5
    guess = go.Scatter(
        x=[-0.5, len(places) - 0.5],
        y=[float(summary["guess"])] * 2,
        mode="lines",
        line={"color": style.FAINT, "width": 1.5, "dash": "dot"},
        hovertemplate="best guess %{y:.3g}<extra></extra>",
        name="best guess without vectors",
        legendrank=1002,
        showlegend=first,
    )
    figure.add_trace(guess, row=row, col=col)
    for number, position in enumerate(positions):
        name, colour, symbol = MARKS.get(position, (position, style.PURPLE, "x"))
        cell = summary.sel(position=position)
        # Beside each other, so that intervals do not cover one another.
        aside = (number - (len(positions) - 1) / 2) * 0.09
        x = np.array(places) + aside
        control = go.Scatter(
            x=x,
            y=cell["control"].sel(end="estimate").values,
            mode="lines",
            line={"color": colour, "width": 1, "dash": "dash"},
            hovertemplate=f"{style.escape(name)}, control task %{{y:.3g}}<extra></extra>",
            showlegend=False,
        )
        figure.add_trace(control, row=row, col=col)
        line = style.points(
            x,
            cell["accuracy"].values,
            np.full(len(places), int(summary["n"])),
            layers,
            what=style.escape(name),
            quantity="accuracy",
            colour=colour,
            symbol=symbol,
            size=size,
            mode="lines+markers",
            name=name,
            showlegend=False,
        )
        line.update(marker_symbol=[symbol if told else f"{symbol}-open" for told in cell["told"].values.tolist()])
        figure.add_trace(line, row=row, col=col)
        if first:
            _explain(figure, name, colour, symbol, row, col)
    if first:
        dashed = {"mode": "lines", "line": {"color": style.FAINT, "width": 1, "dash": "dash"}, "legendrank": 1001}
        figure.add_trace(go.Scatter(x=[None], y=[None], name="control task", **dashed), row=row, col=col)


def _explain(figure: go.Figure, name: str, colour: str, symbol: str, row: int, col: int) -> None:
    """The legend's entry of a position: filled, whatever its first point is."""
    mark = go.Scatter(
        x=[None],
        y=[None],
        mode="lines+markers",
        line={"color": colour, "width": 1.5},
        marker={"color": colour, "size": 8, "symbol": symbol},
        name=name,
    )
    figure.add_trace(mark, row=row, col=col)
