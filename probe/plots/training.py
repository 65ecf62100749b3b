"""How training of vectors went: the loss on the episodes that validate, by epoch."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from probe.plots import style
from probe.plots.vectors import colour_of

BODY = 380
DASHES = ("solid", "dash", "dashdot", "longdash")
"""Of variants of one method."""
NOTE = "Losses of different methods are of different things: compare vectors by what they recover, not by these."


def plot_training(result: xr.Dataset) -> go.Figure:
    """Draw the loss on validation episodes, a line for each vector, a colour for each method.

    A ring marks the epoch whose parameters were kept. Dotted, where they were recorded: the loss that was learned from.

    Parameters
    ----------
    result
        Of ``probe vector train``.

    Returns
    -------
    plotly.graph_objects.Figure
    """
    figure = go.Figure()
    variants: dict[str, list[str]] = {}
    for method in dict.fromkeys(result["method"].values.tolist()):
        variants.setdefault(method.partition(" ")[0], []).append(method)
    facts = ["Loss: the method’s own objective, mean over episodes. Ring: the epoch whose parameters were kept."]
    style.finish(
        figure, result, "Training", facts, body=BODY, extra=40, note=NOTE, n=f"{result.sizes['vector']} vectors"
    )
    for name in result["vector"].values.tolist():
        own = result.sel(vector=name)
        method = str(own["method"].item())
        colour, dash_of = colour_of(method), variants[method.partition(" ")[0]].index(method)
        first = name == result["vector"].values[result["method"].values == method][0]
        for part, dash in (("loss", "dot"), ("validation", DASHES[dash_of % len(DASHES)])):
            points = own[part].dropna("epoch")
            figure.add_scatter(
                x=points["epoch"].values,
                y=points.values,
                mode="lines",
                line={"color": colour, "dash": dash, "width": 1.8 if part == "validation" else 1},
                name=style.escape(method),
                legendgroup=method,
                showlegend=bool(first and part == "validation"),
                hovertemplate=f"{style.escape(str(name))}, {part}, epoch %{{x}}: %{{y:.4g}}<extra></extra>",
            )
        best = int(own["best_epoch"])
        if best and np.isfinite(height := float(own["validation"].sel(epoch=best))):
            figure.add_scatter(
                x=[best],
                y=[height],
                mode="markers",
                marker={"color": "white", "size": 9, "line": {"color": colour, "width": 2}},
                legendgroup=method,
                showlegend=False,
                hovertemplate=f"{style.escape(str(name))}: kept, epoch %{{x}}: %{{y:.4g}}<extra></extra>",
            )
    figure.update_xaxes(title="epoch", gridcolor=style.GRID)
    figure.update_yaxes(title="loss", type="log", gridcolor=style.GRID, exponentformat="power")
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": 1 + 20 / BODY, "yanchor": "bottom"})
    return figure
