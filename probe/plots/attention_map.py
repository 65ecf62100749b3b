"""Layer by head maps of where a row looks: raw mass above, the same relative to uniform attention below."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe.plots import style
from probe.segments import GROUPS, group_lift, group_mass

CLIP = (0.01, 100.0)
"""The colours of the lower maps stop here, the same in every run, so that figures can be compared."""

OF = {"sink": "first position", "query and template": "all other positions"}
GAP_X, GAP_Y = 14, 34


def plot_attention_map(result: xr.Dataset, *, row: str = "answer") -> go.Figure:
    """Draw where a row's attention goes, for every layer and head.

    Five columns partition the row: the demonstrations' visual, textual and structural tokens, the attention sink, and
    the query with the template. The upper maps show mass, on one linear scale from 0. The lower ones show mass
    relative to uniform attention (the share of visible keys that the group holds), so that few tokens and many can be
    compared: on a logarithmic scale, white is uniform, and colours are clipped at :data:`CLIP`. Both are means over
    the episodes that have such tokens; the n of every column is in its heading.

    Parameters
    ----------
    result
        As in ``docs/results.md``.
    row
        One label of the coordinate ``row``.

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    UsageError
        If the result has no such row.
    """
    mass, lift = group_mass(result, row=row), group_lift(result, row=row)
    layers, heads = result["layer"].values.tolist(), result["head"].values.tolist()
    panel_width = (style.WIDTH - style.MARGIN_LEFT - style.MARGIN_RIGHT - 4 * GAP_X) / 5
    panel_height = float(np.clip(panel_width / len(heads) * len(layers), 170, 420))
    body = round(2 * panel_height + GAP_Y)
    figure = make_subplots(
        rows=2, cols=5, horizontal_spacing=GAP_X / (5 * panel_width + 4 * GAP_X), vertical_spacing=GAP_Y / body
    )
    for column, group in enumerate(GROUPS, start=1):
        for place, values in enumerate((mass.sel(group=group), lift.sel(group=group)), start=1):
            map_, missing = _heat_map(values, group, layers, heads, lift=place == 2)
            figure.add_trace(map_, row=place, col=column)
            if missing.any():
                figure.add_trace(style.hatch(missing), row=place, col=column)
            if missing.all():
                style.say(figure, "no token to see", row=place, col=column)
        _add_heading(figure, column, group, _n(mass.sel(group=group)))

    undefined, left_out = "image_mass" in result.attrs, str(result.attrs.get("left_out", ""))
    highest = float(np.nan_to_num(mass.mean("episode").values).max()) or 1.0
    style.finish(
        figure,
        result,
        f"Where the row “{row}” attends, by layer and head",
        [
            f"Upper maps: mass, linear from 0 to {highest:.2f}; the five columns partition the row. Lower maps: mass "
            f"relative to uniform attention, logarithmic, clipped at {CLIP[0]:g} and {CLIP[1]:g}.",
            "Means over the episodes that have such tokens; their number is in the heading. Hatched: no token to see.",
            *(["No image is a token of this model's text: its mass on images is undefined."] if undefined else []),
            *([f"Left out: {style.escape(left_out)}."] if left_out else []),
        ],
        body=body,
        extra=38,
    )
    _scales(figure, highest, panel_height / body)
    figure.update_xaxes(range=[-0.5, len(heads) - 0.5], showgrid=False, **style.sparse_ticks(heads))
    figure.update_yaxes(
        range=[-0.5, len(layers) - 0.5], showgrid=False, showticklabels=False, **style.sparse_ticks(layers)
    )
    figure.update_xaxes(showticklabels=False, ticks="", row=1)
    figure.update_xaxes(title={"text": "head", "standoff": 6}, row=2)
    for column in range(2, 6):
        figure.update_yaxes(ticks="", col=column)
    for place, name in enumerate(("mass", "mass per token ÷ uniform"), start=1):
        figure.update_yaxes(
            title={"text": f"<b>{name}</b><br>layer", "standoff": 8}, showticklabels=True, row=place, col=1
        )
    return figure


def _heat_map(
    values: xr.DataArray, group: str, layers: list[int], heads: list[int], *, lift: bool
) -> tuple[go.Heatmap, npt.NDArray[np.bool_]]:
    """One map, and where it has no value."""
    ordered = values.transpose("episode", "layer", "head")
    mean = ordered.mean("episode").values
    spread = ordered.std("episode").values
    n = ordered.notnull().sum("episode").values
    z = np.log10(np.clip(mean, *CLIP)) if lift else mean
    what = "mass per token ÷ uniform" if lift else "mass"
    grid = np.meshgrid(layers, heads, indexing="ij")
    trace = go.Heatmap(
        z=z,
        customdata=np.stack([*grid, mean, spread, n], axis=-1),
        coloraxis="coloraxis2" if lift else "coloraxis",
        hovertemplate=(
            f"<b>{group}</b><br>layer %{{customdata[0]}}, head %{{customdata[1]}}<br>{what} %{{customdata[2]:.3g}}"
            "<br>SD over episodes %{customdata[3]:.2g}, n = %{customdata[4]}<extra></extra>"
        ),
        hoverongaps=False,
    )
    return trace, np.isnan(mean)


def _n(values: xr.DataArray) -> str:
    """How many episodes a column is the mean of."""
    counts = values.notnull().sum("episode").values
    low, high = int(counts.min()), int(counts.max())
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def _axis(figure: go.Figure, letter: str, place: int, column: int) -> str:
    """The domain reference of a subplot, for annotations."""
    number = (place - 1) * 5 + column
    return f"{letter}{number if number > 1 else ''} domain"


def _add_heading(figure: go.Figure, column: int, group: str, n: str) -> None:
    of = OF.get(group, "in demonstrations")
    figure.add_annotation(
        text=f'<b>{group}</b><br><span style="color:{style.FAINT}">{of}, {n}</span>',
        xref=_axis(figure, "x", 1, column),
        yref=_axis(figure, "y", 1, column),
        x=0.5,
        y=1,
        yanchor="bottom",
        yshift=4,
        showarrow=False,
        font={"size": 12},
    )


def _scales(figure: go.Figure, highest: float, share: float) -> None:
    """The two colour scales, each beside its maps."""
    bar = {"thickness": 12, "len": share, "lenmode": "fraction", "x": 1.0, "xpad": 12, "outlinewidth": 0, "ypad": 0}
    low, high = np.log10(CLIP)
    figure.update_layout(
        coloraxis={
            "colorscale": style.SEQUENTIAL,
            "cmin": 0,
            "cmax": highest,
            "colorbar": {**bar, "y": 1, "yanchor": "top", "tickformat": ".2~f", "nticks": 6},
        },
        coloraxis2={
            "colorscale": style.DIVERGING,
            "cmin": low,
            "cmax": high,
            "colorbar": {
                **bar,
                "y": 0,
                "yanchor": "bottom",
                "tickvals": [-2, -1, 0, 1, 2],
                "ticktext": ["≤ 0.01", "0.1", "1", "10", "≥ 100"],
            },
        },
    )
