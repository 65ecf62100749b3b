"""Layer by head maps of what each head does, and how alike the kinds of heads are."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe.measures.head_summary import summarise_heads
from probe.plots import style

COLUMNS = 4
GAP_X, GAP_Y = 30, 64
UNITS = {
    "copying": "eigenvalue score",
    "task recognition": "length in the residual stream",
    "task learning": "share of that length",
    "function vector": "p",
    "ablation": "nats",
}


def plot_heads(result: xr.Dataset, *, top: int | None = None) -> go.Figure:
    """Draw every head's scores beyond their null, a map for each kind.

    Colours are scaled in each map to its largest value; red is above the null, blue below. Marked are the heads that
    the selecting half ranks first; the numbers are those of the reporting half.

    Parameters
    ----------
    result
        Of :func:`probe.heads`.
    top
        How many heads to mark; default those that were ablated together.

    Returns
    -------
    plotly.graph_objects.Figure
    """
    summary = summarise_heads(result)
    kinds, layers, heads = (summary[name].values.tolist() for name in ("kind", "layer", "head"))
    marked = top if top is not None else int(result.attrs.get("top", 3))
    n_rows = -(-len(kinds) // COLUMNS)
    width = (style.WIDTH - style.MARGIN_LEFT - style.MARGIN_RIGHT - (COLUMNS - 1) * GAP_X) / COLUMNS
    height = float(np.clip(width / len(heads) * len(layers), 120, 320))
    body = round(n_rows * height + (n_rows - 1) * GAP_Y)
    figure = make_subplots(
        rows=n_rows,
        cols=COLUMNS,
        horizontal_spacing=GAP_X / (COLUMNS * width + (COLUMNS - 1) * GAP_X),
        vertical_spacing=GAP_Y / body if n_rows > 1 else 0,
    )
    for number, kind in enumerate(kinds):
        row, column = number // COLUMNS + 1, number % COLUMNS + 1
        own = summary.sel(kind=kind)
        values = own["beyond"].sel(end="estimate").values
        largest = float(np.nanmax(np.abs(values))) if not np.isnan(values).all() else 1.0
        figure.add_trace(_map(own, values, largest or 1.0), row=row, col=column)
        if np.isnan(values).any():
            figure.add_trace(style.hatch(np.isnan(values)), row=row, col=column)
        y, x = np.nonzero(own["rank"].values <= marked)
        size = float(np.clip(0.55 * min(width / len(heads), height / len(layers)), 4, 12))
        first = go.Scatter(
            x=x,
            y=y,
            mode="markers",
            marker={"symbol": "circle", "size": size, "color": "white", "line": {"width": 1.5, "color": style.INK}},
            hoverinfo="skip",
            showlegend=False,
        )
        figure.add_trace(first, row=row, col=column)
        style.heading(figure, kind, row=row, col=column, above=18)
        unit = UNITS.get(kind, "attention")
        figure.add_annotation(
            text=f"to ±{largest:.2g}, {unit}",
            xref="x domain",
            yref="y domain",
            x=0,
            y=1,
            xanchor="left",
            yanchor="bottom",
            yshift=3,
            showarrow=False,
            font={"size": 11, "color": style.FAINT},
            row=row,
            col=column,
        )
    for number in range(len(kinds), n_rows * COLUMNS):
        row, column = number // COLUMNS + 1, number % COLUMNS + 1
        figure.update_xaxes(visible=False, row=row, col=column)
        figure.update_yaxes(visible=False, row=row, col=column)
    style.finish(
        figure,
        result,
        "What each head does, by layer and head",
        [
            "Scores beyond their null, of the half of sequences and episodes that did not select; each map has a scale "
            f"of its own, white is 0. Circles: the {marked} heads that the selecting half ranks first.",
            *([f"No image rows: {result.attrs['no_images']}."] if "no_images" in result.attrs else []),
        ],
        body=body,
        extra=44,
        note="Attention and weights say what a head could do; ablation and function vector say what it does.",
    )
    figure.update_xaxes(range=[-0.5, len(heads) - 0.5], showgrid=False, **style.sparse_ticks(heads))
    figure.update_yaxes(range=[-0.5, len(layers) - 0.5], showgrid=False, **style.sparse_ticks(layers))
    figure.update_yaxes(title_text="layer", title_standoff=6, col=1)
    for column in range(1, COLUMNS + 1):
        last = max((number // COLUMNS + 1 for number in range(len(kinds)) if number % COLUMNS + 1 == column), default=0)
        figure.update_xaxes(title={"text": "head", "standoff": 4}, row=last, col=column)
    return figure


def _map(own: xr.Dataset, values: np.ndarray, largest: float) -> go.Heatmap:
    """One kind."""
    grid = np.meshgrid(own["layer"].values, own["head"].values, indexing="ij")
    low, high = (own["beyond"].sel(end=end).values for end in ("low", "high"))
    return go.Heatmap(
        z=values,
        zmin=-largest,
        zmax=largest,
        colorscale=style.DIVERGING,
        showscale=False,
        hoverongaps=False,
        customdata=np.stack([*grid, own["score"].values, low, high, own["p"].values, own["rank"].values], -1),
        hovertemplate=(
            f"<b>{own['kind'].item()}</b>, head %{{customdata[0]}}.%{{customdata[1]}}<br>score %{{customdata[2]:.3g}}, "
            "beyond its null %{z:.3g} [%{customdata[3]:.3g}, %{customdata[4]:.3g}]<br>p (family-wise) "
            "%{customdata[5]:.3g}, rank in the other half %{customdata[6]}<extra></extra>"
        ),
    )


def plot_head_likeness(result: xr.Dataset) -> go.Figure:
    """Draw how alike kinds of heads are: Spearman's correlation over heads of what two kinds go beyond their null.

    Parameters
    ----------
    result
        Of :func:`probe.heads`.

    Returns
    -------
    plotly.graph_objects.Figure
    """
    summary = summarise_heads(result)
    kinds = summary["kind"].values.tolist()
    values = summary["likeness"].values
    words = np.where(np.isnan(values), "", np.char.mod("%.2f", values))
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=kinds,
            y=kinds,
            zmin=-1,
            zmax=1,
            colorscale=style.DIVERGING,
            text=words,
            texttemplate="%{text}",
            textfont={"size": 10},
            hovertemplate="%{y} and %{x}: %{z:.2f}<extra></extra>",
            colorbar={"title": {"text": "ρ"}, "thickness": 12},
        )
    )
    reliable = [
        f"{kind} {value:.2f}"
        for kind, value in zip(kinds, summary["reliability"].values.tolist(), strict=True)
        if value == value
    ]
    style.finish(
        figure,
        result,
        "Which kinds of heads are the same heads",
        [
            "Spearman's correlation over heads of what two kinds go beyond their null.",
            f"The same between the two halves of one kind: {', '.join(reliable)}.",
        ],
        body=34 * len(kinds),
        width=900,
        note="Kinds that are computed from the same attention are alike by construction.",
    )
    figure.update_yaxes(autorange="reversed", ticks="")
    figure.update_xaxes(tickangle=-40, ticks="")
    figure.update_layout(margin={"l": 150, "b": 130}, height=figure.layout.height + 90)
    return figure
