"""The oracle: demonstrations put back as mu and SA_D of every head and row give the forward that reads them."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from probe.errors import ProbeError, UsageError
from probe.measures.mass import row_attention
from probe.measures.shift import split_attention
from probe.models.load import load
from probe.models.token_map import MODALITY_OF_ROLE, ROLES, parse_selection
from probe.trace.ablate import hide_keys
from probe.trace.edit import Edit
from probe.trace.generate import generate
from probe.trace.likelihood import answer_log_probability
from probe.trace.read import read
from probe.trace.steer import inject
from probe.vectors import lookup, shifts
from probe.vectors.oracle import Oracle, read_oracle
from probe.vectors.pairs import alone, encode_pair
from probe.vectors.shift_means import means_of
from probe.vectors.shifts import MODALITIES, NOTHING
from tests.tiny_families import MODEL_TYPES, build
from tests.tiny_qwen import make_episode, make_module, make_processor

SIZES = ((84, 56), (56, 84), (40, 40), (120, 30))
UNLIKE = (
    make_episode(3, seed=2, images=2),
    make_episode(1, seed=3, sizes=SIZES),
    make_episode(2, seed=6, sizes=SIZES),
    make_episode(2, seed=9, images=0),
)
ALIKE = (make_episode(2, seed=7, sizes=SIZES), make_episode(2, seed=8, sizes=SIZES))
# One image makes more tokens by itself than among others: only queries of several have the same tokens either way.
SEVERAL = (make_episode(2, seed=2, images=2, sizes=SIZES), make_episode(1, seed=3, images=2))
FITTING = {"mllama": ALIKE, "llava_onevision": SEVERAL}
ROUNDING = 2e-5  # of the largest logit; most are below 3e-6

SHARED_SINK = {"qwen2_vl", "qwen2_5_vl", "llava", "llava_next", "idefics", "idefics2", "idefics3", "smolvlm", "gemma3"}
"""Families whose template writes something before the first turn, which then stands further away in context."""


@cache
def model_of(kind="qwen2_5_vl", **text):
    tiny = build(kind, **text)
    return load(tiny.module, processor=tiny.processor)


@cache
def read_of(kind="qwen2_5_vl", by_modality=False):
    return read_oracle(model_of(kind), FITTING.get(kind, UNLIKE), by_modality=by_modality)


def both(model, episodes):
    """The batches of teachers and students, and how many positions predict the longest answer."""
    pairs = [encode_pair(model, episode) for episode in episodes]
    keep = 1 + max(len(pair.student) - pair.student.n_prompt for pair in pairs)
    return model.batch([p.teacher for p in pairs]), model.batch([p.student for p in pairs]), keep


def distance(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def errors(model, oracle, episodes):
    """How far from the teacher's logits: the student, under the oracle where it stands, and in context."""
    teacher, student, keep = both(model, episodes)
    wanted = read(model, teacher, logits_to_keep=keep).logits
    batches = (student, ()), (student, oracle.edits()), (oracle.as_in_context(student), oracle.edits())
    return [distance(read(model, batch, edits=edits, logits_to_keep=keep).logits, wanted) for batch, edits in batches]


# --- Exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODEL_TYPES)
@pytest.mark.parametrize("by_modality", [False, True])
def test_the_oracle_turns_zero_shot_into_in_context(kind, by_modality):
    """Batches of unequal lengths, with padding, several images and (where they may be mixed) none."""
    model, oracle = model_of(kind), read_of(kind, by_modality)
    zero_shot, where_it_stands, in_context = errors(model, oracle, FITTING.get(kind, UNLIKE))
    assert in_context < ROUNDING
    assert zero_shot > 0.1
    if kind in SHARED_SINK:
        assert where_it_stands > 100 * ROUNDING


def test_without_a_shared_sink_positions_play_no_part():
    """Identity 5c: rotary positions are relative, and nothing but the query is left."""
    for kind in ("qwen3_vl", "internvl"):
        assert errors(model_of(kind), read_of(kind), UNLIKE)[1] < 2 * ROUNDING


