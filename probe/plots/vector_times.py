"""What vectors cost: time to the first token, and of each further one, beside demonstrations."""

from __future__ import annotations

import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe.errors import UsageError
from probe.measures.vector_times import TIMES, time_ratios
from probe.plots import style
from probe.plots.vectors import colour_of, margin

TITLES = {"first": "time to the first token", "per_token": "time of each further token"}
ROW = 34
NOTE = "Measured on one machine, at one batch size: a small model shows the cost of tracing, a large one its own."


def plot_vector_times(result: xr.Dataset) -> go.Figure:
    """Draw how much longer answers take than zero-shot's, a row for each way.

    Parameters
    ----------
    result
        Of ``probe vector compare --cost``.

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    UsageError
        If no times were measured.
    """
    if "first" not in result:
        raise UsageError("This comparison has no times; compare again with --cost.")
    times = time_ratios(result)
    times = times.isel(way=[i for i, kind in enumerate(times["kind"].values) if kind != "zero-shot"])
    labels = times["way"].values.tolist()
    methods = dict(zip(result["way"].values.tolist(), result["method"].values.tolist(), strict=True))
    figure = make_subplots(cols=len(TIMES), shared_yaxes=True, horizontal_spacing=0.06)
    for column, name in enumerate(TIMES, start=1):
        middle, low, high = times["ratio"].sel(time=name).values.T
        figure.add_trace(
            go.Bar(
                x=middle,
                y=labels,
                orientation="h",
                marker_color=[colour_of(methods[label]) if methods[label] else style.FAINT for label in labels],
                error_x={"array": high - middle, "arrayminus": middle - low, "color": style.INK, "thickness": 1.2},
                customdata=1e3 * times["seconds"].sel(time=name).values,
                hovertemplate="%{y}: %{x:.3f} times zero-shot, %{customdata:.1f} ms<extra></extra>",
                showlegend=False,
            ),
            row=1,
            col=column,
        )
        figure.add_vline(x=1, line={"color": style.FAINT, "dash": "dot", "width": 1}, row=1, col=column)
        style.heading(figure, TITLES[name], row=1, col=column)
        figure.update_xaxes(title_text="times zero-shot", gridcolor=style.GRID, row=1, col=column)
    body = max(150, ROW * len(labels))
    facts = [
        f"Bars: medians of the ratios within {result.sizes['round']} rounds, in each of which all ways were timed; "
        "intervals of 95 % from order statistics."
    ]
    style.finish(figure, result, "What vectors cost", facts, body=body, extra=28, note=NOTE)
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    figure.update_layout(margin_l=margin(labels), bargap=0.35)
    return figure
