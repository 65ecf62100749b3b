"""Names for the numbers of an attention map: from arrays of one batch to the dataset of ``docs/results.md``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from PIL import Image

from probe.data.example import Episode
from probe.models.encoding import Encoding
from probe.models.token_map import ROLES, Segment, TokenMap
from probe.scoring.exact import exact_match

Rows = Literal["answer", "demo-answers", "all"]

THUMBNAIL = 160
UNITS = {
    "mass": "probability",
    "token_mass": "probability",
    "patch_mass": "probability",
    "contribution": "norm in the residual stream",
    "residual": "relative",
    "sink_mass": "probability",
    "sink_size": "root mean squares of the other dimensions",
    "cross_mass": "probability",
    "cross_contribution": "norm in the residual stream",
    "cross_residual": "relative",
}


@dataclass(frozen=True)
class Plan:
    """What to record: which rows, layers and segments, and which layers of cross-attention to images."""

    rows: Rows
    layers: list[int]
    segments: list[Segment]
    cross_layers: list[int] = field(default_factory=list)

    @property
    def shots(self) -> int:
        """Demonstrations of the longest episode."""
        return max(segment.demonstration for segment in self.segments) + 1

    @property
    def row_labels(self) -> list[str]:
        """Names on the ``row`` axis."""
        demonstrations = range(self.shots if self.rows != "answer" else 0)
        return ["answer", "answer_rest", *(f"demo_answer_{i}" for i in demonstrations)]

    def positions(self, encoding: Encoding) -> list[list[int]]:
        """For every row label, the query positions that it is the mean of (without padding)."""
        answer = encoding.token_map.answer.tolist()
        demonstrations = range(self.shots if self.rows != "answer" else 0)
        return [
            [answer[0] - 1],
            [position - 1 for position in answer[1:]],
            *(encoding.token_map.where("answer", i).tolist() for i in demonstrations),
        ]

    def count(self, token_map: TokenMap | None) -> NDArray[np.int64]:
        """How many keys of one axis each segment holds; none where an episode has no such axis."""
        index = token_map.segment_index(self.segments) if token_map is not None else np.zeros(0, np.int64)
        return np.bincount(index[index >= 0], minlength=len(self.segments))


def label(
    episodes: Sequence[Episode],
    encodings: Sequence[Encoding],
    plan: Plan,
    values: dict[str, NDArray[Any]],
    answers: list[str],
) -> xr.Dataset:
    """Name the rows of one batch.

    Parameters
    ----------
    episodes, encodings
        Of the batch, in its order.
    plan
        What was recorded.
    values
        ``mass``, ``contribution`` and ``sink_mass`` ``[episode, layer, row, head, segment]``; ``n_visible``,
        ``visible_share``, ``sink_visible`` and ``sink_share`` ``[episode, layer, row, segment]``; ``n_sinks``
        ``[episode, layer, segment]``, ``sink_dimensions`` and ``sink_size`` ``[episode, layer, 2]``, ``residual``
        ``[episode, layer]``.
    answers
        The model's own.

    Returns
    -------
    xarray.Dataset
        What an episode lacks (a segment, a row) is NaN.
    """
    n_tokens = np.stack([plan.count(encoding.token_map) for encoding in encodings])
    positions = [plan.positions(encoding) for encoding in encodings]
    n_positions = np.array([[len(group) for group in rows] for rows in positions])
    given = (n_positions > 0)[:, :, None, None]
    there = (n_tokens > 0)[:, None, None, None, :] & given[..., None]
    by_head, by_row = ("episode", "row", "layer", "head", "segment"), ("episode", "row", "layer", "segment")

    def heads(name: str) -> xr.Variable:
        return xr.Variable(by_head, np.where(there, values[name].swapaxes(1, 2), np.float32(np.nan)))

    def seen(name: str) -> xr.Variable:
        return xr.Variable(by_row, np.where(given, values[name].swapaxes(1, 2), np.nan))

    def text(words: list[str]) -> xr.Variable:
        return xr.Variable("episode", np.array(words, dtype=str))

    return xr.Dataset(
        {
            **{name: heads(name) for name in ("mass", "contribution", "sink_mass")},
            "n_tokens": (("episode", "segment"), n_tokens),
            **{name: seen(name) for name in ("n_visible", "visible_share", "sink_visible", "sink_share")},
            "n_sinks": (("episode", "layer", "segment"), values["n_sinks"]),
            "sink_dimensions": (("episode", "layer", "rank"), values["sink_dimensions"]),
            "sink_size": (("episode", "layer", "rank"), values["sink_size"]),
            "n_positions": (("episode", "row"), n_positions),
            "residual": (("episode", "layer"), values["residual"]),
            "correct": (
                "episode",
                [int(exact_match(a, e.query.answers)) for a, e in zip(answers, episodes, strict=True)],
            ),
            "prediction": text(answers),
            "gold": text([episode.query.answer for episode in episodes]),
            "n_straddling": ("episode", [encoding.token_map.n_straddling for encoding in encodings]),
            "n_images": ("episode", [len(encoding.images) for encoding in encodings]),
            "n_resized": ("episode", [sum(i.size != i.original for i in e.images) for e in encodings]),
            "image_scale": ("episode", [_scale(encoding) for encoding in encodings]),
        },
        coords={
            "episode": [episode.id for episode in episodes],
            "shots": ("episode", [episode.shots for episode in episodes]),
            "row": plan.row_labels,
            "layer": plan.layers,
            "head": range(values["mass"].shape[3]),
            "segment": [segment.label for segment in plan.segments],
            "role": ("segment", [segment.role for segment in plan.segments]),
            "modality": ("segment", [segment.modality for segment in plan.segments]),
            "demonstration": ("segment", [segment.demonstration for segment in plan.segments]),
        },
    )


def label_cross(
    encodings: Sequence[Encoding],
    plan: Plan,
    values: dict[str, NDArray[np.float32]] | None,
    gates: list[float],
    n_heads: int,
) -> xr.Dataset:
    """Name what the rows of one batch read of the images through cross-attention.

    Parameters
    ----------
    encodings, plan
        As in :func:`label`.
    values
        As in :func:`label`, of cross-attention, and ``looks`` ``[episode, layer, row]``; ``None`` if no episode of the
        batch has an image.
    gates
        Of each layer, the mean size of the factor on what its cross-attention writes.
    n_heads
        Heads in each layer.

    Returns
    -------
    xarray.Dataset
        NaN where an episode lacks an image, or a row can see none.
    """
    n_tokens = np.stack([plan.count(encoding.vision_map) for encoding in encodings])
    if values is None:  # then nothing is there, whatever the numbers
        shape = (len(encodings), len(plan.cross_layers), len(plan.row_labels), n_heads, len(plan.segments))
        nothing = np.full(shape, np.nan, np.float32)
        values = {name: nothing for name in ("mass", "contribution")}
        values |= {name: np.asarray(nothing[:, :, :, 0]) for name in ("n_visible", "visible_share")}
        values |= {"residual": np.zeros(shape[:2], np.float32), "looks": np.zeros(shape[:3], np.float32)}
    looks = values["looks"].min(1) > 1 - 1e-6  # all positions of the row; the same in every layer
    known = xr.DataArray(looks, dims=("episode", "row")) & xr.DataArray(n_tokens > 0, dims=("episode", "segment"))

    def named(name: str, *dims: str) -> xr.DataArray:
        return xr.DataArray(values[name], dims=("episode", "cross_layer", "row", *dims, "segment")).where(known)

    return xr.Dataset(
        {
            "cross_mass": named("mass", "head"),
            "cross_contribution": named("contribution", "head"),
            "cross_n_visible": named("n_visible"),
            "cross_visible_share": named("visible_share"),
            "cross_n_tokens": (("episode", "segment"), n_tokens),
            "cross_residual": (("episode", "cross_layer"), values["residual"]),
        },
        coords={"cross_layer": plan.cross_layers, "cross_gate": ("cross_layer", gates)},
    ).transpose("episode", "row", "cross_layer", "head", "segment", missing_dims="ignore")


def _scale(encoding: Encoding) -> float:
    """Mean factor by which the images' sides were resized; NaN without images."""
    areas = [(i.size[0] * i.size[1], i.original[0] * i.original[1]) for i in encoding.images]
    return float(np.mean([np.sqrt(new / old) for new, old in areas])) if areas else float("nan")


