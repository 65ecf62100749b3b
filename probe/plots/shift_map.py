"""How the demonstrations shift every head: how much, in which direction, how constantly, and what it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe.measures.shift_summary import PARTS, summarise_shift
from probe.plots import style

Grid = npt.NDArray[np.float64]

TOP = 3
GAP_X, GAP_Y = 30, 66
COLOURS = {**style.COLOURS, "structural": "#9aa1ad", "sink": "#f0e6c8"}

NOTE = (
    "What a head writes is not what later layers make of it: a direct effect leaves out all that passes through them. "
    "A constant direction is one that a constant vector can stand for, not one that is used; that takes a knockout."
)


@dataclass(frozen=True)
class Panel:
    """One map: what it shows, the ends of its colours, and which cells cannot be told from nothing."""

    name: str
    heading: str
    scale: Callable[[Grid, xr.Dataset], tuple[float, float, str]]
    diverging: bool = False
    unsure: Callable[[xr.Dataset], npt.NDArray[np.bool_]] | None = None


def _largest(values: Grid) -> float:
    return (float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0) or 1.0


def _to_largest(values: Grid, summary: xr.Dataset) -> tuple[float, float, str]:
    top = _largest(values)
    return 0.0, top, f"0 to {top:.3g}, residual stream"


def _logits(values: Grid, summary: xr.Dataset) -> tuple[float, float, str]:
    top = _largest(values)
    return -top, top, f"±{top:.2g} logits above the mean"


def _shares(values: Grid, summary: xr.Dataset) -> tuple[float, float, str]:
    return -1.0, 1.0, "−1 to 1, of other episodes"


def _cosines(values: Grid, summary: xr.Dataset) -> tuple[float, float, str]:
    chance = summary["agreement_chance"].values
    return -1.0, 1.0, f"−1 to 1; chance {np.nanmax(chance):.2g}" if np.isfinite(chance).any() else "−1 to 1"


def _ranks(values: Grid, summary: xr.Dataset) -> tuple[float, float, str]:
    chance = summary["effective_rank_chance"].values
    top = max(_largest(values), float(np.nanmax(chance)) if np.isfinite(chance).any() else 1.0)
    return 1.0, max(top, 1.5), f"1 to {top:.3g}, random directions"


def _not_above_chance(summary: xr.Dataset) -> npt.NDArray[np.bool_]:
    return np.asarray(~(summary["agreement"].sel(end="low") > summary["agreement_chance"]).values)


def _not_above_none(summary: xr.Dataset) -> npt.NDArray[np.bool_]:
    return np.asarray(~(summary["explained"].sel(end="low") > 0).values)


def _no_effect(summary: xr.Dataset) -> npt.NDArray[np.bool_]:
    return np.asarray(~(summary["p"] <= 0.05).values)


PANELS = (
    Panel("mu", "a   attention mass μ", lambda values, summary: (0.0, 1.0, "0 to 1")),
    Panel("shift", "b   shift ‖μ (SA<sub>D</sub> − SA<sub>Q</sub>) W<sub>O</sub>‖", _to_largest),
    Panel("logit_effect", "c   its effect on the answer", _logits, True, _no_effect),
    Panel("agreement", "e   agreement of directions", _cosines, True, _not_above_chance),
    Panel("explained", "f   explained by a constant", _shares, True, _not_above_none),
    Panel("effective_rank", "g   effective rank", _ranks),
)
"""Three maps above, three below; in the fourth column are μ by modality and by demonstration."""


def plot_shift_map(result: xr.Dataset, *, row: str = "answer") -> go.Figure:
    """Draw how the demonstrations shift every head, by layer and head.

    *a* is the attention mass of the demonstrations, *b* the norm of what they add to the residual stream through a
    head, *c* the direct effect of this on the logit of the answer. *d* is the mass by modality, the mean over heads,
    with that of the first position beside it. *e*, *f* and *g* say how constant the shift is from query to query: the
    mean cosine between episodes, the share that one constant vector explains, and the number of directions that the
    shifts take up. *h* is the mass by demonstration. All numbers are means over the reporting half of the episodes;
    circles are the heads that the other half finds shifted most, and crosses are cells that cannot be told from chance.

    Parameters
    ----------
    result
        Of :func:`probe.shift_map`.
    row
        One label of the coordinate ``row``.

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    UsageError
        If the result has no such row, or no episode has positions for it.
    """
    summary = summarise_shift(result, row=row)
    layers, heads = summary["layer"].values.tolist(), summary["head"].values.tolist()
    width = (style.WIDTH - style.MARGIN_LEFT - style.MARGIN_RIGHT - 3 * GAP_X) / 4
    height = float(np.clip(width / len(heads) * len(layers), 150, 340))
    body = round(2 * height + GAP_Y)
    figure = make_subplots(
        rows=2, cols=4, horizontal_spacing=GAP_X / (4 * width + 3 * GAP_X), vertical_spacing=GAP_Y / body
    )
    size = float(np.clip(0.5 * min(width / len(heads), height / len(layers)), 4, 12))
    for number, panel in enumerate(PANELS):
        at = {"row": number // 3 + 1, "col": number % 3 + 1}
        for trace in _map(summary, panel, size):
            figure.add_trace(trace, **at)
        values = summary[panel.name].sel(end="estimate").values
        _headings(figure, panel.heading, panel.scale(values, summary)[2], **at)
    for bars in _bars(summary):
        figure.add_trace(bars, row=1, col=4)
    demonstrations, highest = _demonstrations(summary)
    figure.add_trace(demonstrations, row=2, col=4)
    _headings(figure, "d   μ by modality", "mean over heads; and the sink", row=1, col=4)
    _headings(figure, "h   μ by demonstration", f"0 to {highest:.2g}, mean over heads", row=2, col=4)
    facts = [
        f"Row “{row}”: attention to the demonstrations (D) and to all else (Q), SA = SA_Q + μ (SA_D − SA_Q). Direction "
        "in a head’s own space; effect: direct, on the logit of the answer minus the mean logit.",
        f"Means over the {summary.attrs['n_reported']} reporting episodes; f fits the vector on the others. Circles: "
        f"the {TOP} heads that the others find shifted most. Crosses: c, p > 0.05 (family-wise); e, not above chance; "
        "f, not above 0 (95 % intervals). Hatched: undefined.",
        *(["No image is a token of this model’s text: μ is of text alone."] if _no_images(result) else []),
    ]
    title = "How the demonstrations shift each head, and how constantly"
    style.finish(figure, result, title, facts, body=body, extra=46, note=NOTE)
    _axes(figure, layers, heads, summary["demonstration"].values.tolist())
    return figure


def _no_images(result: xr.Dataset) -> bool:
    return "image_mass" in result.attrs


def _map(summary: xr.Dataset, panel: Panel, size: float) -> list[Any]:
    """One panel: its cells, what is missing, what is unsure, and the heads that are shifted most."""
    estimate, low, high = (summary[panel.name].sel(end=end).values for end in ("estimate", "low", "high"))
    lowest, highest, _ = panel.scale(estimate, summary)
    grid = np.meshgrid(summary["layer"].values, summary["head"].values, indexing="ij")
    cells = go.Heatmap(
        z=estimate,
        zmin=lowest,
        zmax=highest,
        colorscale=style.DIVERGING if panel.diverging else style.SEQUENTIAL,
        showscale=False,
        hoverongaps=False,
        customdata=np.stack([*grid, low, high, summary["rank"].values, summary["n"].values], -1),
        hovertemplate=(
            f"<b>{panel.heading[4:]}</b>, head %{{customdata[0]}}.%{{customdata[1]}}<br>%{{z:.3g}} "
            "[%{customdata[2]:.3g}, %{customdata[3]:.3g}]<br>n = %{customdata[5]}, %{customdata[4]}. of the other half"
            "<extra></extra>"
        ),
    )
    missing = np.isnan(estimate)
    traces: list[Any] = [cells, *([style.hatch(missing)] if missing.any() else [])]
    unsure = panel.unsure(summary) & ~missing if panel.unsure else np.zeros_like(missing)
    top = summary["rank"].values <= TOP
    traces.append(_marks(top, "circle", size, "white"))
    traces.append(_marks(unsure, "x-thin-open", size * np.where(top, 0.45, 0.7)[unsure], style.FAINT))
    return traces


def _marks(where: npt.NDArray[np.bool_], symbol: str, size: npt.ArrayLike, colour: str) -> go.Scatter:
    y, x = np.nonzero(where)
    line = {"width": 1.5, "color": style.INK if symbol == "circle" else colour}
    marker = {"symbol": symbol, "size": size, "color": colour, "line": line}
    return go.Scatter(x=x, y=y, mode="markers", marker=marker, hoverinfo="skip", showlegend=False)


def _bars(summary: xr.Dataset) -> list[go.Bar]:
    """The mass of each layer, one modality after the other; then the sink, which is in no demonstration."""
    made = []
    for modality in (*PARTS, "sink"):
        part = summary["sink_mass"] if modality == "sink" else summary["mu_by_modality"].sel(modality=modality)
        ends = part.transpose("layer", "end").values
        made.append(
            go.Bar(
                x=ends[:, 0],
                y=np.arange(len(ends)),
                orientation="h",
                name="(sink)" if modality == "sink" else modality,
                marker={"color": COLOURS[modality], "line": {"width": 0}},
                customdata=np.column_stack([ends, summary["layer"].values]),
                hovertemplate=(
                    f"<b>{modality}</b>, layer %{{customdata[3]}}<br>%{{customdata[0]:.3g}} "
                    "[%{customdata[1]:.3g}, %{customdata[2]:.3g}]<extra></extra>"
                ),
            )
        )
    return made


def _demonstrations(summary: xr.Dataset) -> tuple[go.Heatmap, float]:
    """The mass of each layer by demonstration, and the largest."""
    estimate, low, high = (summary["mu_by_demonstration"].sel(end=end).values for end in ("estimate", "low", "high"))
    grid = np.meshgrid(summary["layer"].values, summary["demonstration"].values, indexing="ij")
    trace = go.Heatmap(
        z=estimate,
        zmin=0,
        zmax=_largest(estimate),
        colorscale=style.SEQUENTIAL,
        showscale=False,
        hoverongaps=False,
        customdata=np.stack([*grid, low, high], -1),
        hovertemplate=(
            "<b>demonstration %{customdata[1]}</b>, layer %{customdata[0]}<br>%{z:.3g} "
            "[%{customdata[2]:.3g}, %{customdata[3]:.3g}]<extra></extra>"
        ),
    )
    return trace, _largest(estimate)


def _headings(figure: go.Figure, heading: str, below: str, *, row: int, col: int) -> None:
    """The heading of a panel, and what its colours mean."""
    style.heading(figure, heading, row=row, col=col, above=18)
    figure.add_annotation(
        text=below,
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
        col=col,
    )


def _axes(figure: go.Figure, layers: list[int], heads: list[int], demonstrations: list[int]) -> None:
    """Layers upwards in all panels; heads, mass and demonstrations to the right."""
    figure.update_yaxes(range=[-0.5, len(layers) - 0.5], showgrid=False, **style.sparse_ticks(layers))
    figure.update_yaxes(title_text="layer", title_standoff=6, col=1)
    for column in (1, 2, 3):
        figure.update_xaxes(range=[-0.5, len(heads) - 0.5], showgrid=False, **style.sparse_ticks(heads), col=column)
    figure.update_xaxes(title={"text": "head", "standoff": 4}, row=2)
    figure.update_xaxes(range=[0, 1], showgrid=True, gridcolor=style.GRID, nticks=5, row=1, col=4)
    figure.update_xaxes(range=[-0.5, len(demonstrations) - 0.5], showgrid=False, row=2, col=4)
    figure.update_xaxes(**style.sparse_ticks(demonstrations), row=2, col=4)
    figure.update_xaxes(title={"text": "demonstration, 0 is read first", "standoff": 4}, row=2, col=4)
    place = {"x": 1.0, "xanchor": "left", "y": 1, "yanchor": "top", "traceorder": "normal"}
    figure.update_layout(barmode="stack", bargap=0.15, legend={**place, "font": {"size": 11}, "xref": "paper"})
