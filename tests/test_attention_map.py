"""The attention map against independent implementations: eager attention, plain loops, plain hooks."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import pytest
import torch
import xarray as xr

from probe.data.example import Episode, Example
from probe.errors import ProbeError, UsageError
from probe.experiments import attention_map as experiment
from probe.experiments.attention_map import attention_map
from probe.measures import mass
from probe.models.load import load
from probe.models.token_map import segments_for
from tests.tiny_qwen import make_episode, make_module, make_processor, picture

TOLERANCE = 2e-5

# Query heads, KV heads, hidden size: grouped, one KV head for all, as many as query heads.
HEADS = [(4, 2, 64), (6, 1, 96), (2, 2, 32)]


def models(heads=4, kv=2, hidden=64, seed=0):
    """The same random weights, loaded with the fused kernel and with eager attention."""
    processor = make_processor()
    fused = make_module(processor, seed=seed, num_attention_heads=heads, num_key_value_heads=kv, hidden_size=hidden)
    eager = copy.deepcopy(fused)
    eager.set_attn_implementation("eager")
    return load(fused, processor=processor), eager


def eager_attention(eager, model, episode):
    """``[layer, head, query, key]`` of one episode alone, from transformers' own eager attention."""
    batch = model.batch([model.encode(episode)])
    with torch.no_grad():
        out = eager(**batch.inputs, output_attentions=True, use_cache=False)
    return torch.stack(out.attentions)[:, 0]


EPISODES = [
    make_episode(0, seed=1),
    make_episode(3, seed=2, images=2, sizes=((84, 56), (56, 140))),
    make_episode(1, seed=3, images=0),
    make_episode(4, seed=4, images=3, sizes=((28, 56), (140, 56))),
]


@pytest.mark.parametrize(("heads", "kv", "hidden"), HEADS)
def test_mass_equals_eager_attention(heads, kv, hidden):
    """Every row of a padded batch agrees with eager attention of the episode alone."""
    model, eager = models(heads, kv, hidden)
    result = attention_map(model, EPISODES, rows="all", batch_size=4)
    segments = segments_for(4)
    for number, episode in enumerate(EPISODES):
        weights = eager_attention(eager, model, episode)
        token_map = model.encode(episode).token_map
        index = token_map.segment_index(segments)
        by_segment = torch.stack([weights[..., index == s].sum(-1) for s in range(len(segments))], -1)
        tokens = result["token_mass"][result["token_episode"].values == number].fillna(0)
        np.testing.assert_allclose(
            tokens.transpose("layer", "head", "token", "segment"), by_segment.numpy(), atol=TOLERANCE
        )
        answer = token_map.answer
        rows = {"answer": [answer[0] - 1], "answer_rest": answer[1:] - 1}
        rows |= {f"demo_answer_{i}": token_map.where("answer", i) for i in range(episode.shots)}
        for name, positions in rows.items():
            got = result["mass"].sel(row=name).isel(episode=number).fillna(0)
            if len(positions):
                expected = by_segment[:, :, positions].mean(2)
                np.testing.assert_allclose(got, expected.numpy(), atol=TOLERANCE)
            else:
                assert result["mass"].sel(row=name).isel(episode=number).isnull().all()


