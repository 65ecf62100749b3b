"""Every family: it is given what its own processor would give it, and what is recorded is what it computes."""

from __future__ import annotations

import dataclasses
import gc
import json
import weakref
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from probe.data.example import Episode
from probe.data.images import open_images
from probe.errors import ProbeError, UsageError
from probe.experiments import certification
from probe.experiments.attention_map import attention_map
from probe.experiments.certification import CHECKS, certify, prepare
from probe.measures import mass
from probe.models.families import FAMILIES
from probe.models.load import load
from probe.models.model import Model
from probe.models.oracle import naive_attention, observed
from probe.models.token_map import ROLES, segments_for
from probe.trace.edit import Edit
from probe.trace.generate import generate
from probe.trace.read import read
from tests import model_matrix
from tests.tiny_families import MODEL_TYPES, Tiny, build, save
from tests.tiny_qwen import make_episode, picture

SIZES = ((84, 56), (56, 84), (40, 40), (120, 30))
EPISODES = [
    make_episode(2, seed=2, sizes=SIZES),
    make_episode(0, seed=1, sizes=SIZES),
    make_episode(1, seed=3, images=2, sizes=SIZES),
]
LIKE = make_episode(2, seed=5, sizes=SIZES)  # as many images as the first
TEXT_ONLY = make_episode(1, seed=4, images=0)
CROSS = ("idefics", "mllama")
# Idefics' processor drops spaces beside an image; a format without any can be compared with it.
TOUCHING = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% if message['role'] == 'user' %} Answer: {% endif %}"
    "{% endfor %}"
)


@cache
def tiny(model_type: str) -> Tiny:
    return build(model_type)


@cache
def model_of(model_type: str) -> Model:
    made = tiny(model_type)
    made.processor.chat_template = TOUCHING if model_type == "idefics" else made.chat_template
    return load(made.module, processor=made.processor)


@pytest.fixture(params=MODEL_TYPES)
def model(request) -> Model:
    return model_of(request.param)


def as_processed(model: Model, episodes: list[Episode]) -> dict[str, Any]:
    """What the family's own processor makes of the same prompts and pictures, without the query's answer."""
    processor, kind = tiny(model.family.model_type).processor, model.family.model_type
    texts, pictures = [], []
    for episode in episodes:
        prompt = model.render(episode)
        texts.append(prompt.text[: prompt.spans[-1].start].rstrip(" "))  # it would become part of the answer's token
        pictures.append(open_images(episode))
    opened = model.tokenizer.bos_token
    plain = {"add_special_tokens": not (opened and texts[0].startswith(opened))}
    if kind == "idefics":  # it takes a text and its pictures as one list
        lists = []
        for text, images in zip(texts, pictures, strict=True):
            pieces = text.split("<image>")
            lists.append([part for pair in zip(pieces, [*images, None], strict=True) for part in pair if part])
        return dict(processor(text=lists, return_tensors="pt", padding=True))
    flat = kind not in ("llava_onevision", "idefics2", "idefics3", "smolvlm", "gemma3", "mllama")
    images = [image for images in pictures for image in images] if flat else pictures
    return dict(processor(text=texts, images=images, return_tensors="pt", padding=True, **plain))


def test_all_families_are_here():
    assert set(MODEL_TYPES) == set(FAMILIES)


@pytest.mark.parametrize("kind", [kind for kind in MODEL_TYPES if kind != "paligemma"])
def test_inputs_are_those_of_the_processor(kind):
    """Ids, mask and pixel values of a padded batch, and whatever else the forward takes."""
    model = model_of(kind)
    episodes = [EPISODES[0], LIKE] if model.family.like_images else EPISODES
    theirs = as_processed(model, episodes)
    ours = model.batch([model.encode(episode) for episode in episodes], with_answer=False).inputs
    assert set(ours) == set(theirs) - {"num_crops"}
    for name, value in ours.items():
        assert value.shape == theirs[name].shape, name
        assert torch.equal(value, theirs[name].to(value.dtype)), name


