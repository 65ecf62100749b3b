"""Vectors in one layer: what is read for them, which heads and layers are chosen, and what is put back."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import probe
from probe.data.perturb import perturb
from probe.errors import UsageError
from probe.models.model import Model
from probe.trace.steer import inject
from probe.vectors.function_vector import FunctionVector, indirect_effects, mean_heads_first, written
from probe.vectors.mean import MeanDifference, mean_differences
from probe.vectors.pairs import alone
from probe.vectors.task_vector import TaskVector
from probe.vectors.training import Training, split
from probe.vectors.vector import InContextVector
from tests.test_vectors import batch_of, hooked, moved, tiny
from tests.tiny_families import FAMILIES
from tests.tiny_qwen import make_episode

METHODS: list[Any] = [MeanDifference, TaskVector, FunctionVector]
OPTIONS = Training(validation=0.5, batch_size=3, seed=1)
EPISODES = [make_episode(2, seed=seed) for seed in range(3, 11)]


def own_heads(method: Any) -> dict[str, Any]:
    """The tiny model has 16."""
    return {"heads": 5} if method is FunctionVector else {}


# ----------------------------------------------------------------------------------------------------------------- all


@pytest.mark.parametrize("method", METHODS)
def test_the_layer_is_the_best_of_those_that_validate(method):
    model = tiny("qwen2_5_vl")
    found = method(**own_heads(method)).fit(model, EPISODES, training=OPTIONS)
    each = [
        method(layer=at, **own_heads(method)).fit(model, EPISODES, training=OPTIONS) for at in range(model.n_layers)
    ]
    _, validate = split(EPISODES, OPTIONS)
    queries = batch_of(model, [alone(episode) for episode in validate])
    scores = [probe.trace.likelihood.answer_log_probability(inject(model, one), queries).mean() for one in each]
    assert len(set(scores)) == model.n_layers
    assert found.card["fitted"]["by_layer"] == pytest.approx(scores, abs=1e-3)
    best = max(range(model.n_layers), key=scores.__getitem__)
    assert found.method == each[best].method
    assert torch.equal(found.parameters["v"], each[best].parameters["v"])
    assert found.layers == [best]
    assert found.card["data"]["episodes"] == len(EPISODES)


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_fitted_is_refused(method):
    model = tiny("qwen2_5_vl")
    for layer, training, match in (
        (4, OPTIONS, "layers 0 to 3; asked for 4"),
        (-2, OPTIONS, "asked for -2"),
        (-1, Training(validation=0.0), "choose a layer by"),
    ):
        with pytest.raises(UsageError, match=match):
            method(layer=layer, **own_heads(method)).fit(model, EPISODES, training=training)
    steered = inject(model, InContextVector(TaskVector(layer=0), {"v": torch.zeros(model.text_config.hidden_size)}))
    with pytest.raises(UsageError, match="was steered"):
        method(layer=0).fit(steered, EPISODES)


@pytest.mark.parametrize("method", METHODS)
def test_progress_counts_every_reading(method):
    seen: list[tuple[int, int]] = []
    method(**own_heads(method)).fit(
        tiny("qwen2_5_vl"), EPISODES, training=OPTIONS, progress=lambda *both: seen.append(both)
    )
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == seen[-1][1]
    assert len({total for _, total in seen}) == 1


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_family_can_be_fitted(name, method):
    model = tiny(name)
    images = 0 if name == "llava_onevision" else 1  # alone, a picture is cut into tiles
    episodes = [make_episode(2, seed=seed, images=images) for seed in range(3, 9)]
    last = model.n_layers - 1  # with a window, demonstrations reach no earlier one
    found = method(layer=last, **own_heads(method)).fit(model, episodes, training=OPTIONS)
    batch = batch_of(model, [alone(episodes[0])])
    own = model.logits(batch, logits_to_keep=4)
    assert torch.isfinite(found.parameters["v"]).all()
    assert moved(inject(model, found).logits(batch, logits_to_keep=4), own) > 1e-4
    assert torch.equal(inject(model, found, scale=0.0).logits(batch, logits_to_keep=4), own)


# ----------------------------------------------------------------------------------------------------- mean difference


def test_the_mean_difference_is_the_mean_of_what_hooks_see():
    """Episode by episode without padding, at the last position of the prompt; unequal lengths."""
    model = tiny("qwen2_5_vl")
    episodes = [make_episode(shots, seed=seed) for shots, seed in ((1, 3), (3, 4), (2, 5))]

    def states(episode: Any, site: str) -> Tensor:
        seen: dict[int, Tensor] = {}
        handles = []
        for i, layer in enumerate(model.layers):
            part: Any = {"layer_output": layer, "mlp_output": layer.mlp, "attention_output": layer.self_attn.o_proj}[
                site
            ]  # type: ignore[union-attr]
            handles.append(
                part.register_forward_hook(
                    lambda _m, _a, o, i=i: seen.__setitem__(i, (o[0] if isinstance(o, tuple) else o)[0, -1])
                )
            )
        model.logits(model.batch([model.encode(episode)], with_answer=False))
        for handle in handles:
            handle.remove()
        return torch.stack([seen[i] for i in range(model.n_layers)])

    for site in ("layer_output", "mlp_output", "attention_output"):
        wanted = torch.stack([states(e, site) - states(alone(e), site) for e in episodes]).mean(0)
        for size in (1, 3):
            found = mean_differences(model, episodes, site, size)
            torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
        assert float(wanted.abs().max()) > 0.1


# --------------------------------------------------------------------------------------------------------- task vector


def with_demonstrations(model: Model, episode: Any, layer: int) -> InContextVector:
    """The state of one episode."""
    options = dataclasses.replace(OPTIONS, validation=0.0)
    return TaskVector(layer=layer).fit(model, [episode], training=options)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mllama"])
def test_a_state_in_its_own_place_changes_nothing(name):
    """Bit for bit: read with demonstrations, and put back there."""
    model = tiny(name)
    episode = make_episode(2, seed=4, images=0)
    batch = batch_of(model, [episode])
    own = model.logits(batch, logits_to_keep=4)
    for layer in range(model.n_layers):
        one = with_demonstrations(model, episode, layer)
        assert torch.equal(inject(model, one).logits(batch, logits_to_keep=4), own)
        assert moved(inject(model, one, scale=0.5, rows="all").logits(batch, logits_to_keep=4), own) > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_in_the_last_layer_it_answers_as_the_demonstrations_do(name):
    """The first token's logits without demonstrations become those with them."""
    model = tiny(name)
    episode = make_episode(2, seed=4, images=0 if name == "llava_onevision" else 1)
    one = with_demonstrations(model, episode, model.n_layers - 1)
    with_them, without = (model.batch([model.encode(each)], with_answer=False) for each in (episode, alone(episode)))
    wanted = model.logits(with_them)
    assert moved(model.logits(without), wanted) > 1e-3
    assert moved(inject(model, one).logits(without), wanted) < 1e-5 * float(wanted.abs().max())


