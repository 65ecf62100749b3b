"""Training the bundled model: its shortcuts equal the plain forward, its episodes read as they should, it resumes."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import probe
from probe.data.scenes import ATTRIBUTES, HEIGHT, WIDTH
from probe.data.words import ENGLISH, LANGUAGES
from probe.toy import language, optimise, train
from probe.toy.architecture import GRID, Decoded, Decoder, ImageEncoder, Size, build, seed_look_back
from probe.toy.curriculum import ID, draw_batch
from probe.toy.language import guidance_loss, look_loss
from probe.toy.recipe import SIBLINGS, Guidance, Mixture, Recipe
from probe.toy.vision import to_patches
from probe.toy.vocabulary import make_image_processor, make_tokenizer, words

EVERYTHING = Mixture(flipped=0.5, text_only=0.4)
TINY = Recipe(
    vision_steps=3,
    vision_renders=2,
    vision_batch=8,
    bank_renders=2,
    language_steps=4,
    language_batch=8,
    compiled=False,
)


@pytest.fixture(scope="module")
def model():
    return build(Size(), seed=3).eval()


# -------------------------------------------------------------------------------------------------------- the shortcuts


def test_patches_are_those_of_the_image_processor():
    from PIL import Image

    pictures = np.random.default_rng(0).integers(0, 255, (3, HEIGHT, WIDTH, 3), dtype=np.uint8)
    theirs = make_image_processor()(images=[Image.fromarray(p) for p in pictures], return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == [list(GRID)] * 3
    assert torch.equal(to_patches(torch.from_numpy(pictures)).flatten(0, 1), theirs["pixel_values"])


def test_the_fast_image_encoder_is_the_vision_tower(model):
    patches = torch.randn(4, GRID[1] * GRID[2], 1176)
    with torch.no_grad():
        ours = ImageEncoder(model)(patches)
        theirs = model.model.visual(patches.flatten(0, 1), grid_thw=torch.tensor([GRID] * 4))
    theirs = theirs if isinstance(theirs, torch.Tensor) else theirs.pooler_output
    torch.testing.assert_close(ours.flatten(0, 1), theirs, atol=1e-5, rtol=1e-5)


def test_the_fast_decoder_is_the_text_model(model):
    """States, the watched attention weights and the residual stream, with padding on the right."""
    batch = draw_batch(np.random.default_rng(3), 6, 4, EVERYTHING)
    text = model.model.language_model
    text.config._attn_implementation_internal = "eager"
    with torch.no_grad():
        embedded = text.embed_tokens(batch.ids)
        ours = Decoder(model)(embedded, batch.positions, frozenset({1, 4}))
        theirs = text(
            inputs_embeds=embedded,
            position_ids=batch.positions,
            use_cache=False,
            output_attentions=True,
            output_hidden_states=True,
        )
    text.config._attn_implementation_internal = "sdpa"
    torch.testing.assert_close(ours.states, theirs.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert set(ours.attention) == set(ours.stream) == {1, 4}
    for layer in (1, 4):
        torch.testing.assert_close(ours.attention[layer], theirs.attentions[layer], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.stream[layer], theirs.hidden_states[layer + 1], atol=1e-5, rtol=1e-5)


def test_a_seeded_head_looks_back_by_its_distance():
    """With the content of queries and keys removed, the biases alone put a head on the token d positions back."""
    model = build(Size(), seed=3).eval()
    attention = model.model.language_model.layers[1].self_attn
    seed_look_back(model, {(1, 0): 4, (1, 1): 1}, sharpness=5.0)
    with torch.no_grad():
        attention.q_proj.weight.zero_()
        attention.k_proj.weight.zero_()
        states = torch.zeros(1, 12, 128)
        ids = torch.arange(12)[None, None].expand(3, 1, -1)
        cos_sin = model.model.language_model.rotary_emb(states, ids)
        model.model.language_model.config._attn_implementation_internal = "eager"
        _, weights = attention(
            states, position_embeddings=cos_sin, attention_mask=torch.full((12, 12), -1e9).triu(1)[None, None]
        )
        model.model.language_model.config._attn_implementation_internal = "sdpa"
    assert weights[0, 0, 6:].argmax(-1).tolist() == [2, 3, 4, 5, 6, 7]
    assert weights[0, 1, 6:].argmax(-1).tolist() == [5, 6, 7, 8, 9, 10]


# --------------------------------------------------------------------------------------------------------- the episodes


def test_training_episodes_read_as_the_chat_template_writes_them(model):
    """Tokens and 3-D positions of the curriculum against transformers' own."""
    batch = draw_batch(np.random.default_rng(1), 24, 4, EVERYTHING)
    tokenizer = make_tokenizer()
    assert {"vqa", "recognition", "binding-cued", "binding-uncued"} < set(batch.tasks)
    for row in range(24):
        ids = batch.ids[row][batch.ids[row] != ID["<|endoftext|>"]]
        text = tokenizer.decode(ids)
        messages = []
        for item in text.removeprefix("<|im_start|>").split(";")[:-1]:
            question, answer = item.split("A:")
            content = [{"type": "text", "text": question.replace("<|image_pad|>", "").strip()}]
            messages.append({"role": "user", "content": [{"type": "image"}] * ("<|image_pad|>" in item) + content})
            messages.append({"role": "assistant", "content": answer.strip()})
        rendered = tokenizer.apply_chat_template(messages, tokenize=False).replace("<|image_pad|>", "<|image_pad|>" * 6)
        assert tokenizer(rendered)["input_ids"] == ids.tolist()
        is_image = (ids == ID["<|image_pad|>"])[None].int()
        grids = torch.tensor([GRID] * (int(is_image.sum()) // 6)) if is_image.any() else None
        positions, _ = model.model.get_rope_index(ids[None], is_image, image_grid_thw=grids)
        assert torch.equal(positions[:, 0], batch.positions[:, row, : len(ids)])


def test_losses_stand_where_the_answer_can_be_known():
    batch = draw_batch(np.random.default_rng(2), 60, 6, EVERYTHING)
    names = words()
    for row, task in enumerate(batch.tasks):
        ids, targets = batch.ids[row].tolist(), batch.targets[row].tolist()
        trained = [i for i, target in enumerate(targets) if target != -100]
        assert all(ids[i + 1] == targets[i] for i in trained)
        answers = [ids[i + 1] for i in range(len(ids) - 1) if names[ids[i]] == "A:"]
        if task.startswith("binding"):
            first = len(set(answers))
            assert len(trained) == len(answers) - first
        ends = [i for i, target in enumerate(batch.end_targets[row].tolist()) if target != -100]
        assert len(ends) == len(answers)
    for episode, query, key in batch.guides.tolist():
        assert names[batch.ids[episode, query]] == "A:"
        assert batch.ids[episode, key] == batch.ids[episode, query + 1]
        assert key < query


def test_flipped_labels_are_wrong_throughout_and_asked_only_once_shown():
    mixture = Mixture(binding_cued=0, binding_uncued=0, operator=0, describe=0, recognition=0, flipped=1.0, text_only=1)
    batch, names = draw_batch(np.random.default_rng(6), 20, 6, mixture), words()
    for row in range(20):
        cues = [i for i, token in enumerate(batch.ids[row].tolist()) if names[token] == "A:"]
        attribute = ATTRIBUTES.index(names[batch.ids[row, cues[0] - 1]].removesuffix("?"))
        shown = set()
        for at in cues:
            value, answer = (names[batch.ids[row, place]] for place in (at - 5 + attribute, at + 1))
            assert value != answer
            assert (int(batch.targets[row, at]) != -100) == (value in shown)
            shown.add(value)


def test_right_episodes_ask_one_question_too_and_one_label_may_be_wrong():
    """Told apart by the words of text-only twins; the wrong label is no target, all others are."""
    mixture = Mixture(*(0.5, 0.5, 0, 0, 0, 0), flipped=0.0, narrow=1.0, mislabelled=0.5, text_only=1.0, repeated=0.0)
    batch, names = draw_batch(np.random.default_rng(8), 60, 8, mixture), words()
    wrong_labels, few_classes = [], []
    for row, task in enumerate(batch.tasks):
        ids = batch.ids[row].tolist()
        cues = [i for i, token in enumerate(ids) if names[token] == "A:"]
        attribute = ATTRIBUTES[batch.attributes[row]]
        assert len({ids[at - 1] for at in cues}) == 1
        tables = LANGUAGES.values() if task == "recognition" else [ENGLISH]
        values = [ENGLISH[attribute].index(names[ids[at - 5 + ATTRIBUTES.index(attribute)]]) for at in cues]
        right = min(
            (
                [table[attribute][value] == names[ids[at + 1]] for at, value in zip(cues, values, strict=True)]
                for table in tables
            ),
            key=lambda good: good.count(False),
        )
        assert right.count(False) <= 1
        assert [int(batch.targets[row, at]) != -100 for at in cues] == right
        wrong_labels.append(not all(right))
        few_classes.append(attribute == "kind" and len(set(values)) <= 4)
    assert 0.25 < np.mean(wrong_labels) < 0.75
    assert any(few_classes)


def test_describe_is_shown_at_full_length():
    only_describe = Recipe(mixture=Mixture(0, 0, 0, 0, 0, 1.0))
    for step, items in ((0, only_describe.describe_items), (1, only_describe.long_items)):
        batch = language.draw_training_batch(only_describe, 0.9, step, np.random.default_rng(0))
        assert len(batch.scenes) == items * len(batch.tasks)


def test_flips_and_long_batches_come_when_the_recipe_says():
    recipe = Recipe(mixture=Mixture(flipped=1.0, narrow=0.0), flipped_from=0.3, long_from=0.5)

    def draw(part: float, step: int):
        return language.draw_training_batch(recipe, part, step, np.random.default_rng(0))

    early, late = draw(0.2, 0), draw(0.4, 0)
    assert (early.attributes[[task == "vqa" for task in early.tasks]] == -1).all()
    assert (late.attributes[[task == "vqa" for task in late.tasks]] != -1).all()
    assert [len(draw(part, step).tasks) for part, step in ((0.4, 1), (0.6, 0), (0.6, 1))] == [32, 32, 16]
    assert draw(0.6, 1).ids.shape[1] > late.ids.shape[1]


def test_no_training_episode_shows_a_held_out_pair():
    from probe.data.scenes import HELD_OUT_PAIRS

    batch = draw_batch(np.random.default_rng(7), 200, 9, EVERYTHING)
    assert not {(colour, kind) for colour, kind, _, _ in batch.scenes} & HELD_OUT_PAIRS


def test_agreement_is_the_share_of_earlier_items_of_the_label_with_the_same_value():
    """Recounted from the words of text-only twins."""
    only_binding = Mixture(vqa=0, recognition=0, operator=0, describe=0, text_only=1.0)
    batch = draw_batch(np.random.default_rng(4), 20, 7, only_binding)
    names, counted = words(), []
    for row in range(20):
        seen: dict[str, list[list[str]]] = {}
        for at in [i for i, token in enumerate(batch.ids[row].tolist()) if names[token] == "A:"]:
            scene, label = [names[t] for t in batch.ids[row, at - 5 : at - 1]], names[batch.ids[row, at + 1]]
            if label in seen:
                share = [float(np.mean([old[i] == scene[i] for old in seen[label]])) for i in range(4)]
                counted.append([row, at + 1, *share])
            seen.setdefault(label, []).append(scene)
        asked = ATTRIBUTES[batch.attributes[row]]
        assert all(line[2 + ATTRIBUTES.index(asked)] == 1 for line in counted if line[0] == row)
    torch.testing.assert_close(batch.agreement, torch.tensor(counted))


# ----------------------------------------------------------------------------------------------------------- the losses


def test_look_loss_is_the_mean_of_minus_log_mass():
    attention = {2: torch.rand(2, 4, 5, 5), 3: torch.rand(2, 4, 5, 5)}
    episode, query, key = torch.tensor([0, 0, 1]), torch.tensor([4, 4, 3]), torch.tensor([0, 2, 1])
    found = look_loss(attention, ((2, 1), (3, 0)), episode, query, key)
    masses = [
        (attention[layer][0, head, 4, 0] + attention[layer][0, head, 4, 2], attention[layer][1, head, 3, 1])
        for layer, head in ((2, 1), (3, 0))
    ]
    torch.testing.assert_close(found, torch.stack([-m.log() for pair in masses for m in pair]).mean())
    assert look_loss({}, (), episode, query, key) == 0


def test_perfect_heads_and_read_outs_have_no_guidance_loss():
    guidance = Guidance(classes=((1, 0),), labels=((0, 1),), agreement_after=0, attribute_after=1)
    batch = draw_batch(np.random.default_rng(5), 8, 6, Mixture(vqa=0, recognition=0, operator=0, describe=0))
    n, length = batch.ids.shape
    attention = {layer: torch.zeros(n, 4, length, length) for layer in (0, 1)}
    for episode, cue, earlier in batch.guides.tolist():
        attention[1][episode, 0, cue, earlier] = attention[0][episode, 1, cue + 1, earlier] = 1.0
    stream = {layer: torch.zeros(n, length, 4) for layer in (0, 1)}
    where = batch.agreement[:, :2].long()
    stream[0][where[:, 0], where[:, 1]] = (batch.agreement[:, 2:] * 100 - 50).clamp(-50, 50)
    stream[1] += 50 * torch.nn.functional.one_hot(batch.attributes, 4)[:, None]
    reader = torch.nn.Linear(4, 4)
    with torch.no_grad():
        reader.weight.copy_(torch.eye(4))
        reader.bias.zero_()
    sure = ((batch.agreement[:, 2:] == 0) | (batch.agreement[:, 2:] == 1)).all(1)
    batch = replace(batch, agreement=batch.agreement[sure])

    def loss(attention=attention, stream=stream) -> float:
        return guidance_loss(Decoded(stream[0], attention, stream), batch, guidance, [reader] * 2).item()

    assert loss() < 1e-4
    for layer in (0, 1):  # each of the four, broken alone
        assert loss(attention={**attention, layer: attention[layer].roll(1, dims=1)}) > 1
        assert loss(stream={**stream, layer: -stream[layer]}) > 1


def test_a_shard_without_binding_episodes_can_be_averaged_with_one_that_has_some(tmp_path):
    """Its loss does not touch the read-outs, which another process then has gradients for."""
    worker = optimise.Worker(0, 1, tmp_path, TINY)
    touched, untouched = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    (4 * touched).sum().backward()
    optimise.average_gradients(worker, [untouched, touched])
    assert untouched.grad.tolist() == [0, 0, 0]
    assert touched.grad.tolist() == [2, 2]


def test_guidance_ends_and_the_control_has_none():
    guidance = Recipe().guidance
    assert [guidance.weight(part) > 0 for part in (0.0, 0.3, 0.99)] == [True, True, False]
    assert Recipe(**SIBLINGS["no-binding"]).guidance is None
    assert Recipe(**SIBLINGS["default"]) == Recipe()


# ----------------------------------------------------------------------------------------------------------- the script


def finished(directory) -> bytes:
    return (directory / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training in one go."""
    out = tmp_path_factory.mktemp("whole")
    train.train(out, TINY, processes=1)
    return out


def test_training_goes_on_where_it_stopped(tmp_path, monkeypatch, whole):
    """Stopped in the language stage and started again, training ends in the very same weights; they load and read."""
    monkeypatch.setattr(optimise, "SAVE_EVERY", 0.0)
    drawn = []

    def stops(*arguments):
        if len(drawn) == 4:
            raise KeyboardInterrupt
        drawn.append(arguments)
        return draw_batch(*arguments)

    monkeypatch.setattr(language, "draw_batch", stops)
    with pytest.raises(KeyboardInterrupt):
        train.train(tmp_path, TINY, processes=1)
    assert torch.load(tmp_path / "language.pt", weights_only=True)["step"] == 2
    monkeypatch.setattr(language, "draw_batch", draw_batch)
    train.train(tmp_path, TINY, processes=1)
    assert finished(tmp_path) == finished(whole)
    result = probe.attention_map(probe.load(whole / "model"), probe.synthetic_episodes("describe", shots=1, n=2))
    assert float(result["residual"].max()) < 1e-5


def test_two_processes_train_the_same_weights_as_one(tmp_path, whole):
    train.train(tmp_path, TINY, processes=2)
    assert finished(tmp_path) == finished(whole)


def test_more_processes_than_parts_of_a_batch_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="1 to 2 processes"):
        train.train(tmp_path, TINY, processes=3)


def test_a_directory_belongs_to_one_recipe(whole):
    with pytest.raises(SystemExit, match="another recipe"):
        train.claim(whole, replace(TINY, seed=1))


def test_a_sibling_takes_the_vision_tower_of_its_own_seed(tmp_path, whole):
    train.take_vision(whole, tmp_path, replace(TINY, guidance=None))
    assert (tmp_path / "vision.pt").read_bytes() == (whole / "vision.pt").read_bytes()
    with pytest.raises(SystemExit, match="no finished vision stage"):
        train.take_vision(tmp_path / "nowhere", tmp_path, TINY)
    with pytest.raises(SystemExit, match="another vision_steps"):
        train.take_vision(whole, tmp_path, replace(TINY, vision_steps=9))


def test_the_recipe_is_stored_beside_the_weights(whole):
    import json

    assert json.loads((whole / "model" / "recipe.json").read_text()) == json.loads(json.dumps(asdict(TINY)))


def test_unbound_words_belong_to_nothing():
    """Of binding episodes alone, and every item says a word of its episode whatever it shows."""
    mixture = replace(SIBLINGS["no-binding"]["mixture"], text_only=0.0, repeated=1.0)
    batch = draw_batch(np.random.default_rng(0), 200, 9, mixture)
    bound = draw_batch(np.random.default_rng(0), 200, 9, replace(mixture, unbound=0.0))
    words_of: dict[str, list[int]] = {"unbound": [], "bound": []}
    for name, drawn in (("unbound", batch), ("bound", bound)):
        for episode, task in enumerate(drawn.tasks):
            if task.startswith("binding"):
                # All items repeat one scene: bound, they say one word; unbound, what is drawn.
                answers = [t for t in drawn.targets[episode].tolist() if t != -100]
                words_of[name].append(len(set(answers)))
    assert set(words_of["bound"]) <= {0, 1}
    assert max(words_of["unbound"]) > 2
