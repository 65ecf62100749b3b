"""The figure of likeness and repetition: its numbers are those of the result."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr

from probe.errors import UsageError
from probe.plots.copy_sweep import plot_copy_sweep
from probe.stats import wilson


def sweep(levels: tuple[float, ...] = (0.0, 0.5, 1.0)) -> xr.Dataset:
    rng = np.random.default_rng(0)
    shape = (len(levels), 4, 20)
    return xr.Dataset(
        {
            "said_planted": (("level", "repetition", "episode"), (rng.random(shape) < 0.4).astype(float)),
            "correct": (("level", "repetition", "episode"), (rng.random(shape) < 0.7).astype(float)),
            "similarity": (("level", "episode"), rng.random((len(levels), 20))),
        },
        coords={"level": list(levels), "repetition": range(4)},
        attrs={"model": "a <b>", "dtype": "float32", "caveat": "only a toy", "encoder": "<i>clip</i>"},
    )


def test_points_are_the_shares() -> None:
    result = sweep()
    figure = plot_copy_sweep(result)
    assert len(figure.data) == 6
    for number, trace in enumerate(figure.data):
        name, level = ("said_planted", "correct")[number // 3], number % 3
        flags = result[name].values[level]
        for place in range(4):
            expected = wilson(int(flags[place].sum()), 20)
            assert trace.y[place] == expected.estimate
            assert trace.y[place] + trace.error_y.array[place] == pytest.approx(expected.high)
            assert trace.y[place] - trace.error_y.arrayminus[place] == pytest.approx(expected.low)
            assert trace.customdata[place].tolist() == [*expected.ends, 20]
    assert [trace.name.split(",")[0] for trace in figure.data[:3]] == [
        "the nearest",
        "50% down the ranking",
        "the farthest",
    ]
    assert len({trace.line.color for trace in figure.data}) == 3


def test_what_it_says_and_escapes() -> None:
    # plotly writes "<" as "\\u003c": as it stands, the text could not hold what must not be in it
    text = json.dumps(json.loads(plot_copy_sweep(sweep((0.0,))).to_json()), ensure_ascii=False)
    assert "only a toy" in text
    assert "20 queries" in text
    assert "Planting is an intervention" in text
    assert "attention" not in text.lower()
    assert "<b>a <b>" not in text
    assert "<i>clip" not in text


def test_from_a_run_with_other_names() -> None:
    result = sweep()
    renamed = result.rename({name: f"sweep_{name}" for name in result.data_vars}).rename(episode="sweep_episode")
    for one, other in zip(plot_copy_sweep(renamed).data, plot_copy_sweep(result).data, strict=True):
        np.testing.assert_array_equal(one.y, other.y)
    with pytest.raises(UsageError, match="no sweep; run `probe copy-rate --sweep`"):
        plot_copy_sweep(result.drop_vars("said_planted"))
