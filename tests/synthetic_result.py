"""A result made by hand, token by token, that follows ``docs/results.md``: for tests of what reads results.

Attention is drawn (or planted) for every token of every episode and summed into segments here, in plain loops, so
that the code under test is compared with something that does not share its arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

MODALITY = {
    "sink": "sink",
    "template": "structural",
    "image": "visual",
    "question": "textual",
    "answer": "textual",
    "delimiter": "structural",
}
THUMBNAIL = 24


@dataclass(frozen=True)
class Token:
    """One position of an episode: the segment it belongs to and, on an image, its place in the grid."""

    role: str
    demonstration: int
    row: int = -1
    column: int = -1

    @property
    def segment(self) -> str:
        """The label on the ``segment`` axis."""
        if self.demonstration == -2:
            return self.role
        return f"demo{self.demonstration}/{self.role}" if self.demonstration >= 0 else f"query/{self.role}"


@dataclass(frozen=True)
class Plant:
    """Put all mass of every head on one image token of one demonstration."""

    demonstration: int
    row: int
    column: int


def episode_tokens(shots: int, grids: Sequence[tuple[int, int]], *, text_only: bool, answer_tokens: int) -> list[Token]:
    """All positions of an episode in reading order, the gold answer of the query at the end."""
    tokens = [Token("sink", -2), Token("template", -2), Token("template", -2)]
    for place in [*range(shots), -1]:
        tokens.append(Token("delimiter", place))
        if not text_only:
            rows, columns = grids[place % len(grids)]
            tokens += [Token("image", place, row, column) for row in range(rows) for column in range(columns)]
        tokens += [Token("question", place)] * 2
        tokens += [Token("delimiter", place)]
        tokens += [Token("answer", place)] * (answer_tokens if place == -1 else 1)
    return tokens


def synthetic_result(
    *,
    shots: Sequence[int] = (2, 3, 2, 1),
    text_only: Sequence[int] = (2,),
    long_answer: Sequence[int] = (1,),
    grids: Sequence[tuple[int, int]] = ((2, 3), (3, 2)),
    layers: int = 4,
    heads: int = 3,
    stored: int = 2,
    plant: Plant | None = None,
    seed: int = 0,
    **attributes: object,
) -> xr.Dataset:
    """Make a result.

    Parameters
    ----------
    shots
        Demonstrations of each episode.
    text_only, long_answer
        Episodes without images; episodes whose answer has two tokens (the others lack the row ``answer_rest``).
    grids
        Rows and columns of the image tokens of demonstration i, ``grids[i % len(grids)]``; the query takes the last.
    layers, heads
        Size of the model.
    stored
        The images and patch masses of the first so many episodes are kept.
    plant
        All attention of row ``answer`` on one image token, instead of random attention.
    seed
        Of the random attention.
    attributes
        Override or add attributes.
    """
    rng = np.random.default_rng(seed)
    episodes = [
        episode_tokens(k, grids, text_only=i in text_only, answer_tokens=2 if i in long_answer else 1)
        for i, k in enumerate(shots)
    ]
    places = [*range(max(shots)), -1]
    segments = [Token("sink", -2), Token("template", -2)]
    segments += [Token(role, place) for place in places for role in ("image", "question", "answer", "delimiter")]
    labels = [segment.segment for segment in segments]
    rows = ("answer", "answer_rest")

    shape = (len(episodes), len(rows), layers, heads, len(labels))
    mass = np.full(shape, np.nan, np.float32)
    contribution = np.full(shape, np.nan, np.float32)
    n_tokens = np.zeros((len(episodes), len(labels)), np.int64)
    n_visible = np.full((len(episodes), len(rows), layers, len(labels)), np.nan)
    sink_mass, sink_visible = np.full(shape, np.nan, np.float32), np.full_like(n_visible, np.nan)
    n_sinks = np.zeros((len(episodes), layers, len(labels)), np.int64)
    n_positions = np.zeros((len(episodes), len(rows)), np.int64)
    images: list[dict[str, object]] = []
    patches: list[tuple[int, int, int, np.ndarray]] = []

    for index, tokens in enumerate(episodes):
        n_answer = sum(token.segment == "query/answer" for token in tokens)
        n_prompt = len(tokens) - n_answer
        for token in tokens:
            n_tokens[index, labels.index(token.segment)] += 1
            n_sinks[index, 1:, labels.index(token.segment)] += is_sink(token)
        for row, position in enumerate([n_prompt - 1, n_prompt][: min(n_answer, 2)]):
            attention = _attention(tokens, position, (layers, heads), rng, plant if row == 0 else None)
            n_positions[index, row] = 1
            for label in {token.segment for token in tokens}:
                members = [i for i, token in enumerate(tokens) if token.segment == label]
                column = labels.index(label)
                mass[index, row, :, :, column] = attention[..., members].sum(-1)
                contribution[index, row, :, :, column] = attention[..., members].sum(-1) * rng.uniform(1, 2)
                on_sinks = attention[..., [i for i in members if is_sink(tokens[i])]].sum(-1)
                sink_mass[index, row, :, :, column] = np.where(np.arange(layers)[:, None] > 0, on_sinks, 0.0)
            n_visible[index, row] = [sum(t.segment == label for t in tokens[: position + 1]) for label in labels]
            seen = [t.segment for t in tokens[: position + 1] if is_sink(t)]
            sink_visible[index, row] = 0
            sink_visible[index, row, 1:] = [seen.count(label) for label in labels]
            if row == 0 and index < stored:
                _store_images(index, tokens, attention, images, patches)

    n = len(episodes)
    sinking = np.arange(layers)[:, None] > 0
    correct = (np.arange(n) % 4 != 3).astype(np.int64)
    dataset = xr.Dataset(
        {
            "mass": (("episode", "row", "layer", "head", "segment"), mass),
            "contribution": (("episode", "row", "layer", "head", "segment"), contribution),
            "n_tokens": (("episode", "segment"), n_tokens),
            "n_visible": (("episode", "row", "layer", "segment"), n_visible),
            "visible_share": (
                ("episode", "row", "layer", "segment"),
                n_visible / np.nansum(n_visible, -1, keepdims=True),
            ),
            "sink_mass": (("episode", "row", "layer", "head", "segment"), sink_mass),
            "sink_visible": (("episode", "row", "layer", "segment"), sink_visible),
            "sink_share": (
                ("episode", "row", "layer", "segment"),
                sink_visible / np.nansum(n_visible, -1, keepdims=True),
            ),
            "n_sinks": (("episode", "layer", "segment"), n_sinks),
            "sink_dimensions": (("episode", "layer", "rank"), np.stack([np.where(sinking, [7, -1], -1)] * n)),
            "sink_size": (("episode", "layer", "rank"), np.stack([np.where(sinking, [30.0, 3.0], 3.0)] * n)),
            "n_positions": (("episode", "row"), n_positions),
            "residual": (("episode", "layer"), rng.uniform(0, 1e-6, (n, layers))),
            "correct": ("episode", correct),
            "prediction": ("episode", np.where(correct == 1, "red", "blue")),
            "gold": ("episode", np.full(n, "red")),
            "n_straddling": ("episode", np.zeros(n, np.int64)),
        },
        coords={
            "episode": [f"binding-uncued-0-{i}" for i in range(n)],
            "row": list(rows),
            "layer": np.arange(layers),
            "head": np.arange(heads),
            "segment": labels,
            "role": ("segment", [segment.role for segment in segments]),
            "modality": ("segment", [MODALITY[segment.role] for segment in segments]),
            "demonstration": ("segment", [segment.demonstration for segment in segments]),
            "half": ("episode", ["select" if i % 2 == 0 else "report" for i in range(n)]),
            "shots": ("episode", list(shots)),
        },
        attrs={
            "model": "tiny-vlm",
            "model_fingerprint": "0123abcd",
            "dtype": "float32",
            "attn_implementation": "eager",
            "task": "binding-uncued",
            "seed": seed,
            "n_attempted": n,
            "n_done": n,
            "n_failed": 0,
            "answers": "gold",
            "rows": "answer",
            "mass_precision": "float32",
            "residual_bound": 1e-5,
            "sink_threshold": 20.0,
            "unknown_word_share": 0.0,
            "images_resized": 0,
            "command": "probe attention-map --model tiny-vlm --task binding-uncued",
            **attributes,
        },
    )
    return dataset.assign(_image_variables(images, patches, (layers, heads)))


def is_sink(token: Token) -> bool:
    """Sinks of all layers but the first: the first position, and the first token of every image."""
    return token.role == "sink" or (token.row, token.column) == (0, 0)


def _attention(
    tokens: list[Token], position: int, heads: tuple[int, int], rng: np.random.Generator, plant: Plant | None
) -> np.ndarray:
    """Weights (layer, head, token) of one position, causal."""
    attention = np.zeros((*heads, len(tokens)))
    if plant is not None:
        target = Token("image", plant.demonstration, plant.row, plant.column)
        attention[..., tokens.index(target) if target in tokens else 0] = 1.0
        return attention
    logits = rng.normal(size=(*heads, position + 1)) * 1.5
    logits[..., 0] += 3.0
    weights = np.exp(logits)
    attention[..., : position + 1] = weights / weights.sum(-1, keepdims=True)
    return attention


def _store_images(
    index: int,
    tokens: list[Token],
    attention: np.ndarray,
    images: list[dict[str, object]],
    patches: list[tuple[int, int, int, np.ndarray]],
) -> None:
    shots = max(token.demonstration for token in tokens) + 1
    for place in [*range(shots), -1]:
        members = [i for i, t in enumerate(tokens) if t.role == "image" and t.demonstration == place]
        if not members:
            continue
        rows = max(tokens[i].row for i in members) + 1
        columns = max(tokens[i].column for i in members) + 1
        patches += [(len(images), tokens[i].row, tokens[i].column, attention[..., i]) for i in members]
        images.append({"episode": index, "demonstration": place, "rows": rows, "columns": columns})


def _image_variables(
    images: list[dict[str, object]], patches: list[tuple[int, int, int, np.ndarray]], heads: tuple[int, int]
) -> dict[str, object]:
    rows = np.array([image["rows"] for image in images], dtype=np.int64)
    columns = np.array([image["columns"] for image in images], dtype=np.int64)
    scale = THUMBNAIL // 3
    thumbnails = np.zeros((len(images), THUMBNAIL, THUMBNAIL, 3), np.uint8)
    for index, (height, width) in enumerate(zip(rows * scale, columns * scale, strict=True)):
        thumbnails[index, :height, :width] = (230, 230, 225)
        thumbnails[index, scale : 2 * scale, : width // 2] = [(200, 60, 60), (60, 120, 200), (80, 160, 90)][index % 3]
    masses = [patch[3] for patch in patches]
    return {
        "patch_mass": (("layer", "head", "patch"), np.stack(masses, -1) if masses else np.zeros((*heads, 0))),
        "patch_sink": (
            ("layer", "patch"),
            np.array([[layer > 0 and patch[1:3] == (0, 0) for patch in patches] for layer in range(heads[0])], bool),
        ),
        "patch_image": ("patch", np.array([patch[0] for patch in patches], dtype=np.int64)),
        "patch_tile": ("patch", np.zeros(len(patches), dtype=np.int64)),
        "patch_row": ("patch", np.array([patch[1] for patch in patches], dtype=np.int64)),
        "patch_column": ("patch", np.array([patch[2] for patch in patches], dtype=np.int64)),
        "image_episode": ("image", np.array([image["episode"] for image in images], dtype=np.int64)),
        "image_demonstration": ("image", np.array([image["demonstration"] for image in images], dtype=np.int64)),
        "image_rows": ("image", rows),
        "image_box": (("image", "edge"), np.tile([0.0, 0.0, 1.0, 1.0], (len(images), 1))),
        "image_columns": ("image", columns),
        "thumbnail": (("image", "y", "x", "channel"), thumbnails),
        "thumbnail_height": ("image", rows * scale),
        "thumbnail_width": ("image", columns * scale),
    }