def test_one_question_to_paligemma_is_what_its_processor_writes():
    """It puts the begin-of-text token behind the image; for one image and no demonstration the two must agree."""
    model = model_of("paligemma")
    [episode] = [e for e in EPISODES if not e.shots]
    processor = tiny("paligemma").processor
    images = open_images(episode)
    theirs = processor(text="<image>" + episode.query.question, images=images, return_tensors="pt")
    ours = model.batch([model.encode(episode)], with_answer=False).inputs
    for name in ("input_ids", "attention_mask", "pixel_values", "token_type_ids"):
        assert torch.equal(ours[name], theirs[name].to(ours[name].dtype)), name


def test_the_docs_show_what_the_checks_find():
    for path, write in model_matrix.PAGES.items():
        assert path.read_text(encoding="utf-8") == write(), "run python -m tests.model_matrix"


def test_certified(model):
    checks = certify(model)
    assert [check for check in checks if not check.passed] == []
    assert len(checks) == len(CHECKS)


@pytest.mark.parametrize("layout", ["old", "new"])
@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_checkpoints_of_both_layouts(tmp_path, kind, layout):
    """From files: the same weights, prompt, ids and pixel values as in memory."""
    directory = save(kind, tmp_path / kind, layout=layout)
    model, loaded = model_of(kind), load(directory)
    if kind == "idefics":  # in memory it was given a template
        assert loaded.prompt == "mimic"
        model = load(tiny(kind).module, processor=tiny(kind).processor, prompt="mimic")
    assert loaded.prompt == model.prompt
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, loaded.module.state_dict()[name]), name
    ours, theirs = ([m.encode(e) for e in [*EPISODES, TEXT_ONLY]] for m in (model, loaded))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert a.inputs.keys() == b.inputs.keys()
        assert all(torch.equal(value, b.inputs[name]) for name, value in a.inputs.items())


def test_generation_reads_the_images_and_its_own_answer(model):
    """With the cache, the same answers as by reading the whole text again for every token."""
    for episode in (EPISODES[0], TEXT_ONLY):
        encoding = model.encode(episode)
        batch = model.batch([encoding], with_answer=False)
        [answer] = generate(model, batch, max_new_tokens=5)
        inputs = dict(batch.inputs)
        for _ in range(5):
            with torch.no_grad():
                best = model.module(**inputs, use_cache=False).logits[:, -1:].argmax(-1)
            if best.item() == model.module.generation_config.eos_token_id:
                break
            ids = torch.cat([inputs["input_ids"], best], 1)
            inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            longer = dataclasses.replace(batch, inputs=dict(inputs))
            inputs |= model.family.finish(model, longer)
        new = inputs["input_ids"][0, batch.length :]
        assert model.tokenizer.decode(new, skip_special_tokens=True).strip() == answer


def test_the_residual_stream_is_what_enters_each_block(model):
    """Against plain torch hooks; where vision joins between layers, the output of one is not the input of the next."""
    batch = model.batch([model.encode(EPISODES[0]), model.encode(LIKE)])
    seen = {}
    handles = [
        model.module.get_submodule(site.block).register_forward_pre_hook(
            lambda _m, a, kw, place=(site.axis, site.layer): seen.__setitem__(
                place, a[0] if a else kw["hidden_states"]
            ),
            with_kwargs=True,
        )
        for site in model.sites
    ]
    with torch.no_grad():
        model.module(**model.inputs(batch), use_cache=False)
    for handle in handles:
        handle.remove()
    reading = read(model, batch, ("residual",), lambda values: {"r": values.residual})
    assert len(reading.layers) + len(reading.cross) == len(seen)
    for layer, values in reading.layers.items():
        assert torch.equal(values["r"], seen["text", layer])
    for layer, values in reading.cross.items():
        assert torch.equal(values["r"], seen["vision", layer])


def test_mass_lies_where_a_row_can_look(model):
    """Nothing attends to what the mask hides, and something to all that it shows."""
    result = attention_map(model, EPISODES[:1])
    seen = (result["n_visible"] > 0) & result["mass"].notnull()
    assert (result["mass"].where(~seen).fillna(0) == 0).all()
    assert (result["mass"].where(seen, 1) > 0).all()


