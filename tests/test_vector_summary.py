"""What vectors recover where it is known by construction, and which of them are seeds of one another."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from probe.errors import UsageError
from probe.experiments.ways import Way, describe_ways, ways_for
from probe.measures.vector_groups import alone, group_names, is_part, over_seeds, put_back
from probe.measures.vector_summary import recovered, summarise_vectors
from probe.stats import mean_interval, paired_difference, ratio_interval, wilson
from probe.store.atomic import read_zarr, write_zarr
from probe.vectors.live import Live
from probe.vectors.vector import InContextVector
from tests.synthetic_comparison import comparison, first, random_like, references, way

N = 60
ZERO, FEW = first(N, 18), first(N, 54)


def planted() -> xr.Dataset:
    return comparison(
        [
            *references(ZERO, FEW),
            way("as few", FEW, method="mimic"),
            way("as zero", ZERO, method="m2iv"),
            way("half", first(N, 36)),
            random_like("half", first(N, 12)),
            way("half + demonstrations", FEW, shown=True, vector="half"),
        ],
        n_distances=20,
    )


def test_what_is_planted_is_recovered_with_a_width() -> None:
    """As few-shot: exactly 1; as zero-shot: exactly 0; and neither is certain, though no answer differs."""
    found = summarise_vectors(planted(), distances=False)["recovered"]
    for label, truth in (("few-shot", 1), ("as few", 1), ("as zero", 0), ("zero-shot", 0)):
        estimate, low, high = found.sel(way=label).values
        assert estimate == truth
        assert low < truth < high
        assert high - low < 0.4
    estimate, low, high = found.sel(way="half").values
    assert estimate == pytest.approx(0.5)
    assert 0 < low < 0.5 < high < 1


def test_the_interval_holds_what_both_forms_of_the_ratio_allow() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        luck = rng.random((40, 1))
        way_, zero, few = ((luck * 0.6 + 0.4 * rng.random((40, 3))) < [rng.uniform(0.1, 1), 0.3, 0.75]).T.astype(float)
        gain, lost, won = (paired_difference(*pair) for pair in ((few, zero), (way_, few), (way_, zero)))
        if gain.low <= 0:
            continue
        grid = [np.linspace(x.low, x.high, 5) for x in (gain, lost, won)]
        from_few = [1 + d / g for g, d in itertools.product(grid[0], grid[1])]
        from_zero = [d / g for g, d in itertools.product(grid[0], grid[2])]
        found = recovered(way_, zero, few)
        assert found.low == pytest.approx(max(min(from_few), min(from_zero)))
        assert found.high == pytest.approx(min(max(from_few), max(from_zero)))
        assert found.low <= found.estimate <= found.high
        assert found.estimate == pytest.approx((way_.mean() - zero.mean()) / (few.mean() - zero.mean()))


@pytest.mark.parametrize("shares", [(0.3, 0.9, 0.9), (0.3, 0.9, 0.6), (0.3, 0.9, 0.3)])
def test_the_interval_holds_the_truth_often_enough(shares: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(1)
    zero, few, vector = shares
    truth = (vector - zero) / (few - zero)
    held = []
    for _ in range(300):
        drawn = np.where(rng.random((80, 1)) < 0.6, rng.random((80, 1)), rng.random((80, 3))) < shares
        found = recovered(*drawn.T[[2, 0, 1]].astype(float))
        held.append(found.low <= truth <= found.high)
    assert np.mean(held) > 0.93


@pytest.mark.parametrize("few", [first(N, 20), first(N, 5)])
def test_where_there_is_no_gain_nothing_is_recovered(few: np.ndarray) -> None:
    found = recovered(*(x.astype(float) for x in (first(N, 30), ZERO, few)))
    assert np.isnan(found.ends).all()


def test_shares_and_differences_are_those_of_the_answers() -> None:
    result = planted()
    summary = summarise_vectors(result, distances=False)
    half = {name: summary[name].sel(way="half").values for name in summary.data_vars if "end" in summary[name].dims}
    of = result.sel(way="half")
    np.testing.assert_allclose(half["accuracy"], wilson(36, N).ends)
    np.testing.assert_allclose(half["to_zero_shot"], paired_difference(first(N, 36), ZERO).ends)
    np.testing.assert_allclose(half["to_few_shot"], paired_difference(first(N, 36), FEW).ends)
    np.testing.assert_allclose(half["to_random"], paired_difference(first(N, 36), first(N, 12)).ends)
    np.testing.assert_allclose(half["copied"], wilson(int(of["copied"].sum()), N).ends)
    np.testing.assert_allclose(half["forced"], wilson(int(of["forced"].sum()), N).ends)
    likely = of["log_probability"].values
    np.testing.assert_allclose(half["log_probability"], mean_interval(likely).ends)
    for name in ("zero-shot", "few-shot"):
        change = mean_interval(likely - result["log_probability"].sel(way=name).values).ends
        np.testing.assert_allclose(half[f"log_probability_to_{name.replace('-', '_')}"], change)
    assert np.isnan(summary["to_random"].sel(way="as few")).all()
    itself = summary["log_probability_to_few_shot"].sel(way="few-shot").values
    assert itself[0] == 0
    assert np.isnan(itself[1:]).all()
    assert summary["prompt_tokens"].sel(way=["zero-shot", "few-shot"]).values.tolist() == [9, 89]
    assert int(summary["n"]) == N


def test_an_oracle_says_nothing_so_it_copies_nothing() -> None:
    result = comparison([*references(ZERO, FEW), way("oracle", FEW, kind="oracle", method="", training_seed=-1)])
    result["copied"] = result["copied"].astype(float)
    result["copied"].loc[{"way": "oracle"}] = np.nan
    summary = summarise_vectors(result, distances=False)
    assert np.isnan(summary["copied"].sel(way="oracle")).all()
    assert summary["copied"].sel(way="few-shot").notnull().all()
    assert summary["recovered"].sel(way="oracle").values[0] == 1


def test_several_random_draws_are_one_control() -> None:
    draws = [first(N, 10), first(N, 30)]
    ways = [random_like("a", x, way=f"random like a {i}") for i, x in enumerate(draws)]
    found = summarise_vectors(comparison([*references(ZERO, FEW), way("a", FEW), *ways]), distances=False)
    expected = np.mean([paired_difference(FEW, x).ends for x in draws], axis=0)
    np.testing.assert_allclose(found["to_random"].sel(way="a"), expected)


def test_distances_are_those_of_the_episodes_that_have_some() -> None:
    near, far = np.random.default_rng(0).uniform(1, 2, (2, N, 3))
    zero, few = references(ZERO, FEW)
    result = comparison([{**zero, "distance": near}, few, way("a", FEW, distance=far)], n_distances=12)
    summary = summarise_vectors(result)
    assert int(summary["n_distances"]) == 12
    for layer in range(3):
        x, y = far[:12, layer], near[:12, layer]
        found = summary.sel(way="a", layer=layer)
        np.testing.assert_allclose(found["distance"], mean_interval(x, resamples=1000).ends)
        np.testing.assert_allclose(found["distance_ratio"], ratio_interval(x, y, resamples=1000).ends)
    np.testing.assert_array_equal(summary["distance_ratio"].sel(way="zero-shot"), 1)
    np.testing.assert_array_equal(summary["distance"].sel(way="few-shot"), 0)
    none = summarise_vectors(comparison([zero, few], n_distances=0))
    assert np.isnan(none["distance"]).all()
    assert np.isnan(none["distance_ratio"]).all()


def test_a_comparison_needs_both_ends() -> None:
    with pytest.raises(UsageError, match="no way few-shot"):
        summarise_vectors(comparison(references(ZERO, FEW)[:1]))


# --------------------------------------------------------------------------------------------------------------- seeds


def of_seeds() -> xr.Dataset:
    ways = references(ZERO, FEW)
    for size in (20, 80):
        for seed, right in ((0, 30), (1, 40), (2, 41)):
            label = f"l{size}-{seed}"
            about = {"training_seed": seed, "training_episodes": size}
            ways += [
                way(label, first(N, right + (size == 80)), **about),
                way(f"{label} + demonstrations", FEW, shown=True, vector=label, **about),
                random_like(label, first(N, 10 + seed), **about),
            ]
    return comparison([*ways, way("other", FEW, method="mimic")])


def test_seeds_are_taken_together_and_nothing_else_is() -> None:
    names = group_names(of_seeds())
    small = ["live, 20 episodes", "live, 20 episodes + demonstrations", "random like live, 20 episodes"]
    large = [name.replace("20", "80") for name in small]
    assert names == ["zero-shot", "few-shot", *small * 3, *large * 3, "other"]


def test_what_differs_in_more_than_the_seed_stands_apart() -> None:
    def names(*changes: dict[str, object]) -> list[str]:
        ways = [way(f"v{i}", FEW, **{"training_seed": i, **change}) for i, change in enumerate(changes)]
        return group_names(comparison([*references(ZERO, FEW), *ways]))[2:]

    assert names({}, {}) == ["live", "live"]
    assert names({}, {}, {"method": "m2iv"}) == ["live", "live", "v2"]
    slow, fast = {"training": "epochs=10 speed=1.0"}, {"training": "epochs=10 speed=9.0"}
    assert names(slow, fast) == ["v0", "v1"]
    assert names(slow, slow, fast, fast) == ["live, speed=1.0"] * 2 + ["live, speed=9.0"] * 2
    assert names({}, {}, {"scale": 0.5}, {"scale": 0.5}) == ["live"] * 2 + ["live, × 0.5"] * 2
    part = {"where": "layer 2"}
    assert names({}, {}, part, part) == ["live"] * 2 + ["live, layer 2"] * 2
    other = {"training_data": "synthetic:operator:1"}
    assert len(set(names({}, other))) == 2
    few = {"training_shots": 1}
    assert names({}, {}, few, few) == ["live, 4 shots"] * 2 + ["live, 1 shot"] * 2
    # The same seed twice: something else differs that is not told.
    assert names({}, {"training_seed": 0}) == ["v0", "v1"]
    assert names({"training_seed": -1}, {"training_seed": -1}) == ["v0", "v1"]


def test_no_two_groups_have_one_name() -> None:
    ways = [way(f"v{i}", FEW, training_seed=i) for i in range(2)] + [way("live", ZERO, method="live site=mlp_output")]
    names = group_names(comparison([*references(ZERO, FEW), *ways]))[2:]
    assert names == ["live (v0, …)", "live (v0, …)", "live"]


def test_the_spread_over_seeds_is_no_interval() -> None:
    summary = summarise_vectors(of_seeds(), distances=False)
    spread = summary["spread"].sel(group="live, 20 episodes")
    shares = np.array([30, 40, 41]) / N
    np.testing.assert_allclose(spread.sel(measure="accuracy"), [shares.mean(), shares.min(), shares.max()])
    gain = (54 - 18) / N
    np.testing.assert_allclose(spread.sel(measure="recovered", seeds="most"), (41 - 18) / N / gain)
    counts = dict(zip(summary["group"].values.tolist(), summary["n_seeds"].values.tolist(), strict=True))
    assert counts["live, 20 episodes"] == counts["random like live, 80 episodes"] == 3
    assert counts["zero-shot"] == counts["other"] == 1


def test_over_seeds_means_are_no_surer_than_one_seed() -> None:
    summary = summarise_vectors(of_seeds())
    groups = over_seeds(summary)
    seeds = [f"l20-{seed}" for seed in range(3)]
    for name in ("accuracy", "recovered", "to_few_shot", "distance"):
        np.testing.assert_allclose(groups[name].sel(way="live, 20 episodes"), summary[name].sel(way=seeds).mean("way"))
    width, widths = ((x.sel(end="high") - x.sel(end="low")) for x in (groups["accuracy"], summary["accuracy"]))
    assert float(width.sel(way="live, 20 episodes")) >= float(widths.sel(way=seeds).min())
    random = groups.sel(way="random like live, 20 episodes")
    assert str(random["like"].values) == "live, 20 episodes"
    for name in ("accuracy", "log_probability"):
        np.testing.assert_array_equal(groups[name].sel(way="few-shot"), summary[name].sel(way="few-shot"))


def test_which_ways_stand_alone_are_parts_or_put_back() -> None:
    result = comparison(
        [
            *references(ZERO, FEW),
            way("a", FEW),
            way("a, layer 1", FEW, vector="a", where="layer 1"),
            way("b, layer 1", FEW, where="layer 1"),
            way("a + demonstrations", FEW, vector="a", shown=True),
            random_like("a", ZERO),
        ]
    )
    assert result["way"].values[alone(result)].tolist() == ["a", "a, layer 1", "b, layer 1"]
    assert result["way"].values[is_part(result)].tolist() == ["a, layer 1"]
    assert result["way"].values[put_back(result, result.sel(way="a"))].tolist() == ["a + demonstrations"]
    assert not put_back(result, result.sel(way="a, layer 1")).any()


def test_a_saved_result_says_the_same(tmp_path: Path) -> None:
    result = of_seeds()
    write_zarr(tmp_path / "result.zarr", result)
    xr.testing.assert_identical(
        summarise_vectors(result, distances=False),
        summarise_vectors(read_zarr(tmp_path / "result.zarr"), distances=False),
    )


def test_a_comparison_tells_what_groups_are_made_of() -> None:
    """The coordinates of a result, from ways as they are made."""
    card = {
        "training": {"epochs": 3, "speed": 2.0, "seed": 7},
        "data": {"episodes": 40, "shots": [4, 8]},
    }
    vector = InContextVector(Live(), {"v": torch.ones(2, 4), "alpha": torch.ones(2)}, card)
    ways = ways_for({"a": vector}, random=2, put_back=True)
    ways += [Way("b", vector, layers=(1,)), Way("c", vector, heads=((0, 1), (1, 2)), rows="answer", scale=0.5)]
    about = {name: list(values) for name, (_, values) in describe_ways(ways).items()}
    assert [way.label for way in ways][2:6] == ["a", "a + demonstrations", "random like a 0", "random like a 1"]
    assert about["like"] == ["", "", "", "", "a", "a", "", ""]
    assert about["shown"] == [False, True, False, True, False, False, False, False]
    assert about["where"] == [""] * 6 + ["layer 1", "heads 0.1, 1.2; at answer"]
    assert about["scale"] == [1.0] * 7 + [0.5]
    assert len({about["vector"][place] for place in (2, 3, 6, 7)}) == 1
    assert len(set(about["vector"])) == 4  # none, the vector and two random ones
    assert about["training"] == ["", ""] + ["epochs=3 speed=2.0"] * 6
    assert about["training_seed"] == [-1, -1] + [7] * 6
    assert about["training_shots"] == [-1, -1] + [8] * 6