def test_a_scale_goes_part_of_the_way():
    model = tiny("qwen2_5_vl")
    batch = batch_of(model, EPISODES[:2])
    one = TaskVector(layer=1).fit(model, EPISODES, training=OPTIONS)
    rows = torch.zeros(len(batch), batch.length, 1, dtype=torch.bool)
    for row, encoding, pad in zip(rows, batch.encodings, batch.pads, strict=True):
        row[pad + encoding.n_prompt - 1] = True

    def change(value: Tensor) -> Tensor:
        return torch.where(rows, 0.7 * value + 0.3 * one.parameters["v"], value)

    by_hand = hooked(model, batch, [(model.layers[1], False, change)])
    found = inject(model, one, scale=0.3).logits(batch, logits_to_keep=4)
    assert moved(found, by_hand) < 1e-5
    assert moved(found, model.logits(batch, logits_to_keep=4)) > 1e-3


# ----------------------------------------------------------------------------------------------------- function vector


@pytest.mark.parametrize("name", FAMILIES)
def test_what_all_heads_write_is_what_their_block_adds(name):
    """Of one prompt, behind the norm where there is one, without the projection's bias."""
    model = tiny(name)
    episode = make_episode(2, seed=4, images=0 if name == "llava_onevision" else 1)
    means = mean_heads_first(model, [episode], 1)
    place = model.encode(episode).n_prompt - 1
    seen: dict[int, Tensor] = {}
    handles = []
    for layer in means:
        block: Any = model.layers[layer]
        after = block.post_attention_layernorm if name == "gemma3" else block.self_attn.o_proj
        handles.append(after.register_forward_hook(lambda _m, _i, o, at=layer: seen.__setitem__(at, o[0, place])))
    model.logits(batch_of(model, [episode]))
    for handle in handles:
        handle.remove()
    for layer, heads in means.items():
        assert heads.shape == (model.n_heads, model.head_dim)
        bias = getattr(model.layers[layer].self_attn.o_proj, "bias", None)  # type: ignore[union-attr]
        wanted = seen[layer] if bias is None else seen[layer] - bias
        found = written(model, layer, heads).sum(0)
        assert float(wanted.abs().max()) > 1e-3
        assert moved(found, wanted.detach().double()) < 1e-5 * max(1.0, float(wanted.abs().max()))


