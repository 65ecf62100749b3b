"""The fitted shift against an independent fit, and training that begins from a vector."""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler

import probe
from probe.errors import ProbeError, UsageError
from probe.measures.partition import log_partition
from probe.models.load import load
from probe.trace.likelihood import answer_log_probability
from probe.trace.read import read
from probe.trace.steer import inject
from probe.vectors import fitted
from probe.vectors.fitted import FOLDS, PENALTIES, FittedShift, explained, r2, ridge
from probe.vectors.live import Live
from probe.vectors.methods import method_of
from probe.vectors.mimic import Mimic
from probe.vectors.oracle import read_oracle
from probe.vectors.pairs import alone, encode_pair
from probe.vectors.training import Training, split
from probe.vectors.vector import InContextVector
from tests.tiny_families import build
from tests.tiny_qwen import make_episode, make_module, make_processor

SIZES = ((84, 56), (40, 40))
EPISODES = [make_episode(1 + seed % 3, seed=seed, sizes=SIZES) for seed in range(1, 11)]
OPTIONS = Training(batch_size=4, validation=0.2)


@cache
def model_of():
    processor = make_processor()
    return load(make_module(processor), processor=processor)


@cache
def fit_of(penalty=0.01):
    return FittedShift(penalty).fit(model_of(), EPISODES, training=OPTIONS)


def rows_by_hand(episodes):
    """By layer: q, log Z1, log Z2 and Delta of all rows of queries and answers, ``[head, row, …]``."""
    model, found = model_of(), {}
    for episode in episodes:
        pair = encode_pair(model, episode)
        kept, n = torch.from_numpy(pair.kept), len(pair.teacher)
        shown = torch.ones(n, dtype=torch.bool)
        shown[kept] = False
        rows = torch.from_numpy(pair.query)
        store = {}

        def of_teacher(v, store=store, shown=shown, kept=kept, rows=rows, n=n):
            at = v.attention
            q, k, values = at.q[0], at.k[0].repeat_interleave(2, 0), at.v[0].repeat_interleave(2, 0)
            scores = (at.scale * q[:, kept[rows]] @ k.transpose(1, 2)).double()
            scores = scores.masked_fill(torch.arange(n) > kept[rows][:, None], float("-inf"))
            z1, z2 = scores[..., shown].logsumexp(-1), scores[..., ~shown].logsumexp(-1)
            mu = torch.sigmoid(z1 - z2)
            sa_d = scores[..., shown].softmax(-1) @ values[:, shown].double()
            sa_q = scores[..., ~shown].softmax(-1) @ values[:, ~shown].double()
            store[v.layer] = {"z1": z1, "z2": z2, "delta": mu[..., None] * (sa_d - sa_q)}
            return {}

        def of_student(v, store=store, rows=rows):
            store[v.layer]["q"] = v.attention.q[0][:, rows].double()
            return {}

        read(model, model.batch([pair.teacher]), ("attention",), of_teacher)
        oracle = read_oracle(model, [episode])
        read(model, model.batch([pair.student]), ("attention",), of_student, oracle.edits())
        for layer, own in store.items():
            for name, value in own.items():
                found.setdefault(layer, {}).setdefault(name, []).append(value)
    return {layer: {name: torch.cat(parts, 1) for name, parts in own.items()} for layer, own in found.items()}