def test_in_double_precision_to_its_rounding(monkeypatch):
    """With norms and rotations in double precision too: transformers has them in float32 whatever the weights are."""

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def rotation(self, x, position_ids):
        angles = position_ids.expand(3, -1, -1)[..., None].double() * self.inv_freq.double()
        return tuple(self.recomposition_frequencies(part) for part in (angles.cos(), angles.sin()))

    monkeypatch.setattr(modeling_qwen2_5_vl.Qwen2_5_VLRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_qwen2_5_vl.Qwen2_5_VLRotaryEmbedding, "forward", rotation)
    processor = make_processor()
    model = load(make_module(processor).double(), processor=processor)
    episodes = [make_episode(3, seed=2, images=0), make_episode(1, seed=3, images=0)]
    oracle = read_oracle(model, episodes)
    zero_shot, where_it_stands, in_context = errors(model, oracle, episodes)
    assert in_context < 1e-12
    assert min(zero_shot, where_it_stands) > 1e-2


@pytest.mark.parametrize("kind", ["gemma3", "llava_next"])
def test_where_demonstrations_push_keys_out_of_a_window(kind, monkeypatch):
    model = model_of(kind, **({} if kind == "gemma3" else {"sliding_window": 8}))
    oracle = read_oracle(model, UNLIKE)
    teacher_sees = oracle.lookups["episode3"].shifts["text", 0].first
    assert int(teacher_sees.max()) > 0  # some row has lost the sink
    assert errors(model, oracle, UNLIKE)[2] < ROUNDING
    monkeypatch.setattr("probe.vectors.oracle.output_alone", lambda value, context, own: value)
    assert errors(model, oracle, UNLIKE)[2] > 100 * ROUNDING


@pytest.mark.parametrize("kind", ["idefics", "mllama"])
def test_cross_attention_of_text_before_the_querys_image_is_put_back(kind):
    """It looked at a demonstration's image, and without the oracle's gate and its edits it looks at none."""
    model = model_of(kind)
    oracle = read_oracle(model, ALIKE)
    teacher, student, keep = both(model, ALIKE)
    wanted = read(model, teacher, logits_to_keep=keep).logits
    whole, batch = oracle.edits(), oracle.as_in_context(student)
    places_only = dataclasses.replace(student, inputs={**student.inputs, "position_ids": batch.inputs["position_ids"]})
    of_text = [edit for edit in whole if edit.axis == "text"]
    for edits, inputs in ((of_text, batch), (whole, places_only), (of_text, places_only)):
        assert distance(read(model, inputs, edits=edits, logits_to_keep=keep).logits, wanted) > 100 * ROUNDING
    some = [shifts for (axis, _), shifts in oracle.lookups["episode7"].shifts.items() if axis == "vision"]
    assert some
    for each in some:  # once its own image stands there, text looks at no other
        odds, _ = each.joined([0])
        assert (odds[:, -3:] == NOTHING).all()
        assert (odds == float("inf")).any()


@pytest.mark.parametrize("kind", ["idefics", "mllama"])
def test_where_the_images_that_were_looked_at_are_left_out_nothing_is_written(kind):
    model = model_of(kind)
    oracle = dataclasses.replace(read_oracle(model, ALIKE, by_modality=True), modalities=("textual",))
    _, student, _ = both(model, ALIKE)
    edit = next(edit for edit in oracle.edits() if edit.axis == "vision")
    seen = {}

    def look(value, context):
        seen["own"], seen["new"] = value, edit.fn(value, context)
        return value

    read(model, oracle.as_in_context(student), edits=[Edit("heads", edit.layer, look, "vision")])
    for b, (encoding, pad) in enumerate(zip(student.encodings, student.pads, strict=True)):
        blind = (oracle.lookups[encoding.episode].shifts["vision", edit.layer].log_rest == NOTHING)[0]
        assert blind.any()
        assert not seen["new"][b, pad:][blind].any()
        assert seen["own"][b, pad:][blind].any()
        assert torch.equal(seen["new"][b, pad:][~blind], seen["own"][b, pad:][~blind])


@pytest.mark.parametrize("kind", ["idefics", "mllama"])
def test_a_query_without_an_image_is_refused_where_images_are_looked_at(kind):
    episode = make_episode(2, seed=4)
    text_only = dataclasses.replace(episode, query=dataclasses.replace(episode.query, images=()))
    tiny = build(kind)
    model = load(tiny.module, processor=tiny.processor, prompt="mimic")
    with pytest.raises(UsageError, match="nowhere to put it back"):
        read_oracle(model, [text_only])
    words = make_episode(2, seed=5, images=0)
    assert errors(model, read_oracle(model, [words]), [words])[2] < ROUNDING


def test_an_image_that_is_read_otherwise_alone_is_refused():
    with pytest.raises(ProbeError, match="other tokens"):
        read_oracle(model_of("llava_onevision"), [make_episode(1, seed=3)])


