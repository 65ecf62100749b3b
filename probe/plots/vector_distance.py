"""How far states are, layer by layer, from those with demonstrations: without them, and with vectors in their place."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.colors import hex_to_rgb
from plotly.subplots import make_subplots

from probe.errors import UsageError
from probe.measures.vector_groups import alone, is_part, over_seeds
from probe.measures.vector_summary import summarise_vectors
from probe.plots import style
from probe.plots.vectors import LABEL, colour_of

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
"""Of the vectors of one method: the one with most training episodes first."""

PANELS = {"distance": "{site}: ‖difference‖", "distance_ratio": "relative to zero-shot"}
BODY = 380
RANDOM, RANDOM_COLOUR = "random vectors", "#a3a9b4"


def plot_vector_distance(result: xr.Dataset) -> go.Figure:
    """Draw the distance to the states with demonstrations by layer, a line for each vector.

    Beside it the same relative to zero-shot's, where all lines would be 1 if nothing came nearer. Random vectors are
    thin and grey. Ways that read the demonstrations too, and parts of vectors, are left out.

    Parameters
    ----------
    result
        Of ``probe.experiments.compare.compare``.

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    UsageError
        If no distance was measured.
    """
    if not bool(result["distance"].notnull().any()):
        raise UsageError("This comparison measured no distance; compare again, with distances of one episode or more.")
    ways = over_seeds(summarise_vectors(result))
    lines = ways.isel(way=alone(ways) & ~is_part(ways))
    random = ways.isel(way=(ways["kind"].values == "random") & np.isin(ways["like"].values, lines["way"].values))
    zero = ways.isel(way=ways["kind"].values == "zero-shot")
    about = result["distance"].attrs
    site = str(about.get("site", "state")).replace("_", " ")
    figure = make_subplots(cols=2, horizontal_spacing=0.09)
    for column, (name, unit) in enumerate(PANELS.items(), start=1):
        for place in range(random.sizes["way"]):
            _draw(figure, random.isel(way=place), name, column, RANDOM_COLOUR, "solid", first=place == 0)
        _draw(figure, zero.isel(way=0), name, column, style.INK, "dot")
        for place, dash in enumerate(dashes(lines)):
            way = lines.isel(way=place)
            _draw(figure, way, name, column, colour_of(str(way["method"].values)), dash)
        figure.update_yaxes(title_text=unit.format(site=site), rangemode="tozero", gridcolor=style.GRID, col=column)
    layers = ways["layer"].values.tolist()
    figure.update_xaxes(title_text="layer", showgrid=False, **style.sparse_ticks(layers, 12))
    n = int(ways["n_distances"])
    facts = [
        f"Norm of the difference at the {site}, mean over positions ({about.get('positions', 'positions')}) and "
        "episodes. Bands of 95 % over episodes: BCa, of the ratio percentile bootstrap; of several seeds, the mean."
    ]
    note = "Distance says nothing of use: a state may differ where nothing reads it, and a small step may decide."
    body = max(BODY, style.LINE * (len(lines["way"]) + 5))
    style.finish(figure, result, "Distance to the states with demonstrations", facts, body=body, n=_words(n), note=note)
    names = [*lines["way"].values.tolist(), RANDOM]
    figure.update_layout(
        margin_r=int(64 + LABEL * max(map(len, names))),
        legend={"x": 1.01, "xanchor": "left", "y": 1, "yanchor": "top", "traceorder": "normal"},
    )
    return figure


def _words(n: int) -> str:
    return f"the first {n} episodes" if n > 1 else "the first episode"


def dashes(lines: xr.Dataset) -> list[str]:
    """A dash for each line, another for each of one colour, solid for most training."""
    sizes = list(zip(lines["training_episodes"].values, lines["training_shots"].values, strict=True))
    colours = [colour_of(method) for method in lines["method"].values]
    first = sorted(range(len(colours)), key=lambda place: sizes[place], reverse=True)
    ranks = [[i for i in first if colours[i] == colour].index(place) for place, colour in enumerate(colours)]
    return [DASHES[rank % len(DASHES)] for rank in ranks]


def _draw(
    figure: go.Figure, way: xr.Dataset, quantity: str, column: int, colour: str, dash: str, *, first: bool = True
) -> None:
    """A line, and the band of its intervals unless it is a random vector's."""
    is_random = str(way["kind"].values) == "random"
    name = RANDOM if is_random else style.escape(str(way["way"].values))
    estimates, low, high = way[quantity].values.T
    x = np.arange(len(estimates))
    group = {"legendgroup": name, "showlegend": False}
    if not is_random:
        red, green, blue = hex_to_rgb(colour)
        band = go.Scatter(
            x=np.concatenate([x, x[::-1]]),
            y=np.concatenate([high, low[::-1]]),
            mode="lines",
            line={"width": 0},
            fill="toself",
            fillcolor=f"rgba({red}, {green}, {blue}, 0.13)",
            hoverinfo="skip",
            **group,
        )
        figure.add_trace(band, row=1, col=column)
    line = go.Scatter(
        x=x,
        y=estimates,
        mode="lines" if is_random else "lines+markers",
        name=name,
        line={"color": colour, "width": 0.8 if is_random else 2, "dash": dash},
        marker={"color": colour, "size": 6},
        legendrank=1001 if is_random else 1000,
        customdata=np.column_stack([way["layer"].values, low, high]),
        hovertemplate=(
            f"<b>{style.escape(str(way['way'].values))}</b>, layer %{{customdata[0]}}<br>"
            "%{y:.3g} [%{customdata[1]:.3g}, %{customdata[2]:.3g}]<extra></extra>"
        ),
        **{**group, "showlegend": first and column == 1},
    )
    figure.add_trace(line, row=1, col=column)
