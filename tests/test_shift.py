"""The split of attention against a softmax over concatenated keys, and constancy where it is planted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xarray as xr

from probe.errors import UsageError
from probe.measures.mass import row_attention
from probe.measures.shift import (
    TOKENS,
    direct_effect,
    frozen_scale,
    logit_directions,
    mean_unembedding,
    split_attention,
)
from probe.measures.shift_summary import (
    agreement,
    best_constant,
    effective_rank,
    explained,
    isotropic_agreement,
    isotropic_rank,
    rank_interval,
    summarise_shift,
)

BATCH, HEADS, KV, ROWS, WIDTH, OF_D, OF_Q = 2, 6, 2, 3, 8, 9, 7


def drawn(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """q, the keys and values of D and those of Q, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (HEADS, ROWS), (KV, OF_D), (KV, OF_D), (KV, OF_Q), (KV, OF_Q)
    return tuple(torch.randn(BATCH, *shape, WIDTH, generator=generator, dtype=torch.float64) for shape in shapes)


def softmax_over(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """All heads' weights on all keys, heads written out."""
    return (q @ k.repeat_interleave(HEADS // KV, 1).transpose(-1, -2) * 0.7).softmax(-1)


def side(in_d: bool) -> torch.Tensor:
    """Which of the concatenated keys are of D, or of Q."""
    return ((torch.arange(OF_D + OF_Q) < OF_D) == in_d).expand(BATCH, -1)


# ------------------------------------------------------------------------------------------------------------ the split


def test_attention_is_the_sum_of_what_it_is_split_into():
    """In fp64, against attention to the concatenated keys and to each set of keys alone."""
    q, k_d, v_d, k_q, v_q = drawn()
    v = torch.cat([v_d, v_q], 2)
    whole = softmax_over(q, torch.cat([k_d, k_q], 2))
    found = split_attention(whole, v, side(True), side(False))
    z_d, z_q = ((q @ k.repeat_interleave(HEADS // KV, 1).transpose(-1, -2) * 0.7).exp().sum(-1) for k in (k_d, k_q))
    of_d, of_q = (
        softmax_over(q, k) @ values.repeat_interleave(HEADS // KV, 1) for k, values in ((k_d, v_d), (k_q, v_q))
    )
    output = whole @ v.repeat_interleave(HEADS // KV, 1)
    close = {"rtol": 0, "atol": 4e-15}
    torch.testing.assert_close(found.mu, z_d / (z_d + z_q), **close)
    torch.testing.assert_close(found.of_demonstrations, of_d, **close)
    torch.testing.assert_close(found.of_rest, of_q, **close)
    torch.testing.assert_close(found.difference, of_d - of_q, **close)
    torch.testing.assert_close(found.shift, found.mu[..., None] * (of_d - of_q), **close)
    torch.testing.assert_close(found.rebuilt, output, **close)
    assert 0.1 < float(found.mu.mean()) < 0.9
    assert float((found.of_rest - output).norm()) > 1  # the demonstrations do shift it


def test_rows_of_a_kernel_split_alike():
    """Query rows in fp32, keys of both sides mixed and hidden by a causal mask, against plain loops."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(BATCH, HEADS, 12, WIDTH, generator=generator)
    k, v = (torch.randn(BATCH, KV, 12, WIDTH, generator=generator) for _ in "kv")
    inside = torch.rand(BATCH, 12, generator=generator) < 0.5
    inside[:, 1] = True
    rows = torch.tensor([[4, 11], [7, 9]])
    found = split_attention(row_attention(q, k, None, 0.5, True, rows), v, inside, ~inside)
    for b in range(BATCH):
        for h in range(HEADS):
            for r, row in enumerate(rows[b].tolist()):
                weights = [math.exp(0.5 * float(q[b, h, row] @ k[b, h // 3, j])) for j in range(row + 1)]
                of = {True: torch.zeros(WIDTH), False: torch.zeros(WIDTH)}
                total = {True: 0.0, False: 0.0}
                for j, weight in enumerate(weights):
                    of[bool(inside[b, j])] += weight * v[b, h // 3, j]
                    total[bool(inside[b, j])] += weight
                assert float(found.mu[b, h, r]) == pytest.approx(total[True] / sum(weights), abs=1e-6)
                wanted = of[True] / total[True] - of[False] / total[False]
                torch.testing.assert_close(found.difference[b, h, r], wanted, rtol=1e-4, atol=1e-5)


def test_what_is_not_seen_has_no_direction_and_shifts_nothing():
    attention = torch.tensor([[[[0.0, 0.25, 0.75], [1.0, 0.0, 0.0], [1e-42, 0.5, 0.5]]]])
    v = torch.tensor([[[[5.0], [1.0], [2.0]]]])
    inside = torch.tensor([[True, False, False]])
    found = split_attention(attention, v, inside, ~inside)
    assert found.mu[0, 0].tolist() == [0, 1, 0]
    assert found.difference.isnan().all()
    assert found.shift[0, 0, [0, 2], 0].tolist() == [0, 0]
    assert found.shift[0, 0, 1].isnan()  # nothing but demonstrations: what it is shifted from is undefined
    torch.testing.assert_close(found.rebuilt[0, 0, :, 0], torch.tensor([1.75, 5.0, 1.5]))


# ----------------------------------------------------------------------------------------------------- effect on logits


def test_the_mean_row_of_an_unembedding_in_pieces():
    weight = torch.randn(2 * TOKENS + 5, 3, generator=torch.Generator().manual_seed(0)) + 1
    torch.testing.assert_close(mean_unembedding(weight), weight.double().mean(0).float(), rtol=1e-5, atol=1e-6)
    assert mean_unembedding(weight.bfloat16()).dtype == torch.float32


def test_a_frozen_norm_reads_the_logits_of_the_stream():
    """The whole path, norm and unembedding, against torch's own; and that what heads write adds up."""
    generator = torch.Generator().manual_seed(1)
    hidden, vocabulary = 10, 40
    stream = torch.randn(1, 2, hidden, generator=generator)
    gain = torch.rand(hidden, generator=generator) + 0.5
    unembedding = torch.randn(vocabulary, hidden, generator=generator)
    tokens = torch.tensor([[3, 31]])
    normed = torch.nn.functional.rms_norm(stream, (hidden,), gain, 1e-6)
    scale = frozen_scale(normed, stream, gain)
    torch.testing.assert_close(scale, 1 / (stream.square().mean(-1) + 1e-6).sqrt())
    logits = normed @ unembedding.T
    directions = logit_directions(unembedding, mean_unembedding(unembedding), gain, tokens)
    wanted = logits.gather(-1, tokens[..., None])[..., 0] - logits.mean(-1)
    torch.testing.assert_close((directions * stream).sum(-1) * scale, wanted, rtol=1e-4, atol=1e-5)
    heads = torch.randn(1, 3, 2, 4, generator=generator)
    weight = torch.randn(hidden, 12, generator=generator)
    effect = direct_effect(heads, weight, directions)
    for h in range(3):
        written = heads[0, h] @ weight[:, 4 * h : 4 * h + 4].T
        torch.testing.assert_close(effect[0, h], (written * directions[0]).sum(-1), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ constancy


def isotropic(n: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, width))


def test_agreement_is_the_mean_over_pairs():
    vectors = isotropic(7, 5) + 0.7
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(7) for j in range(i)]
    found = agreement(vectors)
    assert found.estimate == pytest.approx(np.mean(pairs))
    assert found.low < found.estimate < found.high
    with_none = np.vstack([vectors, np.full(5, np.nan), np.zeros(5)])
    assert agreement(with_none) == found
    assert agreement(vectors[:2]).estimate == pytest.approx(pairs[0])
    assert math.isnan(agreement(vectors[:2]).low)
    assert math.isnan(agreement(vectors[:1]).estimate)


def test_a_constant_direction_agrees_wholly_and_a_random_one_not():
    lengths = np.random.default_rng(0).exponential(size=20)
    constant = lengths[:, None] * isotropic(1, 16)
    assert agreement(constant).ends == pytest.approx([1, 1, 1])
    assert effective_rank(constant) == pytest.approx(1, abs=1e-6)
    found = agreement(isotropic(60, 16))
    assert abs(found.estimate) < 0.02
    assert found.low < 0 < found.high


def test_random_directions_exceed_the_chance_level_once_in_twenty_times():
    reached = [agreement_only(isotropic(12, 8, seed)) > isotropic_agreement(12, 8) for seed in range(2000)]
    assert np.mean(reached) == pytest.approx(0.05, abs=0.02)
    assert math.isnan(isotropic_agreement(1, 8))


def agreement_only(vectors: np.ndarray) -> float:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    n = len(unit)
    return float((np.square(unit.sum(0)).sum() - n) / (n * (n - 1)))


def test_the_interval_of_agreement_covers():
    """Over vectors around a mean; an interval over pairs, or over their means by vector, would be far too narrow."""
    truth = agreement_only(isotropic(4000, 8, 999) + 0.5)
    inside = [covers(agreement(isotropic(24, 8, seed) + 0.5), truth) for seed in range(200)]
    assert np.mean(inside) >= 0.88


def covers(interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


def test_the_best_constant_is_the_least_squares_solution():
    rng = np.random.default_rng(2)
    mu, shifts = rng.uniform(0.1, 1, 30), isotropic(30, 4, 3) + 1
    vector = best_constant(mu, shifts)
    np.testing.assert_allclose(vector, np.linalg.lstsq(mu[:, None], shifts, rcond=None)[0][0])
    gradient = (2 * mu[:, None] * (mu[:, None] * vector - shifts)).sum(0)
    np.testing.assert_allclose(gradient, 0, atol=1e-12)
    missing = np.vstack([shifts, np.full(4, np.nan)])
    np.testing.assert_allclose(best_constant(np.append(mu, 0.5), missing), vector)
    assert np.isnan(best_constant(np.zeros(3), np.zeros((3, 4)))).all()


def test_a_planted_constant_is_explained_in_other_episodes_and_noise_is_not():
    rng = np.random.default_rng(4)
    mu = rng.uniform(0.1, 1, 40)
    planted = mu[:, None] * isotropic(1, 6)
    vector = best_constant(mu[:20], planted[:20])
    assert explained(mu[20:], planted[20:], vector).ends == pytest.approx([1, 1, 1])
    noise = mu[:, None] * isotropic(40, 6)
    vector = best_constant(mu[:20], noise[:20])
    assert explained(mu[:20], noise[:20], vector).estimate > 0  # where it was fitted
    held_out = explained(mu[20:], noise[20:], vector)
    assert held_out.estimate < 0
    assert held_out.low < held_out.estimate < held_out.high
    half = planted + 0.5 * mu[:, None] * isotropic(40, 6, 9)
    share = explained(mu[20:], half[20:], best_constant(mu[:20], half[:20]))
    left = np.square(half[20:] - mu[20:, None] * best_constant(mu[:20], half[:20])).sum()
    assert share.estimate == pytest.approx(1 - left / np.square(half[20:]).sum())
    assert math.isnan(explained(mu, noise, np.full(6, np.nan)).estimate)
    assert math.isnan(explained(mu, 0 * noise, vector).estimate)
    assert math.isnan(explained(mu[:2], noise[:2], vector).low)
    assert math.isnan(explained(mu[:3], noise[:3] * np.array([[1], [0], [0]]), vector).low)


def test_the_interval_of_what_is_explained_covers():
    """With a vector held, over the episodes that it is tried on, some of them shifted far."""
    rng, vector = np.random.default_rng(5), np.full(8, 0.6)

    def episodes(n: int) -> tuple[np.ndarray, np.ndarray]:
        mu = rng.uniform(0.2, 1, n)
        return mu, mu[:, None] * (rng.normal(size=(n, 8)) * np.exp(0.5 * rng.normal(size=(n, 1))) + 0.5)

    truth = explained(*episodes(200_000), vector).estimate
    inside = [covers(explained(*episodes(30), vector), truth) for _ in range(500)]
    assert np.mean(inside) >= 0.9


def test_the_effective_rank_counts_directions():
    assert effective_rank(np.eye(5)) == pytest.approx(5)
    assert effective_rank(np.vstack([np.eye(5)] * 3)) == pytest.approx(5)
    assert effective_rank(np.diag([3.0, 1.0])) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )
    assert effective_rank(np.ones((4, 3))) == pytest.approx(1, abs=1e-6)  # not centred
    assert math.isnan(effective_rank(np.zeros((4, 3))))
    assert math.isnan(effective_rank(np.zeros((0, 3))))
    vectors = isotropic(40, 8)
    assert isotropic_rank(vectors) == pytest.approx(effective_rank(vectors), rel=0.1)
    assert isotropic_rank(np.outer(np.arange(1, 41) > 38, np.ones(8))) <= 2  # two vectors that are not 0
    assert math.isnan(rank_interval(vectors[:5]).low)
    assert rank_interval(np.ones((20, 3))).ends == pytest.approx([1, 1, 1], abs=1e-5)


def test_the_interval_of_the_effective_rank_covers():
    """The mean over samples of the same size, for vectors of unlike directions."""
    sizes = np.array([3, 2, 1, 0.5, 0.3, 0.2])
    draw = lambda seed: isotropic(30, 6, seed) * sizes  # noqa: E731
    truth = float(np.mean([effective_rank(draw(seed)) for seed in range(10_000, 11_000)]))
    inside = [covers(rank_interval(draw(seed)), truth) for seed in range(300)]
    assert np.mean(inside) >= 0.9


# ---------------------------------------------------------------------------------------------------------- the summary


def made_up(n: int = 24) -> xr.Dataset:
    """Heads 0.0, constant; 0.1, random; 1.0, without mass; 1.1, of no effect and seen in few episodes."""
    rng = np.random.default_rng(0)
    grid, width = (n, 2, 2, 2), 8
    mu = rng.uniform(0.2, 0.9, grid)
    vectors = rng.normal(size=(*grid, width))
    vectors[:, :, 0, 0] = rng.normal(size=width)
    mu[:, :, 1, 0] = 0
    mu[4:, :, 1, 1] = 0
    vectors[mu == 0] = np.nan
    shift = mu * np.nan_to_num(np.linalg.norm(vectors, axis=-1)) * np.array([[3, 1], [1, 0.1]])
    effect = 0.2 * rng.normal(size=grid) + np.array([[1.0, 0], [0, 0]])
    effect[:, :, 1] = 0
    labels = ["sink", "demo0/image", "demo0/answer", "demo1/image", "demo1/delimiter", "query/question"]
    mass = rng.dirichlet(np.ones(6), size=grid)
    mass[..., 3] = np.nan
    values = {"mu": mu, "shift": shift, "logit_effect": effect, "difference": np.linalg.norm(vectors, axis=-1)}
    by_head = ("episode", "row", "layer", "head")
    for each in (mass, vectors, *values.values()):
        each[:, 1] = np.nan
    return xr.Dataset(
        {
            **{name: (by_head, array) for name, array in values.items()},
            "difference_vector": ((*by_head, "width"), vectors),
            "mass": ((*by_head, "segment"), mass),
            "n_positions": (("episode", "row"), np.tile([1, 0], (n, 1))),
            "answer_logit": (("episode", "row"), np.ones((n, 2))),
        },
        coords={
            "episode": [f"e{i}" for i in range(n)],
            "row": ["answer", "answer_rest"],
            "layer": [0, 4],
            "head": [0, 1],
            "segment": labels,
            "modality": ("segment", ["sink", "visual", "textual", "visual", "structural", "textual"]),
            "demonstration": ("segment", [-2, 0, 0, 1, 1, -1]),
            "half": ("episode", ["select" if i % 2 == 0 else "report" for i in range(n)]),
            "shots": ("episode", [2] * n),
        },
        attrs={"model": "a <b>", "task": "made-up", "caveat": "only a toy", "residual_bound": 1e-5},
    )


def test_the_summary_of_planted_heads():
    result = made_up()
    summary = summarise_shift(result)
    estimate = summary.sel(end="estimate")
    report = result.isel(episode=slice(1, None, 2)).sel(row="answer")
    np.testing.assert_allclose(estimate["shift"], report["shift"].mean("episode"))
    np.testing.assert_allclose(estimate["agreement"].values[0], [1, 0], atol=0.12)
    assert float(estimate["explained"][0, 0]) == pytest.approx(1)
    assert estimate["explained"].values[0, 1] < 0.1
    assert estimate["effective_rank"].values[0] == pytest.approx([1, 6.5], abs=0.9)
    assert summary["n"].values.tolist() == [[12, 12], [0, 2]]
    assert summary["p"].values[0, 0] < 0.01 < 0.05 < summary["p"].values[0, 1]
    assert summary["rank"].values[0].tolist() == [1, 2]
    no_mass = estimate.isel(layer=1, head=0)
    assert (float(no_mass["mu"]), float(no_mass["shift"])) == (0, 0)
    assert np.isnan([float(no_mass[name]) for name in ("difference", "agreement", "explained", "effective_rank")]).all()
    assert summary["agreement_chance"].values[0, 0] == isotropic_agreement(12, 8)
    assert summary.attrs["n_reported"] == 12
    assert float(summary["reliability"]) > 0.5


def test_ranks_are_of_one_half_and_numbers_of_the_other():
    result = made_up()
    even = np.arange(result.sizes["episode"]) % 2 == 0
    result["shift"][:, 0] = np.where(even[:, None, None], [[1.0, 2], [3, 4]], [[40.0, 30], [20, 10]])
    summary = summarise_shift(result)
    assert summary["rank"].values.tolist() == [[4, 3], [2, 1]]
    assert summary["shift"].sel(end="estimate").values.tolist() == [[40, 30], [20, 10]]
    assert float(summary["reliability"]) == pytest.approx(-1)
    vectors = result["difference_vector"].values
    vectors[even, 0, 0, 0] *= -1
    assert float(summarise_shift(result)["explained"].sel(end="estimate")[0, 0]) < -1  # fitted on the other half


def test_the_mass_is_split_by_modality_and_by_demonstration():
    result = made_up()
    summary = summarise_shift(result).sel(end="estimate")
    mass = result["mass"].isel(episode=slice(1, None, 2)).sel(row="answer").mean(("episode", "head"))
    np.testing.assert_allclose(summary["mu_by_modality"].sel(modality="visual"), mass.sel(segment="demo0/image"))
    np.testing.assert_allclose(summary["mu_by_modality"].sel(modality="textual"), mass.sel(segment="demo0/answer"))
    np.testing.assert_allclose(summary["sink_mass"], mass.sel(segment="sink"))
    first = mass.sel(segment=["demo0/image", "demo0/answer"]).sum("segment")
    np.testing.assert_allclose(summary["mu_by_demonstration"].sel(demonstration=0), first)
    np.testing.assert_allclose(summary["mu_by_demonstration"].sel(demonstration=1), mass.sel(segment="demo1/delimiter"))


def test_a_row_that_is_not_there_and_a_half_that_is_empty():
    with pytest.raises(UsageError, match="no row 'last'"):
        summarise_shift(made_up(), row="last")
    with pytest.raises(UsageError, match="every answer is a single token"):
        summarise_shift(made_up(), row="answer_rest")
    alone = summarise_shift(made_up().isel(episode=[0]))
    assert alone["shift"].isnull().all()
    assert alone["explained"].isnull().all()