def test_the_sink_is_no_demonstration(monkeypatch):
    """Facts, identity 5: with the sink among D, the student's own keys are not those of Q."""
    original = shifts._keys

    def with_sink(pair, axis, name, pad, width):
        found = original(pair, axis, name, pad, width)
        found[pad] = name != "rest"
        return found

    monkeypatch.setattr(shifts, "_keys", with_sink)
    model = model_of()
    oracle = read_oracle(model, UNLIKE)
    with pytest.raises(ProbeError, match="other keys without demonstrations"):
        errors(model, oracle, UNLIKE)


def test_answers_are_as_probable_as_in_context():
    model, oracle = model_of(), read_of()
    teacher, student, _ = both(model, UNLIKE)
    wanted = answer_log_probability(model, teacher)
    found = answer_log_probability(model, oracle.as_in_context(student), oracle.edits())
    assert np.abs(found - wanted).max() < 1e-4
    assert np.abs(answer_log_probability(model, student) - wanted).min() > 1e-2
    steered = inject(model, oracle)
    assert steered.name.endswith("+ oracle")
    assert np.abs(answer_log_probability(steered, oracle.as_in_context(student)) - wanted).max() < 1e-4


# --- What is read ----------------------------------------------------------------------------------------------------


def teacher_attention(layer, episode):
    """Attention of one teacher, unpadded: rows of the softmax ``[head, n, n]``, q, k, v, and the heads' outputs."""
    model = model_of()
    pair = encode_pair(model, episode)
    found = {}

    def keep(values):
        if values.layer == layer:
            found["at"], found["heads"] = values.attention, values.heads
        return {}

    read(model, model.batch([pair.teacher]), ("attention", "heads"), keep)
    at = found["at"]
    rows = torch.arange(at.q.shape[2])[None]
    return pair, at, row_attention(at.q, at.k, at.mask, at.scale, at.causal, rows), found["heads"]


