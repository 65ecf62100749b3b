"""The attention of a head, drawn on the pictures of one episode."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe.errors import UsageError
from probe.plots import style
from probe.segments import QUERY

COLOURSCALE = [
    (0.0, "rgba(255, 205, 60, 0.0)"),
    (0.15, "rgba(255, 190, 50, 0.5)"),
    (0.4, "rgba(244, 115, 40, 0.68)"),
    (0.7, "rgba(200, 35, 90, 0.78)"),
    (1.0, "rgba(85, 10, 110, 0.85)"),
]
"""Clear where there is no mass, so that the picture shows; darker and denser the more there is."""

COLOUR_KEPT, WHITENED = 0.35, 0.35
"""Pictures are paled: among full colours the hue of the attention says nothing, and on black nothing dark shows."""

MOST_COLUMNS = 6
HEADING, GAP_X, GAP_Y = 38, 16, 50
SIZE = {1: 300, 2: 300, 3: 250, 4: 215, 5: 180, 6: 148}
MARGIN_LEFT = 16


@dataclass(frozen=True)
class _Panel:
    """One image: where it stands, its picture, and the mass of every head on its grid."""

    name: str
    picture: npt.NDArray[np.uint8]
    box: tuple[float, ...]
    """What the grid covers, in widths and heights of the picture: left, upper, right, lower."""
    mass: npt.NDArray[np.float64]
    off_grid: npt.NDArray[np.float64]
    """Mass on tokens of the image that have no place in its grid; shape (layer, head)."""

    @property
    def total(self) -> npt.NDArray[np.float64]:
        """Mass on all tokens of the image; shape (layer, head)."""
        total: npt.NDArray[np.float64] = np.nansum(self.mass, axis=(2, 3)) + self.off_grid
        return total


def stored_episodes(result: xr.Dataset) -> list[int]:
    """The places on the axis ``episode`` of those whose images are stored.

    Parameters
    ----------
    result
        As in ``docs/results.md``.

    Returns
    -------
    list of int
        What :func:`plot_overlay` takes; empty if the result has no images.
    """
    return sorted({int(place) for place in result["image_episode"].values}) if "image_episode" in result else []


def plot_overlay(result: xr.Dataset, *, heads: Sequence[tuple[int, int]], episode: int = 0) -> go.Figure:
    """Draw the attention of the row ``answer`` on every image of an episode: demonstrations in order, then the query.

    The grid of image tokens lies where it covers the picture (some families crop it). Where an image is read whole and
    in crops, the tokens of the whole are spread over the finer grid of the crops and added. All images share one colour
    scale, from 0 to the head's largest mass on one cell; what has no mass is clear. A menu changes the head.

    Parameters
    ----------
    result
        As in ``docs/results.md``.
    heads
        Labels (layer, head); the first is shown at first.
    episode
        Place on the axis ``episode``; one of :func:`stored_episodes`.

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    UsageError
        If there is no such head, the images of that episode are not stored, or its image tokens have no grid.
    """
    if not heads:
        raise UsageError("An overlay needs at least one head (layer, head).")
    places = style.head_places(result, heads)
    panels = _panels(result, episode)
    columns = min(MOST_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = SIZE[columns]
    strip = columns * size + (columns - 1) * GAP_X
    width = max(700, MARGIN_LEFT + style.MARGIN_RIGHT + strip)
    # Pictures stand at the left of a figure that is wider than they need, for the text above them.
    drawn = strip / (width - MARGIN_LEFT - style.MARGIN_RIGHT)
    # Rows as high as the tallest picture needs: wide pictures would leave a gap below them.
    tallest = max(panel.picture.shape[0] / panel.picture.shape[1] for panel in panels)
    body = rows * round(size * min(1.0, tallest)) + (rows - 1) * GAP_Y
    figure = make_subplots(rows=rows, cols=columns, horizontal_spacing=GAP_X / strip, vertical_spacing=GAP_Y / body)
    for number, panel in enumerate(panels):
        _draw(figure, panel, number, columns, places[0])
    for number in range(len(panels), rows * columns):
        figure.update_xaxes(visible=False, row=number // columns + 1, col=number % columns + 1)
        figure.update_yaxes(visible=False, row=number // columns + 1, col=number % columns + 1)
    for axis in figure.select_xaxes():
        axis.domain = [drawn * edge for edge in axis.domain]

    crops = bool((result["patch_tile"] > 0).any())
    identity = str(result["episode"].values[episode])
    style.finish(
        figure,
        result,
        _title(heads[0]),
        [
            "Row “answer”. Above each picture: the mass on all of its tokens.",
            "Colours: mass on one image token, linear from 0 to the largest, one scale for all pictures (here paled).",
            *(["Tokens of the whole view are spread over the grid of the crops."] if crops else []),
        ],
        body=body,
        n=f"the one episode {identity} (n = 1)",
        width=width,
        extra=HEADING + (40 if len(heads) > 1 else 0),
    )
    scale = {"thickness": 12, "lenmode": "pixels", "len": min(body, 220), "outlinewidth": 0, "title": {"text": "mass"}}
    figure.update_xaxes(ticks="")
    figure.update_yaxes(ticks="")
    figure.update_layout(
        margin_l=MARGIN_LEFT,
        coloraxis={
            "colorscale": COLOURSCALE,
            "cmin": 0,
            "cmax": _highest(panels, places[0]),
            "colorbar": {**scale, "x": drawn, "xpad": 14, "y": 1, "yanchor": "top", "ypad": 0, "tickformat": ".2~g"},
        },
    )
    if len(heads) > 1:
        figure.update_layout(updatemenus=[_menu(panels, heads, places, body)])
    return figure


def _panels(result: xr.Dataset, episode: int) -> list[_Panel]:
    """The images of an episode, demonstrations in order, then the query."""
    stored = stored_episodes(result)
    if episode not in stored:
        have = f"only those of episodes {', '.join(map(str, stored))} are" if stored else "none are"
        raise UsageError(f"The images of episode {episode} are not stored ({have}); choose another episode.")
    owners = result["image_demonstration"].values.tolist()
    images: list[int] = np.flatnonzero(result["image_episode"].values == episode).tolist()
    images.sort(key=lambda image: (owners[image] == QUERY, owners[image], image))
    panels = []
    for image in images:
        siblings = [other for other in images if owners[other] == owners[image]]
        name = "query" if owners[image] == QUERY else f"demonstration {owners[image]}"
        if len(siblings) > 1:
            name += f", image {siblings.index(image) + 1}"
        height, width = (int(result[f"thumbnail_{side}"].values[image]) for side in ("height", "width"))
        picture = result["thumbnail"].values[image, :height, :width].astype(np.uint8)
        box = tuple(result["image_box"].values[image].tolist())
        panels.append(_Panel(name, picture, box, *_grid(result, image, name)))
    return panels


def _grid(result: xr.Dataset, image: int, name: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mass (layer, head, row, column) on an image's grid, NaN where it has no token; mass (layer, head) outside it."""
    rows, columns = int(result["image_rows"].values[image]), int(result["image_columns"].values[image])
    patches = np.flatnonzero(result["patch_image"].values == image)
    row, column = result["patch_row"].values[patches], result["patch_column"].values[patches]
    placed = (row >= 0) & (column >= 0)
    if rows < 1 or columns < 1 or not placed.any():
        raise UsageError(
            f"The image tokens of {name} have no grid, because this model family keeps none: their attention cannot be "
            "drawn on the picture; see the attention map instead."
        )
    mass = result["patch_mass"].transpose("layer", "head", "patch").values[..., patches].astype(np.float64)
    grid = np.full((*mass.shape[:2], rows, columns), np.nan)
    is_crop = result["patch_tile"].values[patches] > 0
    finest = is_crop if is_crop[placed].any() else ~is_crop
    for at in np.flatnonzero(placed & finest):
        grid[:, :, row[at], column[at]] = mass[..., at]
    coarse = np.flatnonzero(placed & ~finest)
    if len(coarse):  # a view of the whole picture beside its crops: its tokens are spread over the crops' grid
        spread = np.zeros((row[coarse].max() + 1, column[coarse].max() + 1), dtype=np.int64)
        over = [np.arange(n) * m // n for n, m in zip((rows, columns), spread.shape, strict=True)]
        np.add.at(spread, np.ix_(*over), 1)
        view = np.zeros((*mass.shape[:2], *spread.shape))
        view[:, :, row[coarse], column[coarse]] = mass[..., coarse]
        grid = np.nan_to_num(grid) + (view / np.maximum(spread, 1))[:, :, over[0][:, None], over[1]]
    return grid, mass[..., ~placed].sum(-1)


def _draw(figure: go.Figure, panel: _Panel, number: int, columns: int, place: tuple[int, int]) -> None:
    """Picture and heat map in pixels of the picture: x to the right, y downwards, from the upper left corner."""
    height, width = panel.picture.shape[:2]
    rows, cols = panel.mass.shape[2:]
    left, upper, right, lower = panel.box
    where = {"row": number // columns + 1, "col": number % columns + 1}
    figure.add_trace(
        go.Heatmap(
            z=panel.mass[place],
            x=np.linspace(left * width, right * width, cols + 1),
            y=np.linspace(upper * height, lower * height, rows + 1),
            customdata=np.stack(np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij"), axis=-1),
            coloraxis="coloraxis",
            hovertemplate=(
                f"<b>{panel.name}</b><br>row %{{customdata[0]}}, column %{{customdata[1]}}<br>"
                "mass %{z:.3g}<extra></extra>"
            ),
            hoverongaps=False,
        ),
        **where,
    )
    axis = str(number + 1) if number else ""
    figure.add_layout_image(
        source=_as_uri(panel.picture),
        xref=f"x{axis}",
        yref=f"y{axis}",
        x=0,
        y=0,
        xanchor="left",
        yanchor="top",
        sizex=width,
        sizey=height,
        sizing="stretch",
        layer="below",
    )
    bare = {"showticklabels": False, "showgrid": False, "zeroline": False, "constrain": "domain"}
    figure.update_xaxes(range=[0, width], constraintoward="left", **bare, **where)
    figure.update_yaxes(range=[height, 0], constraintoward="top", scaleanchor=f"x{axis}", scaleratio=1, **bare, **where)
    figure.add_annotation(
        text=_heading(panel, place),
        xref=f"x{axis} domain",
        yref=f"y{axis} domain",
        x=0,
        y=1,
        xanchor="left",
        yanchor="bottom",
        align="left",
        showarrow=False,
        font={"size": 12},
    )


def _heading(panel: _Panel, place: tuple[int, int]) -> str:
    words = f"mass {panel.total[place]:.3f}"
    if panel.off_grid[place] > 0:
        words += f" ({panel.off_grid[place]:.3f} off the grid)"
    return f'<b>{panel.name}</b><br><span style="color:{style.FAINT}">{words}</span>'


def _title(head: tuple[int, int]) -> str:
    return f"Attention of {style.head_name(*head)} on the image tokens"


def _highest(panels: list[_Panel], place: tuple[int, int]) -> float:
    return max(float(np.nanmax(panel.mass[place])) for panel in panels) or 1.0


def _menu(
    panels: list[_Panel], heads: Sequence[tuple[int, int]], places: list[tuple[int, int]], body: int
) -> dict[str, Any]:
    """A choice of heads: it changes the maps, the headings, the colour scale and the title."""
    buttons = []
    for head, place in zip(heads, places, strict=True):
        layout: dict[str, Any] = {"title.text": f"<b>{_title(head)}</b>", "coloraxis.cmax": _highest(panels, place)}
        layout |= {f"annotations[{i}].text": _heading(panel, place) for i, panel in enumerate(panels)}
        # Lists, not arrays: plotly.js does not unpack binary arrays in the arguments of a button.
        z = [panel.mass[place].tolist() for panel in panels]
        buttons.append({"label": style.head_name(*head), "method": "update", "args": [{"z": z}, layout]})
    return {
        "buttons": buttons,
        "x": 0,
        "xanchor": "left",
        "y": 1 + (HEADING + 4) / body,
        "yanchor": "bottom",
        "pad": {"t": 0, "b": 0},
        "bgcolor": "white",
        "bordercolor": "#c6cad2",
    }


def _as_uri(picture: npt.NDArray[np.uint8]) -> str:
    """The picture, paled, as a PNG inside an address, so that the figure needs no other file."""
    from PIL import Image

    grey = (picture.astype(np.float64) @ np.array([0.299, 0.587, 0.114]))[..., None]
    paled = 255 * WHITENED + (1 - WHITENED) * (COLOUR_KEPT * picture + (1 - COLOUR_KEPT) * grey)
    buffer = io.BytesIO()
    Image.fromarray(paled.round().astype(np.uint8)).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
