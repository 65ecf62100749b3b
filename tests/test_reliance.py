"""What answers rest on, where it is planted, and on the toy."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

import probe
from probe.data.tasks import synthetic_examples
from probe.experiments.reliance import modality_reliance
from probe.measures.reliance import reliance
from probe.stats import ratio_interval


def made(as_is: list[float], blurred: list[float], other: list[float]) -> xr.Dataset:
    readings = ["as-is", "blurred-image", "other-question"]
    return xr.Dataset({"score": (("reading", "episode"), [as_is, blurred, other])}, coords={"reading": readings})


def test_by_hand() -> None:
    found = reliance(made([1, 1, 1, 0.9, 1] * 8, [1, 1, 0, 0.9, 1] * 8, [0, 0, 0, 0.9, 0] * 8))
    assert found.visual.estimate == pytest.approx(0.2)
    assert found.linguistic.estimate == pytest.approx(0.8)
    assert found.index.estimate == pytest.approx(0.8)
    assert found.index.low < 0.8 < found.index.high


def test_where_nothing_is_lost_there_is_no_index() -> None:
    index = reliance(made([1, 0], [1, 0], [1, 0])).index
    assert np.isnan([index.estimate, index.low, index.high]).all()
    rare = ratio_interval([0, 0, 0, 1], [0, 0, 0, 1])
    assert rare.estimate == 1
    assert np.isnan(rare.low)  # of resamples, a third has nothing below
    with pytest.raises(ValueError, match="two finite numbers"):
        ratio_interval([1.0, np.nan], [1, 1])


def test_the_interval_covers_a_planted_ratio() -> None:
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        bottom = rng.random((80, 2)) < (0.6, 0.3)
        interval = ratio_interval(bottom[:, 0], bottom.sum(1), seed=seed, resamples=1000)
        covered += interval.low <= 2 / 3 <= interval.high
    assert covered >= 182  # 190 expected; 182 is 2.6 standard deviations below


def test_the_toy_rests_on_both() -> None:
    pool = synthetic_examples("vqa", n=200, seed=4)
    episodes = probe.choose(pool, shots=2, n=40, seed=4)
    kept: list[str] = []

    def keep(name: str, compute):
        kept.append(name)
        return compute()

    done: list[int] = []
    result = modality_reliance(probe.load("toy"), episodes, pool=pool, batch_size=20, keep=keep, progress=done.append)
    assert done == [20, 40, 60, 80, 100, 120]
    assert kept[2].startswith("blurred-image-") and len(set(kept)) == 6
    found = reliance(result)
    assert found.linguistic.estimate > 0.9
    assert found.visual.low > 0.1
    assert 0.4 < found.index.low < found.index.high < 1
    assert result["score"].sel(reading="as-is").mean() > 0.9