@pytest.mark.parametrize("layer", [0, 2])
def test_what_is_read_is_what_the_split_of_the_shift_map_gives(layer):
    """Against another implementation, on probabilities and not on logits; and log Z against a sum by hand."""
    for episode in UNLIKE:
        pair, at, attention, _ = teacher_attention(layer, episode)
        kept = torch.from_numpy(pair.kept)
        rest = torch.zeros(1, len(pair.teacher), dtype=torch.bool)
        rest[0, kept] = True
        split = split_attention(attention[:, :, kept], at.v, ~rest, rest)
        own = read_of().lookups[episode.id].shifts["text", layer]
        odds, outputs = own.joined([0])
        seen = odds > NOTHING
        assert torch.equal(seen, split.mu[0] > 0)
        assert seen.any()
        assert not seen.all()
        assert (odds.sigmoid() - split.mu[0]).abs().max() < 1e-5
        assert (outputs - split.of_demonstrations[0])[seen].abs().max() < 1e-4
        assert (own.rest - split.of_rest[0]).abs().max() < 1e-4
        row, head = int(kept[-1]), 1
        k = at.k[0, head // 2]
        by_hand = (at.scale * at.q[0, head, row] @ k[~rest[0]].T).exp().sum().log()
        assert own.log_mass[0, head, -1] + own.log_total[head, -1] == pytest.approx(float(by_hand), abs=1e-4)


@pytest.mark.parametrize("name", MODALITIES)
def test_a_modality_alone_is_what_a_knockout_of_the_others_leaves(name):
    """``SA_Q + mu_m (SA_m - SA_Q)``: the same q, k and v with the demonstrations' other keys hidden."""
    others = [role for role in ROLES if MODALITY_OF_ROLE[role] not in (name, "sink") and role != "template"]
    hidden = "+".join(f"demos/{role}" for role in others)
    oracle = dataclasses.replace(read_of(by_modality=True), modalities=(name,))
    parts = shifts.choose_parts((name,), oracle.parts)
    for episode in UNLIKE[:3]:
        model = model_of()
        pair = encode_pair(model, episode)
        found = {}

        def look(value, context, found=found):
            found["z"] = hide_keys([1], hidden, "query")[0].fn(value, context)
            return value

        read(model, model.batch([pair.teacher]), edits=[Edit("heads", 1, look)])
        own = oracle.lookups[episode.id].shifts["text", 1]
        odds, target = own.joined(parts)
        mu = odds.sigmoid()[..., None]
        rebuilt = (own.rest + mu * (target - own.rest)).transpose(0, 1)
        prompt = pair.query[pair.query < pair.student.n_prompt]
        wanted = found["z"][0, pair.kept[prompt]]
        assert (rebuilt[prompt] - wanted).abs().max() < 1e-4
        assert (own.rebuilt.transpose(0, 1)[prompt] - wanted).abs().max() > 1e-2


def test_parts_that_do_not_add_up_are_refused(monkeypatch):
    original = shifts._keys
    monkeypatch.setattr(shifts, "_keys", lambda *a: original(*a) & (torch.arange(a[-1]) % 7 > 0))
    with pytest.raises(ProbeError, match="is off by"):
        read_oracle(model_of(), UNLIKE)


def test_few_rows_at_a_time_give_the_same(monkeypatch):
    whole = read_of()
    monkeypatch.setattr(shifts, "SCORES", 4 * 4 * 1000)  # some rows of four heads in four episodes
    again = read_oracle(model_of(), UNLIKE)
    for name, known in whole.lookups.items():
        for place, own in known.shifts.items():
            for field in dataclasses.fields(own):
                a, b = (getattr(x, field.name) for x in (own, again.lookups[name].shifts[place]))
                assert torch.allclose(a, b, atol=1e-5), (place, field.name)


# --- Batches, rows, heads --------------------------------------------------------------------------------------------


def test_any_batch_of_its_episodes_is_served():
    model, oracle = model_of(), read_of()
    _, whole, _ = both(model, UNLIKE)
    together = read(model, oracle.as_in_context(whole), edits=oracle.edits()).logits[:, -1]
    for order in ([2, 0], [1], [3, 1, 2]):
        batch = model.batch([whole.encodings[i] for i in order])
        apart = read(model, oracle.as_in_context(batch), edits=oracle.edits()).logits[:, -1]
        for i, row in zip(order, apart, strict=True):
            assert distance(row, together[i]) < ROUNDING


@pytest.mark.parametrize("beams", [1, 3])
def test_one_token_can_be_generated_and_no_second(beams):
    model, oracle = model_of(), read_of()
    teacher, student, _ = both(model, UNLIKE)
    prompts = model.batch(student.encodings, with_answer=False)
    said = generate(model, oracle.as_in_context(prompts), max_new_tokens=1, num_beams=beams, edits=oracle.edits())
    in_context = model.batch(teacher.encodings, with_answer=False)
    assert said == model.generate(in_context, max_new_tokens=1, num_beams=beams)
    assert said != model.generate(prompts, max_new_tokens=1, num_beams=beams)
    with pytest.raises(UsageError, match="nothing of what is generated"):
        generate(model, prompts, max_new_tokens=2, num_beams=beams, edits=oracle.edits())


def test_rows_that_see_no_demonstration_keep_every_bit():
    model, oracle = model_of(), read_of()
    _, student, _ = both(model, UNLIKE)
    for edit in oracle.edits():
        changed = {}

        def look(value, context, edit=edit, changed=changed):
            changed["rows"] = (edit.fn(value, context) != value).any(-1).any(-1)
            return value

        read(model, student, edits=[Edit("heads", edit.layer, look)])
        for row, encoding, pad in zip(changed["rows"], student.encodings, student.pads, strict=True):
            asked = torch.from_numpy(parse_selection("query").of(encoding.token_map))
            assert torch.equal(row[pad:], asked)
            assert not row[:pad].any()


def test_scale_layers_heads_and_rows_say_where():
    model, oracle = model_of(), read_of()
    _, student, _ = both(model, UNLIKE)
    batch = oracle.as_in_context(student)
    plain = read(model, batch).logits
    assert torch.equal(read(model, batch, edits=oracle.edits(scale=0)).logits, plain)
    assert [edit.layer for edit in oracle.edits(layers=[2])] == [2]
    half, whole = {}, {}

    def look(store, **options):
        edit = oracle.edits(**options)[0]

        def fn(value, context):
            store["own"], store["new"] = value, edit.fn(value, context)
            return value

        read(model, batch, edits=[Edit("heads", edit.layer, fn)])
        return store["new"] - store["own"]

    d = look(whole, layers=[1])
    assert torch.allclose(look(half, layers=[1], scale=0.5), d / 2, atol=1e-5)
    one = look({}, heads=[(1, 2)])
    assert torch.equal(one[:, :, 2], d[:, :, 2])
    assert not one[:, :, [0, 1, 3]].any()
    first = look({}, layers=[1], rows="first")
    for b, (encoding, pad) in enumerate(zip(student.encodings, student.pads, strict=True)):
        place = pad + encoding.n_prompt - 1
        assert torch.equal(first[b, place], d[b, place])
        first[b, place] = 0
    assert not first.any()


# --- Ablations -------------------------------------------------------------------------------------------------------


def rows_of(oracle, half, layer, head, parts):
    """mu and d of every row of one half that sees demonstrations, by hand."""
    mus, ds = [], []
    for known in [each for each in oracle.lookups.values() if each.half == half]:
        own = known.shifts["text", layer]
        z = own.log_mass[parts, head].exp().double()
        for row in range(z.shape[1]):
            if z[:, row].sum() > 0:
                total, rest = z[:, row].sum(), own.log_rest[head, row].exp().double()
                target = (z[:, row, None] * own.outputs[parts, head, row].double()).sum(0) / total
                mus.append(total / (total + rest))
                ds.append(target - own.rest[head, row].double())
    return torch.stack(mus), torch.stack(ds)


CHOICES = [
    {"mu": "mean"},
    {"shift": "mean"},
    {"mu": "mean", "shift": "mean"},
    {"shift": "direction"},
    {"shift": "size"},
    {"modalities": ("textual",), "shift": "mean"},
    {"modalities": ("visual", "structural"), "mu": "mean"},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_an_ablation_is_what_its_table_says(choice):
    """In one layer, row by row, with means by hand over the other half."""
    model, oracle = model_of(), dataclasses.replace(read_of(by_modality=True), **choice)
    _, student, _ = both(model, UNLIKE)
    layer, head = 1, 3
    parts = [i for i, name in enumerate(MODALITIES) if name in choice.get("modalities", MODALITIES)]
    seen = {}

    def look(value, context):
        seen["own"], seen["new"] = value, oracle.edits(layers=[layer])[0].fn(value, context)
        return value

    read(model, oracle.as_in_context(student), edits=[Edit("heads", layer, look)])
    for b, (encoding, pad) in enumerate(zip(student.encodings, student.pads, strict=True)):
        known = oracle.lookups[encoding.episode]
        mus, ds = rows_of(oracle, 1 - known.half, layer, head, parts)
        square, lengths = mus.square(), ds.norm(dim=1)
        own = known.shifts["text", layer]
        z = own.log_mass[parts, head].exp().double()
        for row in range(len(encoding)):
            before, after = seen["own"][b, pad + row, head].double(), seen["new"][b, pad + row, head].double()
            if z[:, row].sum() == 0:
                assert torch.equal(before, after)
                continue
            target = (z[:, row, None] * own.outputs[parts, head, row].double()).sum(0) / z[:, row].sum()
            d = target - before
            mu = z[:, row].sum() / (z[:, row].sum() + own.log_rest[head, row].exp().double())
            if choice.get("mu") == "mean":
                mu = mus.mean()
            if choice.get("shift") == "mean":
                d = (square[:, None] * ds).sum(0) / square.sum()
            elif choice.get("shift") == "direction":
                d = d / d.norm() * (square * lengths).sum() / square.sum()
            elif choice.get("shift") == "size":
                u = (square[:, None] * lengths[:, None] * ds).sum(0)
                d = d.norm() * u / u.norm()
            assert (after - before - mu * d).abs().max() < 1e-4


def test_means_leave_least():
    """Each is the minimum of its sum of squares: no slope there, and not above that of nothing."""
    oracle = read_of()
    for head in range(4):
        mus, ds = rows_of(oracle, 0, 2, head, [0])
        of_half = [x.shifts["text", 2] for x in oracle.lookups.values() if x.half == 0]
        mean = means_of(of_half, [0])
        v = mean.shift[head].clone().requires_grad_()
        loss = (mus[:, None] * (ds - v)).square().sum()
        (slope,) = torch.autograd.grad(loss, v)
        assert slope.abs().max() < 1e-8 * loss
        assert loss < (mus[:, None] * ds).square().sum()
        units = ds / ds.norm(dim=1, keepdim=True)
        s = mean.length[head].clone().requires_grad_()
        loss = (mus[:, None] * (ds - s * units)).square().sum()
        assert torch.autograd.grad(loss, s)[0].abs() < 1e-8 * loss
        u = mean.direction[head].clone().requires_grad_()
        loss = (mus[:, None] * (ds - ds.norm(dim=1, keepdim=True) * u / u.norm())).square().sum()
        assert torch.autograd.grad(loss, u)[0].abs().max() < 1e-8 * loss
        assert float(u.detach().norm()) == pytest.approx(1)
        assert float(mean.mu[head]) == pytest.approx(float(mus.mean()))


def test_means_are_of_the_other_half():
    """What an episode's own half did plays no part."""
    model, oracle = model_of(), dataclasses.replace(read_of(), mu="mean", shift="mean")
    _, student, _ = both(model, UNLIKE)
    before = read(model, student, edits=oracle.edits()).logits[:, -1]
    first = next(iter(oracle.lookups))
    known = oracle.lookups[first]
    other = {
        place: dataclasses.replace(own, outputs=own.outputs + 1, rest=own.rest - 1)
        for place, own in known.shifts.items()
    }
    changed = dataclasses.replace(oracle, lookups={**oracle.lookups, first: dataclasses.replace(known, shifts=other)})
    after = read(model, student, edits=changed.edits()).logits[:, -1]
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [True, False, True, False]


def test_every_choice_moves_away_from_exactness():
    model = model_of()
    teacher, student, keep = both(model, UNLIKE)
    wanted = read(model, teacher, logits_to_keep=keep).logits
    for choice in CHOICES:
        oracle = dataclasses.replace(read_of(by_modality=True), **choice)
        found = read(model, oracle.as_in_context(student), edits=oracle.edits(), logits_to_keep=keep).logits
        assert torch.isfinite(found).all()
        assert distance(found, wanted) > 1e-2, choice


# --- Refusals --------------------------------------------------------------------------------------------------------


def test_what_the_oracle_has_not_read_is_refused():
    model, oracle = model_of(), read_of()
    _, student, _ = both(model, UNLIKE)
    stranger = make_episode(0, seed=77)
    cases = [
        (model.encode(stranger), "has not read episode episode77"),
        (model.encode(UNLIKE[0]), "other tokens than the query"),
        (model.encode_answers(alone(UNLIKE[0]), ["another"])[0], "other tokens than the query"),
    ]
    for encoding, message in cases:
        batch = model.batch([student.encodings[1], encoding])
        with pytest.raises(UsageError, match=message):
            oracle.as_in_context(batch)
        with pytest.raises(UsageError, match=message):
            read(model, batch, edits=oracle.edits())
    # Of a prompt that stops before it, the answer plays no part.
    read(model, model.batch([cases[2][0]], with_answer=False), edits=oracle.edits())


def test_what_cannot_be_read_is_refused():
    model = model_of()
    for episodes, message in (
        ([], "no episodes"),
        ([UNLIKE[0], UNLIKE[0]], "Two episodes are called"),
        ([make_episode(0, seed=1)], "no demonstrations"),
    ):
        for batch_size in (1, 16):
            with pytest.raises(UsageError, match=message):
                read_oracle(model, episodes, batch_size=batch_size)
    with pytest.raises(UsageError, match="as it is"):
        read_oracle(inject(model, read_of()), UNLIKE)
    with pytest.raises(UsageError, match="another model"):
        inject(model_of("qwen2_vl"), read_of())


def test_options_that_mean_nothing_are_refused():
    oracle = read_of()
    for wrong, message in (
        ({"mu": "none"}, "no mu 'none'"),
        ({"shift": "length"}, "no shift 'length'"),
        ({"modalities": ("image",)}, "no 'image' keys"),
        ({"modalities": ("visual",)}, "by_modality=True"),
    ):
        with pytest.raises(UsageError, match=message):
            dataclasses.replace(oracle, **wrong)
    for options, message in (
        ({"layers": [9]}, "asked for 9"),
        ({"heads": [(0, 9)]}, "asked for 0.9"),
        ({"layers": []}, "no layer or head"),
        ({"heads": []}, "no layer or head"),
    ):
        with pytest.raises(UsageError, match=message):
            oracle.edits(**options)
    single = Oracle({"episode2": oracle.lookups["episode2"]}, oracle.facts, oracle.parts, mu="mean")
    with pytest.raises(UsageError, match="two episodes or more"):
        single.edits()
    assert dataclasses.replace(read_of(by_modality=True), shift="mean", modalities=("visual",)).label == (
        "oracle shift=mean visual"
    )


def test_a_query_that_sees_other_keys_is_refused(monkeypatch):
    """As if the student's mask hid what the teacher's did not."""
    original = lookup.row_visibility
    monkeypatch.setattr(lookup, "row_visibility", lambda *a: original(*a) & (torch.arange(a[-1]) % 5 > 0))
    model = model_of()
    _, student, _ = both(model, UNLIKE)
    with pytest.raises(ProbeError, match="see other keys"):
        read(model, student, edits=read_of().edits())