def test_the_fit_is_that_of_an_independent_one():
    """One episode at a time, rows by hand, scikit-learn's ridge; and what the card says of the episodes held out."""
    vector = fit_of()
    learn, held_out = split(EPISODES, OPTIONS)
    assert len(held_out) == 2
    rows, checks = rows_by_hand(learn), rows_by_hand(held_out)
    for layer, own in rows.items():
        for head in range(4):
            q, z1 = own["q"][head].numpy(), own["z1"][head].numpy()
            scaler = StandardScaler().fit(q)
            line = Ridge(alpha=0.01 * len(q)).fit(scaler.transform(q), z1)
            w = line.coef_ / scaler.scale_
            b = line.intercept_ - w @ scaler.mean_
            assert np.abs(vector.parameters["w"][layer, head].numpy() - w).max() < 1e-3
            assert float(vector.parameters["b"][layer, head]) == pytest.approx(b, abs=5e-3)
            mu = torch.sigmoid(torch.from_numpy(q @ w + b) - own["z2"][head])[:, None]
            v = (vector.parameters["v"][layer, head].double()).requires_grad_()
            loss = (own["delta"][head] - mu * v).square().sum()
            (slope,) = torch.autograd.grad(loss, v)
            nothing = own["delta"][head].square().sum()
            assert slope.abs().max() < 1e-3 * nothing  # least squares (identity 12) ...
            assert loss < nothing  # ... and better than no vector
            check = checks[layer]
            z1, q = check["z1"][head].numpy(), check["q"][head].numpy()
            assert vector.card["fitted"]["r2"][layer][head] == pytest.approx(r2_score(z1, q @ w + b), abs=2e-3)
            mu = torch.sigmoid(torch.from_numpy(q @ w + b) - check["z2"][head])[:, None]
            left = (check["delta"][head] - mu * v.detach()).square().sum() / check["delta"][head].square().sum()
            assert vector.card["fitted"]["explained"][layer][head] == pytest.approx(1 - float(left), abs=2e-3)
    assert vector.card["fitted"]["rows"] == rows[0]["q"].shape[1]


def sums_of(x, y):
    x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    n = torch.full(x.shape[:1], float(x.shape[1]), dtype=torch.float64)
    return {
        "n": n,
        "xx": x.transpose(1, 2) @ x,
        "xy": torch.einsum("hrd,hr->hd", x, y),
        "yy": y.square().sum(-1),
    }


def test_the_regression_finds_a_planted_line_and_survives_a_constant_feature():
    torch.manual_seed(0)
    x = torch.randn(3, 200, 5, dtype=torch.float64) * torch.tensor([1.0, 10, 0.1, 3, 1])
    w, b = torch.randn(3, 5, dtype=torch.float64), torch.tensor([1.0, -2, 30], dtype=torch.float64)
    x[..., 4] = 7
    y = torch.einsum("hrd,hd->hr", x, w) + b[:, None]
    sums = sums_of(x, y)
    line = ridge(sums, 0.0)
    assert torch.allclose(line[:, :4], w[:, :4], atol=1e-6)
    assert torch.allclose(line[:, 5] + 7 * line[:, 4], b + 7 * w[:, 4], atol=1e-6)
    assert torch.allclose(r2(sums, line), torch.ones(3, dtype=torch.float64))
    strong = ridge(sums, 1e6)
    assert strong[:, :5].abs().max() < 1e-3
    assert r2(sums, strong).abs().max() < 1e-3
    assert bool(r2(sums_of(x, torch.ones_like(y)), line).isnan().all())


def test_the_share_explained_is_one_of_a_planted_shift_and_none_of_nothing():
    torch.manual_seed(0)
    v, mu = torch.randn(2, 5, dtype=torch.float64), torch.rand(2, 30, dtype=torch.float64)
    delta = mu[..., None] * v[:, None]
    sums = {
        "delta": torch.einsum("hr,hrd->hd", mu, delta),
        "square": mu.square().sum(-1),
        "size": delta.square().sum((-1, -2)),
    }
    assert torch.allclose(explained(sums, v), torch.ones(2, dtype=torch.float64))
    assert not explained(sums, 0 * v).any()
    assert (explained(sums, -v) < 0).all()
    assert bool(explained({name: 0 * value for name, value in sums.items()}, v).isnan().all())


def test_it_acts_exactly_as_mimic_and_its_mass_is_the_one_that_was_regressed():
    model, vector = model_of(), fit_of()
    assert {name: tuple(value.shape) for name, value in vector.parameters.items()} == {
        "v": (3, 4, 16),
        "w": (3, 4, 16),
        "b": (3, 4),
    }
    twin = InContextVector(Mimic(), vector.parameters)
    batch = model.batch([model.encode(alone(episode)) for episode in EPISODES[:3]])
    for options in ({}, {"scale": 0.5}, {"heads": [(1, 2)]}, {"layers": [0], "rows": "answer"}):
        found = inject(model, vector, **options).logits(batch)
        assert torch.equal(found, inject(model, twin, **options).logits(batch))
        assert not torch.equal(found, model.logits(batch))
    seen = {}

    def look(value, context):
        at = context.attention
        z2 = log_partition(at.q, at.k, at.mask, at.scale, at.causal)
        z1 = torch.einsum("bhnd,hd->bhn", at.q, vector.parameters["w"][1]) + vector.parameters["b"][1][:, None]
        shift = torch.sigmoid(z1 - z2).transpose(1, 2)[..., None] * vector.parameters["v"][1]
        seen["off"] = (vector.edits(layers=[1])[0].fn(value, context) - value - shift).abs().max()
        return value

    read(model, batch, edits=[probe.Edit("heads", 1, look)])
    assert seen["off"] < 1e-5


