"""Vectors that are read off the model and then searched for: ICV, I2CL and MTV."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import probe
from probe.errors import ProbeError, UsageError
from probe.trace.read import read
from probe.trace.steer import inject
from probe.vectors.i2cl import I2cl
from probe.vectors.icv import STRENGTHS, Icv, principal_direction
from probe.vectors.mtv import Mtv
from probe.vectors.pairs import alone
from probe.vectors.training import Training, split, train
from probe.vectors.vector import InContextVector
from tests.test_vectors import EPISODES as SHOWN
from tests.test_vectors import batch_of, hooked, moved, tiny, vector
from tests.tiny_families import FAMILIES
from tests.tiny_qwen import make_episode

OPTIONS = Training(validation=0.5, batch_size=3, seed=1, epochs=2)
EPISODES = [make_episode(2, seed=seed) for seed in range(3, 11)]
METHODS: dict[str, Any] = {"icv": Icv(), "i2cl": I2cl(), "mtv": Mtv(steps=3, samples=4, choices=2)}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", METHODS)
def test_every_family_can_be_fitted(name, kind):
    model = tiny(name)
    images = 0 if name == "llava_onevision" else 1
    episodes = [make_episode(2, seed=seed, images=images) for seed in range(3, 9)]
    found = METHODS[kind].fit(model, episodes, training=OPTIONS)
    batch = batch_of(model, [alone(episodes[0])])
    own = model.logits(batch, logits_to_keep=4)
    assert all(torch.isfinite(value).all() for value in found.parameters.values())
    if found.layers:  # of few heads, those that were chosen may all write as they did
        assert moved(inject(model, found).logits(batch, logits_to_keep=4), own) > 1e-5
    nothing = inject(model, found, scale=0.0).logits(batch, logits_to_keep=4)
    assert moved(nothing, own) <= (1e-4 * float(own.abs().max()) if kind == "icv" else 0)


@pytest.mark.parametrize("kind", METHODS)
def test_what_is_found_is_stored_and_steered_models_are_refused(kind, tmp_path):
    model = tiny("qwen2_5_vl")
    found = METHODS[kind].fit(model, EPISODES, training=OPTIONS)
    found.save(tmp_path)
    again = InContextVector.load(tmp_path)
    assert again.method == found.method
    batch = batch_of(model, SHOWN)
    assert torch.equal(inject(model, again).logits(batch), inject(model, found).logits(batch))
    with pytest.raises(UsageError, match="was steered"):
        METHODS[kind].fit(inject(model, found), EPISODES, training=OPTIONS)
    same = METHODS[kind].fit(model, EPISODES, training=OPTIONS)
    assert all(torch.equal(value, same.parameters[name]) for name, value in found.parameters.items())


# ----------------------------------------------------------------------------------------------------------------- ICV


def test_the_direction_is_the_mean_and_the_first_component():
    """Against an eigendecomposition, on planted data; the sign is that of the difference that lies farthest."""
    rng = np.random.default_rng(0)
    axis, mean = np.eye(12)[3], np.linspace(-1, 1, 12)
    along = np.array([0.5, -3.0, 1.0, 0.7, 0.8])
    data = mean + along[:, None] * axis + 1e-3 * rng.standard_normal((5, 12))
    found = principal_direction(torch.from_numpy(data)).numpy()
    centred = data - data.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    component = vectors[:, values.argmax()]
    component *= np.sign((centred @ component)[np.abs(centred @ component).argmax()])
    assert found == pytest.approx(data.mean(0) + component, abs=1e-6)
    assert component[3] < -0.99
    assert principal_direction(torch.from_numpy(data[:1])).numpy() == pytest.approx(data[0])
    # Wide, and with no direction that stands out: still the first, each time.
    wide = torch.from_numpy(rng.standard_normal((24, 2000)))
    found = principal_direction(wide) - wide.mean(0)
    _, _, components = torch.linalg.svd(wide - wide.mean(0), full_matrices=False)
    assert abs(float(found @ components[0])) == pytest.approx(1, abs=1e-6)
    assert float(found.norm()) == pytest.approx(1, abs=1e-9)


def test_its_vectors_are_of_what_demonstrations_change_in_all_layers():
    model = tiny("qwen2_5_vl")
    found = Icv(strength=0.3).fit(model, EPISODES, training=OPTIONS)
    learn, _ = split(EPISODES, OPTIONS)

    def states(episode: Any) -> Tensor:
        place = model.encode(episode).n_prompt - 1
        kept = read(
            model,
            batch_of(model, [episode]),
            ("layer_output",),
            lambda values: {"x": values.layer_output[0, place].double()},  # type: ignore[index]
        )
        return torch.stack([kept.layers[layer]["x"] for layer in range(model.n_layers)])

    differences = torch.stack([states(e) - states(alone(e)) for e in learn]).flatten(1)
    wanted = principal_direction(differences).unflatten(0, (model.n_layers, -1))
    assert moved(found.parameters["v"], wanted.float()) < 1e-4


def test_it_turns_and_keeps_norms():
    """By the formula, written out with torch hooks; states that point away are turned more."""
    model = tiny("qwen2_5_vl")
    batch = batch_of(model, SHOWN)
    one = vector(Icv(strength=0.7), model)

    def change(layer: int) -> Any:
        v = one.parameters["v"][layer]

        def run(m: Tensor) -> Tensor:
            cosine = torch.nn.functional.cosine_similarity(m, -v.expand_as(m), dim=-1)[..., None]
            u = torch.nn.functional.normalize(m, dim=-1)
            u = u + 0.7 * (1 + cosine.clamp_min(0)) * torch.nn.functional.normalize(v, dim=-1)
            return torch.nn.functional.normalize(u, dim=-1) * m.norm(dim=-1, keepdim=True)

        return run

    by_hand = hooked(model, batch, [(layer.mlp, False, change(i)) for i, layer in enumerate(model.layers)])  # type: ignore[union-attr]
    found = inject(model, one).logits(batch, logits_to_keep=4)
    assert moved(found, by_hand) < 1e-4
    assert moved(found, model.logits(batch, logits_to_keep=4)) > 1e-2
    [edit] = one.edits(layers=[0])
    zeros = torch.zeros(1, 1, model.text_config.hidden_size)
    assert torch.equal(edit.fn(zeros, None), zeros)  # type: ignore[arg-type]


def test_the_strength_is_the_best_of_those_that_validate():
    model = tiny("qwen2_5_vl")
    found = Icv().fit(model, EPISODES, training=OPTIONS)
    each = [Icv(strength=strength).fit(model, EPISODES, training=OPTIONS) for strength in STRENGTHS]
    _, validate = split(EPISODES, OPTIONS)
    queries = batch_of(model, [alone(episode) for episode in validate])
    scores = [probe.trace.likelihood.answer_log_probability(inject(model, one), queries).mean() for one in each]
    assert found.card["fitted"]["by_strength"] == pytest.approx(scores, abs=1e-3)
    assert found.method == Icv(strength=STRENGTHS[int(np.argmax(scores))])
    with pytest.raises(UsageError, match="choose a strength by"):
        Icv().fit(model, EPISODES, training=dataclasses.replace(OPTIONS, validation=0.0))
    with pytest.raises(UsageError, match="A strength is 0 or more"):
        Icv(strength=-0.5)
    with pytest.raises(UsageError, match="strength of this ICV was not chosen"):
        inject(model, InContextVector(Icv(), found.parameters))


# ---------------------------------------------------------------------------------------------------------------- I2CL


def test_its_states_are_those_behind_each_example_read_alone():
    """At the last token of the answer, episode by episode, by torch hooks; they are not trained, coefficients are."""
    model = tiny("qwen2_5_vl")
    found = train(I2cl(), model, EPISODES, training=dataclasses.replace(OPTIONS, speed=5.0))
    learn, _ = split(EPISODES, OPTIONS)
    for branch in ("attention", "mlp"):
        wanted = []
        for layer in model.layers:
            part: Any = layer.self_attn.o_proj if branch == "attention" else layer.mlp  # type: ignore[union-attr]
            seen: list[Tensor] = []
            handle = part.register_forward_hook(lambda _m, _a, o, seen=seen: seen.append(o[0, -1]))
            for episode in learn:
                model.logits(batch_of(model, [alone(episode)]))
            handle.remove()
            wanted.append(torch.stack(seen).mean(0))
        assert moved(found.parameters[f"v_{branch}"], torch.stack(wanted)) < 1e-5
        for name, start in (("lambda", 0.1), ("beta", 1.0)):
            assert 0 < moved(found.parameters[f"{name}_{branch}"], torch.full((model.n_layers,), start)) < 1


def test_training_goes_on_from_its_coefficients():
    model = tiny("qwen2_5_vl")
    first = train(I2cl(), model, EPISODES, training=dataclasses.replace(OPTIONS, speed=5.0))
    again = train(I2cl(), model, EPISODES, training=dataclasses.replace(OPTIONS, speed=1e-9), begin=first)
    for name, value in first.parameters.items():
        assert moved(again.parameters[name], value) < 1e-6


def test_it_scales_what_is_there_and_adds_what_was_left():
    model = tiny("qwen2_5_vl")
    batch = batch_of(model, SHOWN)
    one = vector(I2cl(), model)
    p = one.parameters

    def change(branch: str, layer: int, scale: float) -> Any:
        beta, strength, v = p[f"beta_{branch}"][layer], p[f"lambda_{branch}"][layer], p[f"v_{branch}"][layer]
        return lambda value: (1 - scale) * value + scale * (beta * value + strength * v)

    for scale in (1.0, 0.4):
        hooks = []
        for i, layer in enumerate(model.layers):
            part: Any = layer
            hooks += [
                (part.self_attn.o_proj, False, change("attention", i, scale)),
                (part.mlp, False, change("mlp", i, scale)),
            ]
        found = inject(model, one, scale=scale).logits(batch, logits_to_keep=4)
        assert moved(found, hooked(model, batch, hooks)) < 1e-5
        assert moved(found, model.logits(batch, logits_to_keep=4)) > 1e-2


# ----------------------------------------------------------------------------------------------------------------- MTV


def test_chosen_heads_write_what_they_are_told_and_no_others_do():
    """At the positions that predict the answer, by torch hooks."""
    model = tiny("qwen2_5_vl")
    batch = batch_of(model, SHOWN)
    one = vector(Mtv(), model)
    chosen = one.parameters["chosen"].bool()
    assert 0 < int(chosen.sum()) < chosen.numel()
    rows = torch.zeros(len(batch), batch.length, 1, 1, dtype=torch.bool)
    for row, encoding, pad in zip(rows, batch.encodings, batch.pads, strict=True):
        row[encoding.token_map.answer - 1 + pad] = True

    def change(layer: int, scale: float) -> Any:
        def run(value: Tensor) -> Tensor:
            heads = value.unflatten(2, (model.n_heads, -1))
            told = (1 - scale) * heads + scale * one.parameters["v"][layer]
            return torch.where(rows & chosen[layer][:, None], told, heads).flatten(2)

        return run

    for scale in (1.0, 0.3):
        hooks = [(layer.self_attn.o_proj, True, change(i, scale)) for i, layer in enumerate(model.layers)]  # type: ignore[union-attr]
        found = inject(model, one, scale=scale).logits(batch, logits_to_keep=4)
        assert moved(found, hooked(model, batch, hooks)) < 1e-5
        assert moved(found, model.logits(batch, logits_to_keep=4)) > 1e-3


def test_reinforce_finds_the_heads_that_help(monkeypatch):
    """Planted: the answer is likely when heads 0.1 and 2.3 are chosen and no other."""
    model = tiny("qwen2_5_vl")
    wanted = torch.zeros(model.n_layers, model.n_heads)
    wanted[0, 1] = wanted[2, 3] = 1
    reward = lambda _m, _e, _v, masks, _l: -(masks - wanted).abs().sum((1, 2))  # noqa: E731
    monkeypatch.setattr("probe.vectors.mtv._log_probability", reward)
    found = Mtv(steps=150, samples=16, choices=1).fit(model, EPISODES, training=OPTIONS)
    probabilities = torch.tensor(found.card["fitted"]["probabilities"])
    assert probabilities[wanted.bool()].min() > 0.9
    assert probabilities[~wanted.bool()].max() < 0.1
    assert torch.equal(found.parameters["chosen"], wanted)


def test_choices_in_one_batch_are_the_same_as_one_by_one():
    """Each row of the batch has heads of its own replaced; the first token's probability by an injected model."""
    from probe.vectors.mtv import _log_probability

    model = tiny("qwen2_5_vl")
    one = vector(Mtv(), model)
    masks = (torch.rand(5, model.n_layers, model.n_heads, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    v = one.parameters["v"]
    together = _log_probability(model, EPISODES[0], v, masks, range(model.n_layers))
    encoding = model.encode(alone(EPISODES[0]))
    prompt = model.batch([encoding], with_answer=False)
    for mask, found in zip(masks, together, strict=True):
        steered = inject(model, InContextVector(Mtv(), {"v": v, "chosen": mask}), rows="first")
        wanted = steered.logits(prompt)[0, -1].log_softmax(-1)[int(encoding.ids[encoding.n_prompt])]
        assert float(found) == pytest.approx(float(wanted), abs=1e-4)
    assert float(together.std()) > 1e-3


def test_heads_that_were_not_chosen_are_refused():
    model = tiny("qwen2_5_vl")
    one = vector(Mtv(), model)
    idle = (one.parameters["chosen"] == 0).nonzero().tolist()[0]
    heads = one.method.acting_heads(one.parameters)
    assert tuple(idle) not in heads
    with pytest.raises(
        UsageError, match=f"does not replace {idle[0]}.{idle[1]}; it does {heads[0][0]}.{heads[0][1]}, "
    ):
        inject(model, one, heads=[tuple(idle), heads[0]])
    inject(model, one, heads=heads[:1])


def test_no_head_at_all_is_an_error(monkeypatch):
    monkeypatch.setattr("probe.vectors.mtv._draw", lambda logits, _: torch.zeros_like(logits))
    with pytest.raises(ProbeError, match="chose no head at all"):
        Mtv(steps=0).fit(tiny("qwen2_5_vl"), EPISODES, training=OPTIONS)


def test_the_choice_is_the_best_of_those_that_validate():
    model = tiny("qwen2_5_vl")
    found = METHODS["mtv"].fit(model, EPISODES, training=OPTIONS)
    scores = found.card["fitted"]["by_heads"]
    _, validate = split(EPISODES, OPTIONS)
    queries = batch_of(model, [alone(episode) for episode in validate])
    own = probe.trace.likelihood.answer_log_probability(inject(model, found), queries).mean()
    assert own == pytest.approx(max(scores), abs=1e-3)
    assert len(set(scores)) == len(scores) == 2
    with pytest.raises(UsageError, match="no episodes to choose heads by"):
        Mtv().fit(model, EPISODES, training=dataclasses.replace(OPTIONS, validation=0.0))
    with pytest.raises(UsageError, match="2 samples in each"):
        Mtv(samples=1)