def test_sliding_windows_hide_keys_in_their_layers_only():
    model = model_of("gemma3")
    visible = attention_map(model, EPISODES[:1])["n_visible"].isel(row=0, episode=0).sum("segment")
    windows = [kind == "sliding_attention" for kind in model.text_config.layer_types]
    length = len(model.encode(EPISODES[0]))
    assert any(windows) and not all(windows)
    for layer, is_window in enumerate(windows):
        expected = model.text_config.sliding_window if is_window else model.encode(EPISODES[0]).n_prompt
        assert visible.sel(layer=layer).item() == expected, layer
    assert length > model.text_config.sliding_window


@pytest.mark.parametrize("kind", CROSS)
def test_cross_attention_has_its_own_axis(kind):
    """No image is a token of the text, so the text's mass on images is missing; a row sees the last image before it."""
    model = model_of(kind)
    result = attention_map(model, EPISODES[:1], rows="demo-answers")
    assert "undefined" in result.attrs["image_mass"]
    images = result["role"] == "image"
    assert result["mass"].isel(segment=images).isnull().all()
    assert (result["n_tokens"].isel(segment=images) == 0).all()
    sums = result["mass"].sum("segment").where(result["n_positions"] > 0, 1)
    np.testing.assert_allclose(sums, 1, atol=1e-5)
    cross = result["cross_mass"].isel(episode=0)
    assert cross.isel(segment=~images).isnull().all()
    for row, owner in (("answer", "query"), ("demo_answer_0", "demo0"), ("demo_answer_1", "demo1")):
        np.testing.assert_allclose(cross.sel(row=row, segment=f"{owner}/image"), 1, atol=1e-5)
    np.testing.assert_allclose(result["cross_gate"], np.tanh(0.7), rtol=1e-5)
    assert (result["cross_n_tokens"].isel(segment=images) > 0).all()


@pytest.mark.parametrize("kind", CROSS)
def test_text_alone_has_no_cross_attention(kind):
    result = attention_map(model_of(kind), [TEXT_ONLY])
    assert result["cross_mass"].isnull().all()
    assert result["mass"].sum("segment").min() > 1 - 1e-5


def test_mixed_numbers_of_images_are_refused_where_padding_is_read():
    with pytest.raises(UsageError, match=r"cannot share a batch.*--batch-size 1"):
        attention_map(model_of("mllama"), EPISODES)
    attention_map(model_of("mllama"), EPISODES, batch_size=1)


def test_gate_scales_what_cross_attention_writes():
    """Half the gate, half the contribution, the same mass."""
    model = model_of("idefics")
    before = attention_map(model, EPISODES[:1])
    block = model.module.get_submodule(next(site.block for site in model.sites if site.axis == "vision"))
    open_gate = block.alpha_cross_attn.detach().clone()
    try:
        with torch.no_grad():
            block.alpha_cross_attn.copy_(torch.atanh(torch.tanh(open_gate) / 2))
        after = attention_map(model, EPISODES[:1])
    finally:
        with torch.no_grad():
            block.alpha_cross_attn.copy_(open_gate)
    first = {"cross_layer": 0}
    np.testing.assert_allclose(
        after["cross_contribution"].isel(first), before["cross_contribution"].isel(first) / 2, rtol=1e-4
    )
    np.testing.assert_allclose(after["cross_mass"].isel(first), before["cross_mass"].isel(first), atol=1e-6)


def test_newlines_of_llava_next_are_structural():
    """Its run of image tokens holds the low-resolution square, the crops' rows, and one newline a row."""
    model = model_of("llava_next")
    encoding = model.encode(EPISODES[0])
    for number, image in enumerate(encoding.images):
        assert image.structural is not None
        high = image.row[(image.tile > 0)]
        assert image.structural.sum() == high.max() + 1
        mapped = encoding.token_map.image == number
        assert mapped.sum() == len(image) - image.structural.sum()
        assert (encoding.token_map.row[mapped] >= 0).all()
    is_image_token = encoding.ids.numpy() == model.config.image_token_id
    newline = is_image_token & (encoding.token_map.image < 0)
    assert set(np.array(ROLES)[encoding.token_map.role[newline]]) == {"delimiter"}


