"""Results as ``probe.experiments.compare.compare`` returns them, made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

LAYERS = 3
PLAIN: dict[str, Any] = {
    "kind": "vector",
    "shown": False,
    "scale": 1.0,
    "where": "",
    "like": "",
    "method": "live",
    "vector": "",
    "training_data": "synthetic:operator:3",
    "training": "epochs=10 speed=1.0",
    "training_seed": 0,
    "training_episodes": 64,
    "training_shots": 4,
    "n_parameters": 774,
    "n_bytes": 3096,
}
NOTHING: dict[str, Any] = {
    "method": "",
    "training_data": "",
    "training": "",
    "training_seed": -1,
    "training_episodes": -1,
    "training_shots": -1,
    "n_parameters": 0,
    "n_bytes": 0,
}


def first(n: int, right: int) -> np.ndarray:
    """The first so many of n episodes right."""
    return np.arange(n) < right


def way(label: str, correct: np.ndarray, **about: Any) -> dict[str, Any]:
    """One way; a vector's identity is its label, unless told."""
    return {**PLAIN, "way": label, "correct": correct, "vector": label, **about}


def random_like(label: str, correct: np.ndarray, **about: Any) -> dict[str, Any]:
    """A random way beside another."""
    return way(f"random like {label}", correct, **{"kind": "random", "like": label, **about})


def references(zero: np.ndarray, few: np.ndarray) -> list[dict[str, Any]]:
    """Zero-shot and few-shot."""
    return [
        way("zero-shot", zero, **{**NOTHING, "kind": "zero-shot", "vector": ""}),
        way("few-shot", few, **{**NOTHING, "kind": "few-shot", "vector": "", "shown": True}),
    ]


def comparison(ways: Sequence[Mapping[str, Any]], *, n_distances: int | None = None, **attributes: Any) -> xr.Dataset:
    """A result of these ways; what is not planted is random."""
    n = len(ways[0]["correct"])
    rng = np.random.default_rng(0)
    shape = (len(ways), n)
    far = rng.uniform(1, 2, (*shape, LAYERS))
    far[[x["kind"] == "few-shot" for x in ways]] = 0
    for place, each in enumerate(ways):
        far[place] = each.get("distance", far[place])
    far[:, n if n_distances is None else n_distances :] = np.nan
    dims = ("way", "episode")
    return xr.Dataset(
        {
            "correct": (dims, np.array([x["correct"] for x in ways], bool)),
            "copied": (dims, rng.random(shape) < 0.4),
            "forced": (dims, (rng.random(shape) < 0.5).astype(float)),
            "log_probability": (dims, -rng.exponential(size=shape)),
            "distance": (
                (*dims, "layer"),
                far,
                {"site": "layer_output", "positions": "those of the query", "units": "norm"},
            ),
            "prompt_tokens": (dims, np.full(shape, 9) + 80 * np.array([[x["shown"]] for x in ways])),
            "prediction": (dims, np.full(shape, "red")),
        },
        coords={
            "way": [x["way"] for x in ways],
            "episode": [f"e{i}" for i in range(n)],
            "query": ("episode", [f"q{i}" for i in range(n)]),
            "shots": ("episode", [4] * n),
            "layer": range(LAYERS),
            **{name: ("way", [x[name] for x in ways]) for name in PLAIN},
        },
        attrs={
            "model": "tiny-vlm",
            "model_family": "none",
            "dtype": "float32",
            "attn_implementation": "eager",
            "task": "operator:3",
            "seed": 1,
            "n_attempted": n,
            "n_done": n,
            "n_failed": 0,
            **attributes,
        },
    )