def label_tokens(
    encodings: Sequence[Encoding], pads: Sequence[int], plan: Plan, mass: NDArray[np.float32]
) -> xr.Dataset:
    """Name the mass of every position, flat over the episodes of a batch, padding left out.

    ``mass`` is ``[episode, layer, head, position, segment]``.
    """
    flat = []
    for values, encoding, pad in zip(mass, encodings, pads, strict=True):
        there = plan.count(encoding.token_map) > 0
        flat.append(np.where(there, values[:, :, pad:].transpose(2, 0, 1, 3), np.float32(np.nan)))
    maps = [encoding.token_map for encoding in encodings]
    return xr.Dataset(
        {"token_mass": (("token", "layer", "head", "segment"), np.concatenate(flat))},
        coords={
            "token_episode": ("token", np.repeat(np.arange(len(maps)), [len(m) for m in maps])),
            "token_position": ("token", np.concatenate([np.arange(len(m)) for m in maps])),
            "token_role": ("token", np.array(ROLES)[np.concatenate([m.role for m in maps])]),
            "token_demonstration": ("token", np.concatenate([m.demonstration for m in maps])),
        },
    )


def label_images(
    pictures: Sequence[Sequence[Image.Image]],
    encodings: Sequence[Encoding],
    pads: Sequence[int],
    first_row: NDArray[np.float32],
    first_sinks: NDArray[np.bool_],
) -> xr.Dataset:
    """Name the first answer row's attention on each image token of a few episodes, and keep their images small.

    ``first_row`` is ``[episode, layer, head, position]``, ``first_sinks`` ``[episode, layer, position]``.
    """
    mass, sinks, image, tile, row, column = [], [], [], [], [], []
    owners: list[tuple[int, int]] = []
    grids, boxes, sizes, thumbnails = [], [], [], []
    for b, images in enumerate(pictures):
        token_map = encodings[b].token_map
        for number, picture in enumerate(images):
            at = np.flatnonzero(token_map.image == number)
            mass.append(first_row[b][:, :, at + pads[b]])
            sinks.append(first_sinks[b][:, at + pads[b]])
            image.append(np.full(len(at), len(owners)))
            tile.append(token_map.tile[at])
            row.append(token_map.row[at])
            column.append(token_map.column[at])
            owners.append((b, int(token_map.demonstration[at[0]])))
            finest = tile[-1] > 0 if (tile[-1] > 0).any() else tile[-1] == 0
            grids.append([int(axis[-1][finest].max()) + 1 for axis in (row, column)])  # -1 (no grid) becomes 0
            boxes.append(encodings[b].images[number].box)
            small = picture.copy()
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            sizes.append(small.size)
            canvas = np.zeros((THUMBNAIL, THUMBNAIL, 3), np.uint8)
            canvas[: small.height, : small.width] = np.asarray(small)
            thumbnails.append(canvas)
    if not owners:
        return xr.Dataset()
    return xr.Dataset(
        {
            "patch_mass": (("layer", "head", "patch"), np.concatenate(mass, -1)),
            "patch_sink": (("layer", "patch"), np.concatenate(sinks, -1)),
            "thumbnail": (("image", "y", "x", "channel"), np.stack(thumbnails)),
            "image_box": (("image", "edge"), np.array(boxes)),
        },
        coords={
            "patch_image": ("patch", np.concatenate(image)),
            "patch_tile": ("patch", np.concatenate(tile)),
            "patch_row": ("patch", np.concatenate(row)),
            "patch_column": ("patch", np.concatenate(column)),
            "image_episode": ("image", [episode for episode, _ in owners]),
            "image_demonstration": ("image", [owner for _, owner in owners]),
            "image_rows": ("image", [rows for rows, _ in grids]),
            "image_columns": ("image", [columns for _, columns in grids]),
            "thumbnail_height": ("image", [height for _, height in sizes]),
            "thumbnail_width": ("image", [width for width, _ in sizes]),
        },
    )