def test_the_answer_does_not_leak_into_the_prefix_of_paligemma():
    """The row that predicts the answer is the same whatever the answer is."""
    model = model_of("paligemma")
    other = dataclasses.replace(EPISODES[0].query, answers=("brown brown",))
    rows = []
    for episode in (EPISODES[0], dataclasses.replace(EPISODES[0], query=other)):
        encoding = model.encode(episode)
        batch = model.batch([encoding])
        logits = model.module(**model.inputs(batch), use_cache=False).logits
        rows.append(logits[0, encoding.n_prompt - 1])
    torch.testing.assert_close(rows[0], rows[1], atol=1e-4, rtol=1e-4)


def mixed(first_images: int) -> Episode:
    """Demonstrations with and without images: the first has ``first_images``, the others one."""
    episode = make_episode(2, seed=6, sizes=SIZES)
    first = dataclasses.replace(episode.demonstrations[0], images=episode.query.images * first_images)
    return dataclasses.replace(episode, id=f"mixed{first_images}", demonstrations=(first, *episode.demonstrations[1:]))


def test_a_row_before_all_images_reads_none_of_them():
    """Only that row is missing; a batch with other numbers of images raises no alarm and changes nothing."""
    model = model_of("idefics")
    episodes = [mixed(0), mixed(2), EPISODES[1]]
    result = attention_map(model, episodes, rows="demo-answers")
    first = result.isel(episode=0)
    assert first["cross_mass"].sel(row="demo_answer_0").isnull().all()
    for row in ("answer", "demo_answer_1"):
        assert first["cross_visible_share"].sel(row=row).sum("segment").min() == 1
        np.testing.assert_allclose(first["cross_mass"].sel(row=row).sum("segment"), 1, atol=1e-5)
    for number, episode in enumerate(episodes):
        alone = attention_map(model, [episode], rows="demo-answers").isel(episode=0)
        there = result.isel(episode=number)
        for row in alone["row"].values:
            ours, theirs = (x["cross_mass"].sel(row=row).dropna("segment", how="all") for x in (there, alone))
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_text_that_ended_reads_no_image():
    """Behind the end of a text Idefics shows no image, and drops what cross-attention then gives."""
    ended = TOUCHING.replace("{% endfor %}{% endfor %}", "{% endfor %}{% endfor %}")
    ended = ended.replace("{% if message['role'] == 'user' %} Answer: {% endif %}", "</s>")
    made = tiny("idefics")
    model = load(made.module, processor=dataclasses.replace(made).processor)
    model = dataclasses.replace(model, chat_template=ended)
    episode = EPISODES[0]
    silent = dataclasses.replace(episode, query=dataclasses.replace(episode.query, images=()))
    result = attention_map(model, [silent])
    assert result["cross_mass"].isnull().all()


def test_layers_without_self_attention_are_refused():
    with pytest.raises(
        UsageError, match=r"The layers 1 of .* cross-attention alone; name at least one .*\(0, 2, 3, 5\)"
    ):
        attention_map(model_of("mllama"), EPISODES[:1], layers=[1])
    both = attention_map(model_of("mllama"), EPISODES[:1], layers=[0, 1])
    assert (both["layer"].values.tolist(), both["cross_layer"].values.tolist()) == ([0], [1])