def test_batches_of_any_size_give_the_same():
    again = FittedShift(0.01).fit(model_of(), EPISODES, training=dataclasses.replace(OPTIONS, batch_size=3))
    for name, value in fit_of().parameters.items():
        assert torch.allclose(value, again.parameters[name], atol=2e-3), name


def test_what_is_held_out_is_not_fitted():
    _, held_out = split(EPISODES, OPTIONS)
    names = {episode.id for episode in held_out}
    changed = [
        dataclasses.replace(e, demonstrations=e.demonstrations[:1] * 2) if e.id in names else e for e in EPISODES
    ]
    again = FittedShift(0.01).fit(model_of(), changed, training=OPTIONS)
    for name, value in fit_of().parameters.items():
        assert torch.equal(value, again.parameters[name]), name
    assert again.card["fitted"]["explained"] != fit_of().card["fitted"]["explained"]
    whole = FittedShift(0.01).fit(model_of(), EPISODES, training=dataclasses.replace(OPTIONS, validation=0.0))
    assert set(whole.card["fitted"]) == {"penalty", "rows"}
    assert whole.card["fitted"]["rows"] > fit_of().card["fitted"]["rows"]


def test_cross_validation_chooses_the_penalty(monkeypatch):
    found = FittedShift().fit(model_of(), EPISODES, training=OPTIONS)
    chosen = found.card["fitted"]["penalty"]
    assert chosen in PENALTIES
    given = fit_of(chosen)
    assert all(torch.allclose(found.parameters[name], value, atol=1e-4) for name, value in given.parameters.items())
    # A line that is there wants no penalty, noise wants the largest.
    torch.manual_seed(0)
    x, noise = torch.randn(FOLDS, 2, 40, 30, dtype=torch.float64), torch.randn(FOLDS, 2, 40, dtype=torch.float64)
    assert fitted._choose([sums_of(part, part.sum(-1)) for part in x]) == min(PENALTIES)
    assert fitted._choose([sums_of(part, y) for part, y in zip(x, noise, strict=True)]) == max(PENALTIES)


def test_folds_keep_a_query_together():
    twice = [dataclasses.replace(e, id=f"{e.id} again") for e in EPISODES] + EPISODES
    folds = fitted._folds(twice)
    assert len(folds) == FOLDS
    assert sorted(e.id for fold in folds for e in fold) == sorted(e.id for e in twice)
    queries = [{e.query.id for e in fold} for fold in folds]
    assert sum(map(len, queries)) == len(EPISODES)


def test_progress_counts_every_reading():
    told = []
    FittedShift(1.0).fit(model_of(), EPISODES[:5], training=OPTIONS, progress=lambda *at: told.append(at))
    assert told[-1] == (10, 10)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_it_is_a_method_like_the_others(tmp_path):
    vector = fit_of()
    vector.save(tmp_path)
    again = InContextVector.load(tmp_path)
    assert again.method == FittedShift(0.01) == method_of("fitted-shift", {"penalty": 0.01})
    assert again.label == "fitted-shift penalty=0.01"
    assert json.loads((tmp_path / "card.json").read_text())["fitted"] == vector.card["fitted"]
    batch = model_of().batch([model_of().encode(alone(EPISODES[0]))])
    assert torch.equal(inject(model_of(), again).logits(batch), inject(model_of(), vector).logits(batch))
    assert torch.equal(inject(model_of(), again, scale=0).logits(batch), model_of().logits(batch))