# What a part counts from 0, and the dimension whose length the parts before it add.
_INDICES = {"token_episode": "episode", "image_episode": "episode", "patch_image": "image"}


def join(parts: Sequence[xr.Dataset]) -> xr.Dataset:
    """Join the parts of a run: along ``episode``, and where they have them along ``token``, ``image`` and ``patch``."""
    offset = {"episode": 0, "image": 0}
    shifted = []
    for part in parts:
        moved = {name: part[name] + offset[dim] for name, dim in _INDICES.items() if name in part.coords}
        shifted.append(part.assign_coords(moved))
        for dim in offset:
            offset[dim] += part.sizes.get(dim, 0)
    joined = []
    for dim in ("episode", "token", "image", "patch"):
        having = [part for part in shifted if dim in part.dims]
        if having:
            names = [name for name in having[0].data_vars if dim in having[0][name].dims]
            joined.append(
                xr.concat([part[names] for part in having], dim, coords="minimal", compat="equals", join="exact")
            )
    result = xr.merge(joined, compat="equals", join="exact")
    halves = np.where(np.arange(result.sizes["episode"]) % 2 == 0, "select", "report")
    result = result.assign_coords(half=("episode", halves))
    for name, unit in UNITS.items():
        if name in result:
            result[name].attrs["units"] = unit
    return result