def test_contribution_is_what_is_added_where_a_norm_follows():
    """Gemma 3 normalises the attention's output: with one segment and all heads, the parts add up to what it adds."""
    model = model_of("gemma3")
    encoding = model.encode(EPISODES[0])
    batch = model.batch([encoding])
    at = torch.tensor([[encoding.n_prompt - 1]])
    for layer, block in enumerate(model.layers):
        seen: dict[str, torch.Tensor] = {}
        handles = [
            block.self_attn.o_proj.register_forward_pre_hook(lambda _m, a, s=seen: s.__setitem__("heads", a[0])),
            block.post_attention_layernorm.register_forward_hook(
                lambda _m, _a, out, s=seen: s.__setitem__("added", out)
            ),
        ]
        with torch.no_grad():
            model.module(**model.inputs(batch), use_cache=False)
        for handle in handles:
            handle.remove()
        heads = seen["heads"][:, at[0]].unflatten(2, (model.n_heads, -1)).transpose(1, 2)
        size = model.output_size(layer, heads)
        written = heads.transpose(1, 2).flatten(2) @ model.output_weight(layer).T / size[..., None]
        torch.testing.assert_close(written, seen["added"][:, at[0]], atol=1e-5, rtol=1e-5)


def test_contribution_behind_a_norm_equals_a_plain_loop():
    """By segment and head: ``(1 + w) W_O z_s / rms``, with attention written down as in the textbook."""
    model = model_of("gemma3")
    encoding = model.encode(EPISODES[0])
    batch = model.batch([encoding])
    result = attention_map(model, EPISODES[:1]).isel(episode=0).sel(row="answer")
    index = encoding.token_map.segment_index(segments_for(EPISODES[0].shots))
    at = encoding.n_prompt - 1

    def compare(site, q, k, v, mask, scale):
        attention = naive_attention(q, k, mask, scale, torch.tensor([[at]]), causal=True)[0, :, 0].float()
        values = v[0].repeat_interleave(q.shape[1] // v.shape[1], 0)
        block = model.layers[site.layer]
        projection = block.self_attn.o_proj.weight.unflatten(1, (model.n_heads, -1))
        parts = torch.stack(
            [
                torch.stack(
                    [
                        projection[:, h] @ (attention[h, index == s] @ values[h, index == s])
                        for h in range(model.n_heads)
                    ]
                )
                for s in range(result.sizes["segment"])
            ]
        )  # [segment, head, hidden]
        whole = parts.sum((0, 1))
        norm = block.post_attention_layernorm
        added = parts * (1 + norm.weight) / (whole.square().mean() + norm.eps).sqrt()
        ours = result["contribution"].sel(layer=site.layer).transpose("segment", "head").values
        np.testing.assert_allclose(np.nan_to_num(ours), added.norm(dim=-1).detach(), rtol=1e-4, atol=1e-5)
        seen.append(site.layer)

    seen: list[int] = []
    with observed(model, compare), torch.no_grad():
        model.module(**model.inputs(batch), use_cache=False)
    assert seen == list(range(model.n_layers))


def test_a_certified_model_is_freed():
    """Nothing that transformers keeps of the oracle keeps the model."""
    made = build("llava")
    made.processor.chat_template = made.chat_template
    model = load(made.module, processor=made.processor)
    assert all(check.passed for check in certify(model))
    gone = weakref.ref(made.module)
    del made, model
    gc.collect()
    assert gone() is None


def test_softcapped_attention_is_refused():
    made = tiny("paligemma")
    made.module.config.text_config.attn_logit_softcapping = 50.0
    try:
        with pytest.raises(UsageError, match="squashes its attention scores"):
            load(made.module, processor=made.processor)
    finally:
        del made.module.config.text_config.attn_logit_softcapping


def test_what_the_grid_covers_where_pictures_are_cropped_or_padded():
    """CLIP keeps the middle; OneVision pads several pictures to squares, Mllama to the right and below."""
    [wide] = [e for e in EPISODES if not e.shots]
    wide = dataclasses.replace(wide, query=dataclasses.replace(wide.query, images=(picture(0, (120, 30)),) * 2))
    boxes = {}
    for kind in ("llava", "llava_onevision", "mllama"):
        image = model_of(kind).encode(wide).images[0]
        boxes[kind] = image.box
        assert image.size[0] / image.size[1] == pytest.approx(4, rel=0.1)
    assert boxes["llava"] == (0.375, 0.0, 0.625, 1.0)
    assert boxes["llava_onevision"] == (0.0, -1.5, 1.0, 2.5)
    assert boxes["mllama"][:2] == (0.0, 0.0)
    assert boxes["mllama"][3] > 1


def test_formats_write_what_the_family_puts_around_an_image():
    made = tiny("qwen2_5_vl")
    model = load(made.module, processor=made.processor, prompt="live")
    text = model.render(EPISODES[2]).text
    assert text.count("<|vision_start|><|image_pad|><|vision_end|>") == sum(len(x.images) for x in EPISODES[2].examples)
    assert model.prompt == "live"


@pytest.mark.parametrize("named", [{"default": "D", "tool_use": "T"}, [{"name": "default", "template": "D"}]])
def test_of_several_chat_templates_the_default_one(tmp_path, named):
    directory = save("llava", tmp_path / "llava", layout="old")
    template = json.loads((directory / "chat_template.json").read_text())["chat_template"]
    filled = json.loads(json.dumps(named).replace('"D"', json.dumps(template)))
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": filled}))
    loaded = load(directory)
    assert (loaded.prompt, loaded.chat_template) == ("chat template", template)
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": {"tool_use": template}}))
    with pytest.raises(ProbeError, match="chat templates tool_use and none called default"):
        load(directory)


# ---------------------------------------------------------------------------------------- the checks find what is wrong


def broken(check, **changes) -> bool:
    """Whether a check fails once something in probe is broken."""
    with pytest.MonkeyPatch.context() as patch:
        for place, value in changes.items():
            owner, _, name = place.replace("__", ".").rpartition(".")
            patch.setattr(f"probe.{owner}.{name}", value)
        return not check(prepare(model_of("gemma3"), EPISODES)).passed


def test_checks_fail_when_they_should():
    original_rows = mass.row_attention

    def wrong_mask(q, k, mask, scale, causal, rows):
        return original_rows(q, k, None, scale, True, rows)

    def unscaled(q, k, mask, scale, causal, rows):
        return original_rows(q, k, mask, 1.0, causal, rows)

    for function in (wrong_mask, unscaled):
        for check in (certification.check_mass, certification.check_residual):
            assert broken(check, measures__mass__row_attention=function)
    original_sum = mass.segment_mass
    assert broken(certification.check_sums, measures__mass__segment_mass=lambda a, s: 0.9 * original_sum(a, s))
    original_edit = certification.zero_head
    assert broken(
        certification.check_edit,
        experiments__certification__zero_head=lambda layer, head, axis: original_edit(layer, 0, axis),
    )

    def nothing(q, k, mask, scale, causal, rows):
        return original_rows(q, k, mask, scale, causal, rows) * float("nan")

    for check in (certification.check_mass, certification.check_residual, certification.check_sums):
        assert broken(check, measures__mass__row_attention=nothing)
    identity = Edit("heads", 1, lambda value, context: value)
    assert broken(certification.check_randomised, experiments__certification__Edit=lambda *_: identity)


def test_the_check_of_the_token_map_reads_the_ids():
    case = prepare(model_of("gemma3"), EPISODES)
    first = case.encodings[0]
    at = int(first.token_map.where("image")[0])
    for wrong in (first.ids.clone().index_fill(0, torch.tensor([at]), 0), first.ids.roll(1)):
        broken_one = dataclasses.replace(first, ids=wrong)
        shown = dataclasses.replace(case, encodings=[broken_one, *case.encodings[1:]])
        assert not certification.check_token_map(shown).passed
    assert certification.check_token_map(case).passed


def test_the_check_of_padding_notices_positions_that_count_padding(monkeypatch):
    """As if the model were given no mask for padding."""
    case = prepare(model_of("llava"), EPISODES)
    blind = dict(case.batch.inputs, attention_mask=torch.ones_like(case.batch.inputs["attention_mask"]))
    batch = dataclasses.replace(case.batch, inputs=blind)
    wrong = certification.replace_case(case, [0, 1, 2], batch)
    assert not certification.check_alone(wrong).passed
    assert certification.check_alone(case).passed


@pytest.mark.parametrize("kind", ["llava", *CROSS])
def test_certification_wants_images(kind):
    with pytest.raises(UsageError, match="episode4 show none"):
        certify(model_of(kind), [TEXT_ONLY])