def test_what_cannot_be_fitted_is_refused():
    model = model_of()
    with pytest.raises(UsageError, match="4 queries or more"):
        FittedShift().fit(model, EPISODES[:4], training=OPTIONS)
    with pytest.raises(UsageError, match="A penalty is 0 or more"):
        FittedShift(-0.5)
    with pytest.raises(UsageError, match="as it is"):
        FittedShift().fit(inject(model, fit_of()), EPISODES)
    with pytest.raises(UsageError, match="no demonstrations"):
        FittedShift(1.0).fit(model, [make_episode(0, seed=1)] * 2, training=dataclasses.replace(OPTIONS, validation=0))
    tiny = build("mllama")
    with pytest.raises(UsageError, match="cross-attention alone"):
        FittedShift().fit(load(tiny.module, processor=tiny.processor), EPISODES)


@pytest.mark.parametrize("kind", ["gemma3", "idefics", "paligemma", "qwen3_vl"])
def test_other_families_can_be_fitted(kind):
    """With windows in which some rows see no demonstration, and with cross-attention beside."""
    tiny = build(kind)
    model = load(tiny.module, processor=tiny.processor)
    vector = FittedShift(0.1).fit(model, EPISODES[:5], training=OPTIONS)
    assert all(value.isfinite().all() for value in vector.parameters.values())
    batch = model.batch([model.encode(alone(episode)) for episode in EPISODES[:3]])
    assert (inject(model, vector).logits(batch) - model.logits(batch)).abs().max() > 1e-3


def test_on_the_bundled_model_it_stands_in_for_demonstrations():
    """More probable answers than without, on queries that it has not seen; random vectors of its size do not do it."""
    from probe.vectors.random import random_like

    model = load("toy")
    episodes = probe.synthetic_episodes("operator:3", shots=8, n=60, seed=100, split="test")
    tests = probe.synthetic_episodes("operator:3", shots=8, n=40, seed=101, split="test")
    vector = FittedShift(0.01).fit(model, episodes, training=Training(batch_size=20))
    batch = model.batch([model.encode(alone(episode)) for episode in tests])
    none, with_it, by_chance = (
        answer_log_probability(each, batch).mean()
        for each in (model, inject(model, vector), inject(model, random_like(vector)))
    )
    assert with_it > none + 0.5
    assert by_chance < none + 0.25


# --- Training that begins from a vector ------------------------------------------------------------------------------

STILL = Training(epochs=1, batch_size=4, speed=1e-12, validation=0.2, weight_decay=0.0)


def test_training_begins_where_it_is_told_to():
    model, vector = model_of(), fit_of()
    before = {name: value.clone() for name, value in vector.parameters.items()}
    start = Mimic().fit(model, EPISODES, training=STILL, begin=vector)
    scratch = Mimic().fit(model, EPISODES, training=STILL)
    moved = Mimic().fit(model, EPISODES, training=dataclasses.replace(STILL, speed=1.0), begin=vector)
    for name, value in before.items():
        assert torch.allclose(start.parameters[name], value, atol=1e-6)
        assert not torch.allclose(scratch.parameters[name], value, atol=1e-2)
        assert not torch.allclose(moved.parameters[name], value, atol=1e-4)
        assert torch.equal(vector.parameters[name], value)  # what was given stays as it was
    assert start.method == Mimic()
    assert start.card["begin"] == {"label": vector.label, "identity": vector.identity}
    assert "begin" not in scratch.card


def test_a_state_belongs_to_what_it_began_from(tmp_path):
    model = model_of()
    Mimic().fit(model, EPISODES, training=STILL, begin=fit_of(), directory=tmp_path)
    Mimic().fit(model, EPISODES, training=STILL, begin=fit_of(), directory=tmp_path)
    with pytest.raises(ProbeError, match="another training"):
        Mimic().fit(model, EPISODES, training=STILL, directory=tmp_path)


def test_a_vector_of_another_form_or_model_is_refused():
    model = model_of()
    for method in (Live(), Mimic(size="shared"), Mimic(size="constant")):
        with pytest.raises(UsageError, match="cannot begin from fitted-shift"):
            method.fit(model, EPISODES, training=STILL, begin=fit_of())
    other = load(make_module(make_processor(), seed=1), processor=make_processor())
    with pytest.raises(UsageError, match="made for another model"):
        Mimic().fit(other, EPISODES, training=STILL, begin=fit_of())