def test_contribution_equals_a_plain_loop():
    model, eager = models()
    episode = EPISODES[1]
    result = attention_map(model, [EPISODES[3], episode], batch_size=2)
    weights = eager_attention(eager, model, episode)
    encoding = model.encode(episode)
    values = {}
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda _m, _a, out, i=i: values.__setitem__(i, out[0]))
        for i, layer in enumerate(eager.model.language_model.layers)
    ]
    with torch.no_grad():
        eager(**model.batch([encoding]).inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    row = int(encoding.token_map.answer[0]) - 1
    index = encoding.token_map.segment_index(segments_for(4))
    for layer in range(model.n_layers):
        w_o = model.output_weight(layer).detach()
        for head in range(model.n_heads):
            v = values[layer].view(len(encoding), 2, 16)[:, head // 2]
            for s, label in enumerate(result["segment"].values):
                keys = np.flatnonzero(index == s)
                got = float(result["contribution"].sel(row="answer", segment=label)[1, layer, head])
                if len(keys) == 0:
                    assert np.isnan(got)
                    continue
                z = sum(weights[layer, head, row, key] * v[key] for key in keys)
                expected = float((w_o[:, head * 16 : head * 16 + 16] @ z).norm())
                assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_batched_equals_single():
    model, _ = models()
    together = attention_map(model, EPISODES, rows="all", batch_size=4)
    alone = attention_map(model, EPISODES, rows="all", batch_size=1)
    for name in ("mass", "contribution", "token_mass", "patch_mass"):
        xr.testing.assert_allclose(together[name], alone[name], rtol=0, atol=TOLERANCE)
    for name in ("n_tokens", "n_visible", "n_positions", "prediction", "correct", "thumbnail"):
        xr.testing.assert_identical(together[name], alone[name])
    xr.testing.assert_identical(together["patch_image"], alone["patch_image"])
    xr.testing.assert_identical(together["token_episode"], alone["token_episode"])


def test_mass_is_a_partition_and_counts_fit():
    model, _ = models()
    result = attention_map(model, EPISODES, rows="all")
    there = result["n_positions"] > 0
    sums = result["mass"].sum("segment").where(there)
    assert float(abs(sums - 1).max()) < 1e-6
    lengths = [len(model.encode(episode)) for episode in EPISODES]
    assert result["n_tokens"].sum("segment").values.tolist() == lengths
    assert result.sizes["token"] == sum(lengths)
    # The row that predicts the answer sees everything but the answer itself.
    answer = result["n_visible"].sel(row="answer")
    assert (answer.sel(segment="query/answer") == 0).all()
    seen = result["n_tokens"].where(result["segment"] != "query/answer", 0)
    assert (answer == seen).all()


def test_missing_is_missing_and_not_zero():
    """An episode without images has no visual mass at all; one without the third demonstration lacks it."""
    model, _ = models()
    result = attention_map(model, EPISODES)
    no_images = result.isel(episode=2)
    visual = no_images["mass"].sel(segment=no_images["modality"] == "visual", row="answer")
    assert visual.isnull().all()
    assert (no_images["n_tokens"].sel(segment=no_images["modality"] == "visual") == 0).all()
    assert result["mass"].isel(episode=0).sel(segment="demo0/question", row="answer").isnull().all()


def test_padding_gets_exactly_nothing():
    from probe.trace.read import read

    model, _ = models()
    batch = model.batch([model.encode(e) for e in EPISODES])
    assert max(batch.pads) > 50
    index = torch.tensor([[1] * pad + [0] * (batch.length - pad) for pad in batch.pads])
    segments = mass.one_hot_segments(index, 2)
    last = torch.full((len(batch), 1), batch.length - 1)

    def reduce(values):
        a = values.attention
        row = mass.row_attention(a.q, a.k, a.mask, a.scale, a.causal, last)
        every = mass.all_rows_mass(a.q, a.k, segments, a.mask, a.scale, a.causal)
        return {"row": mass.segment_mass(row, segments)[..., 1], "all": every[:, :, -1, 1]}

    for values in read(model, batch, ("attention",), reduce).layers.values():
        assert (values["row"] == 0).all()
        assert (values["all"] == 0).all()


def test_patch_mass_lies_on_the_right_patches():
    """Attention on each image token, with its place in a grid that is not square."""
    model, eager = models()
    result = attention_map(model, EPISODES, overlay_episodes=4)
    for image in range(result.sizes["image"]):
        of_image = result.isel(patch=result["patch_image"].values == image)
        number = int(result["image_episode"][image])
        token_map = model.encode(EPISODES[number]).token_map
        earlier = int((result["image_episode"].values[:image] == number).sum())
        at = np.flatnonzero(token_map.image == earlier)
        weights = eager_attention(eager, model, EPISODES[number])[:, :, int(token_map.answer[0]) - 1]
        np.testing.assert_allclose(of_image["patch_mass"], weights[:, :, at], atol=TOLERANCE)
        rows, columns = int(result["image_rows"][image]), int(result["image_columns"][image])
        order = of_image["patch_row"].values * columns + of_image["patch_column"].values
        assert order.tolist() == list(range(rows * columns))
        tall = int(result["thumbnail_height"][image]) > int(result["thumbnail_width"][image])
        assert tall == (rows > columns)


def test_a_wrong_recording_is_refused(monkeypatch):
    """If q, k, v do not give back the head outputs, nothing is reported."""
    model, _ = models()
    true = mass.row_attention
    monkeypatch.setattr(mass, "row_attention", lambda q, *rest: true(q * 1.001, *rest))
    with pytest.raises(ProbeError, match=r"cannot be rebuilt.*episode episode[12], layer \d is off"):
        attention_map(model, EPISODES[:2])


def test_layers_can_be_chosen():
    model, _ = models()
    full = attention_map(model, EPISODES[:2])
    part = attention_map(model, EPISODES[:2], layers=[2, 0])
    assert part["layer"].values.tolist() == [0, 2]
    xr.testing.assert_identical(part["mass"], full["mass"].sel(layer=[0, 2]))
    with pytest.raises(UsageError, match="layers 0 to 2; asked for 3, -1"):
        attention_map(model, EPISODES[:2], layers=[3, -1])


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16"), (torch.float64, "float64")]
)
def test_other_precisions_pass_their_own_bound(dtype, name):
    processor = make_processor()
    model = load(make_module(processor).to(dtype), processor=processor)
    result = attention_map(model, EPISODES[:3], rows="all")
    assert result.attrs["dtype"] == name
    assert float(result["residual"].max()) < result.attrs["residual_bound"]
    assert result["mass"].dtype == np.float32


def test_parts_are_reused():
    """A part that is kept is not computed again, and joining parts gives the same as one piece."""
    model, _ = models()
    kept: dict[str, xr.Dataset] = {}
    computed = []

    def keep(name, compute):
        if name not in kept:
            kept[name] = compute()
            computed.append(name)
        return kept[name]

    first = attention_map(model, EPISODES, batch_size=2, keep=keep, overlay_episodes=3)
    again = attention_map(model, EPISODES, batch_size=2, keep=keep, overlay_episodes=3)
    assert [name[:6] for name in computed] == ["000000", "000002"]
    others = attention_map(model, EPISODES[::-1], batch_size=2, keep=keep, overlay_episodes=3)
    assert len(computed) == 4 and others["episode"].values.tolist() == [episode.id for episode in EPISODES[::-1]]
    attention_map(model, EPISODES, batch_size=2, keep=keep, overlay_episodes=3, layers=[1])
    assert len(computed) == 6  # read otherwise
    xr.testing.assert_identical(first, again)
    xr.testing.assert_allclose(first, attention_map(model, EPISODES, overlay_episodes=3), atol=TOLERANCE)


def test_impossible_requests_are_refused():
    model, _ = models()
    with pytest.raises(UsageError, match="no episodes"):
        attention_map(model, [])
    with pytest.raises(UsageError, match="same id"):
        attention_map(model, [EPISODES[0], EPISODES[0]])
    with pytest.raises(UsageError, match="did you mean demo-answers"):
        inspect.unwrap(attention_map)(model, EPISODES, rows="demo-answer")  # past the checked types of the tests


def test_correct_follows_the_models_own_answer():
    """The gold answer is set to what the model says, and then to something else."""
    model, _ = models()
    example = Example("x", (picture(5),), "What colour is the cat?", ("red",))
    said = attention_map(model, [Episode("e", (), example)], max_new_tokens=4)["prediction"].item()
    right = Example("x", (picture(5),), "What colour is the cat?", ("nothing like it", said))
    result = attention_map(model, [Episode("e", (), right), Episode("f", (), example)], max_new_tokens=4)
    assert result["correct"].values.tolist() == [1, 0]


def test_uniform_attention_has_lift_one_in_every_row():
    """Queries and keys of zero attend alike to all they see, in rows of several positions too."""
    from probe.segments import density, lift

    processor = make_processor()
    module = make_module(processor)
    with torch.no_grad():
        for layer in module.model.language_model.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                part.weight.zero_()
                part.bias.zero_()
    result = attention_map(load(module, processor=processor), EPISODES, rows="demo-answers")
    values = lift(result)
    seen = (result["visible_share"] > 0) & result["mass"].notnull()
    assert float(result["n_positions"].max()) > 3
    np.testing.assert_allclose(values.where(seen, 1), 1, atol=1e-5)
    assert values.where(~seen).isnull().all()
    rows = result.sel(row="answer")
    expected = 1 / rows["n_visible"].sum("segment")
    per_token = density(rows)
    np.testing.assert_allclose((per_token / expected).where(per_token.notnull(), 1), 1, atol=1e-5)


def test_words_count_as_often_as_they_are_read():
    """One unknown question on every example is most of what is read, however many answers are known."""
    model = load("toy")
    questions = [
        Example(f"{i}", (), "what on earth is this supposed to be", (word,))
        for i, word in enumerate(("red", "blue", "one"))
    ]
    episodes = [Episode(example.id, tuple(questions[:1]), example) for example in questions]
    unknown, words = model.unknown_words(episodes)
    assert words == 6 * 9
    assert unknown / words > 0.4
    with pytest.raises(UsageError, match="unknown to toy"):
        attention_map(model, episodes)


def test_a_long_answer_is_not_cut():
    """The limit follows the longest answer that could be accepted."""
    model, _ = models()
    answer = "a small brown cat with a long tail on the table " * 3
    result = attention_map(
        model, [Episode("e", (), Example("x", (), "Which animal is this?", ("red", answer.strip())))]
    )
    assert result.attrs["max_new_tokens"] == 8 + len(model.tokenizer(answer.strip())["input_ids"])


def test_a_part_of_another_precision_is_refused():
    """What an interrupted run left behind is checked like what is new."""
    model, _ = models()

    def keep(name, compute):
        part = compute()
        return part.assign(residual=part["residual"] + (3e-3 if name.startswith("000000") else 0))

    # The two of the first batch are off alike, but for rounding.
    with pytest.raises(ProbeError, match=r"cannot be rebuilt.*episode episode[12],"):
        attention_map(model, EPISODES, batch_size=2, keep=keep)


def test_too_little_memory_and_impossible_images_are_sentences(monkeypatch):
    model, _ = models()
    thin = Episode("thin", (), Example("x", (picture(1, (600, 2)),), "What colour is the cat?", ("red",)))
    with pytest.raises(ProbeError, match=r"Episode thin: the image processor .* \(600, 2\)"):
        attention_map(model, [thin])

    def no_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(experiment, "_measure", no_memory)
    with pytest.raises(ProbeError, match="batch of 2 does not fit"):
        attention_map(model, EPISODES[:3], batch_size=2)


def test_overflow_is_reported_and_not_averaged():
    """Values beyond float16 make a head's output infinite: the command says where, whatever the other episodes give."""
    processor = make_processor()
    module = make_module(processor)
    with torch.no_grad():
        module.model.language_model.layers[1].self_attn.v_proj.bias.fill_(60000.0)
        module.model.language_model.layers[1].self_attn.v_proj.weight.mul_(1e4)
    model = load(module.half(), processor=processor)
    with pytest.raises(ProbeError, match=r"layer 1: what the model computes there is not finite in torch\.float16"):
        attention_map(model, EPISODES)