def test_means_and_effects_are_those_that_hooks_see():
    """Episode by episode, without padding, heads replaced by a hook in front of the output projection."""
    model = tiny("qwen2_5_vl")
    own = [make_episode(shots, seed=seed) for shots, seed in ((2, 3), (3, 4), (2, 5))]
    others = perturb([make_episode(shots, seed=seed) for shots, seed in ((3, 6), (2, 7))], "permuted-answers")

    def run(episode: Any, hook: Any, layer: int) -> Tensor:
        part: Any = model.layers[layer].self_attn.o_proj  # type: ignore[union-attr]
        handle = part.register_forward_pre_hook(hook)
        logits = model.logits(model.batch([model.encode(episode)], with_answer=False))[0, -1]
        handle.remove()
        return logits.double().softmax(-1)[first(episode)]

    def first(episode: Any) -> int:
        encoding = model.encode(episode)
        return int(encoding.ids[encoding.n_prompt])

    means: dict[int, Tensor] = {}
    for layer in range(model.n_layers):
        seen: list[Tensor] = []
        for episode in own:
            run(episode, lambda _m, a, seen=seen: seen.append(a[0][0, -1].unflatten(0, (model.n_heads, -1))), layer)
        means[layer] = torch.stack(seen).double().mean(0)
    for size in (1, 3):
        found = mean_heads_first(model, own, size)
        assert max(moved(found[layer], means[layer]) for layer in means) < 1e-5

    def replaced(head: int, mean: Tensor) -> Any:
        def hook(_module: Any, arguments: Any) -> Any:
            value = arguments[0].unflatten(2, (model.n_heads, -1)).clone()
            value[0, -1, head] = mean[head].to(value)
            return (value.flatten(2),)

        return hook

    for size in (1, 2):
        effects = indirect_effects(model, others, means, size)
        assert len(effects) == model.n_layers * model.n_heads
        for layer, head in ((0, 1), (2, 3), (3, 0)):
            by_hand = [run(e, replaced(head, means[layer]), layer) - run(e, lambda *_: None, layer) for e in others]
            assert effects[layer, head] == pytest.approx(float(sum(by_hand)) / 2, abs=1e-6)
    assert max(abs(effect) for effect in effects.values()) > 1e-5


def test_it_is_the_sum_of_what_the_heads_with_the_largest_effects_write(monkeypatch):
    """Planted effects; means come from episodes in which none is measured."""
    model = tiny("qwen2_5_vl")
    measured: list[Any] = []
    planted = {(layer, head): float(head == 2) * (layer + 1) for layer in range(4) for head in range(4)}

    def effects(_model: Any, episodes: Any, *_: Any) -> Any:
        measured.extend(episodes)
        return planted

    monkeypatch.setattr("probe.vectors.function_vector.indirect_effects", effects)
    options = dataclasses.replace(OPTIONS, validation=0.25)
    found = FunctionVector(layer=1, heads=2, prompts=2).fit(model, EPISODES, training=options)
    learn, _ = split(EPISODES, options)
    assert [episode.query.id for episode in measured] == [episode.query.id for episode in learn[-2:]]
    assert all("permuted-answers" in episode.perturbations[-1] for episode in measured)
    means = mean_heads_first(model, learn[:-2], 4)
    wanted = written(model, 3, means[3])[2] + written(model, 2, means[2])[2]
    assert moved(found.parameters["v"], wanted.float()) < 1e-5
    assert found.card["fitted"]["heads"] == [[3, 2, 4.0], [2, 2, 3.0]]
    assert (found.card["fitted"]["mean_episodes"], found.card["fitted"]["effect_episodes"]) == (4, 2)


def test_impossible_function_vectors_are_refused():
    model = tiny("qwen2_5_vl")
    with pytest.raises(UsageError, match=r"has 16 heads that attend to text, and FV was to take 17 .*heads=3"):
        FunctionVector(layer=0, heads=17).fit(model, EPISODES, training=OPTIONS)
    for options in ({"heads": 0}, {"prompts": 0}):
        with pytest.raises(UsageError, match="one head and one prompt, or more"):
            FunctionVector(**options)
    with pytest.raises(UsageError, match="only one to learn from"):
        FunctionVector(layer=0, heads=3).fit(model, EPISODES[:1], training=dataclasses.replace(OPTIONS, validation=0))
    with pytest.raises(UsageError, match="needs two or more"):
        FunctionVector(layer=0, heads=3).fit(model, [make_episode(1, seed=seed) for seed in range(4)], training=OPTIONS)
