"""The token map: every position has the right role, under any template, tokenizer, image grid and number of images."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from probe.data.example import Episode, Example
from probe.errors import ProbeError
from probe.models.load import load
from probe.models.token_map import MODALITY_OF_ROLE, ROLES, segments_for
from probe.segments import NEITHER, QUERY
from tests.tiny_qwen import CHAT_TEMPLATE, make_episode, make_module, make_processor, picture


@pytest.fixture(scope="module")
def model():
    processor = make_processor()
    return load(make_module(processor), processor=processor)


def text_of(model, encoding, role, owner):
    return model.tokenizer.decode(encoding.ids[encoding.token_map.where(role, owner)])


def with_template(model, template):
    return dataclasses.replace(model, chat_template=template)


@pytest.mark.parametrize(("shots", "images"), [(0, 1), (1, 0), (2, 3), (4, 1), (1, 16), (3, 8)])
def test_roles_give_back_the_texts(model, shots, images):
    """Decoding the positions of a role gives the text of that role: 0 to 32 images, 0 to 4 shots."""
    episode = make_episode(shots, seed=7, images=images, sizes=((84, 56), (56, 140), (28, 56)))
    encoding = model.encode(episode)
    token_map = encoding.token_map
    for i, example in enumerate(episode.examples):
        owner = QUERY if i == shots else i
        assert text_of(model, encoding, "question", owner) == example.question
        assert text_of(model, encoding, "answer", owner) == example.answer
    assert text_of(model, encoding, "sink", NEITHER) == "<|im_start|>"
    assert text_of(model, encoding, "template", NEITHER) == "system\nYou are a helpful assistant.<|im_end|>\n"
    for i in range(shots):
        around = "<|vision_start|><|vision_end|>" * images
        expected = f"<|im_start|>user\n{around}<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
        assert text_of(model, encoding, "delimiter", i) == expected
    assert token_map.answer[-1] == len(encoding) - 1
    assert token_map.n_straddling == 0


@pytest.mark.parametrize("images", [1, 2, 32])
def test_ids_and_pixels_are_those_of_the_hugging_face_processor(model, images):
    """Against transformers' own processor on the same conversation (it accepts no missing video processor by
    itself)."""
    from transformers import Qwen2_5_VLProcessor
    from transformers.processing_utils import ProcessorMixin

    episode = make_episode(1, seed=3, images=images, sizes=((84, 56), (56, 140)))
    episode = dataclasses.replace(episode, demonstrations=episode.demonstrations if images < 32 else ())
    check = ProcessorMixin.check_argument_for_proper_class
    try:
        ProcessorMixin.check_argument_for_proper_class = lambda self, name, value: (
            None if name == "video_processor" else check(self, name, value)
        )
        processor = Qwen2_5_VLProcessor(model.image_processor, model.tokenizer, None, chat_template=CHAT_TEMPLATE)
    finally:
        ProcessorMixin.check_argument_for_proper_class = check
    messages = []
    for example in episode.examples:
        content = [*({"type": "image"} for _ in example.images), {"type": "text", "text": example.question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": example.answer}]
    text = model.chat(messages[:-1], True) + episode.query.answer
    pictures = [image for example in episode.examples for image in example.images]
    theirs = processor(text=[text], images=pictures, return_tensors="pt")
    ours = model.batch([model.encode(episode)]).inputs
    for name in ("input_ids", "pixel_values", "image_grid_thw", "mm_token_type_ids"):
        assert torch.equal(ours[name].long() if "ids" in name else ours[name], theirs[name]), name


def test_patches_follow_the_grid(model):
    """Rows and columns on grids that are not square, against the grid that the processor reports."""
    episode = make_episode(2, seed=5, images=2, sizes=((84, 56), (56, 140), (140, 28)))
    encoding = model.encode(episode)
    token_map = encoding.token_map
    grids = encoding.inputs["image_grid_thw"].tolist()
    assert len({tuple(grid) for grid in grids}) > 1
    for number, (_, rows, columns) in enumerate(grids):
        at = np.flatnonzero(token_map.image == number)
        assert (np.diff(at) == 1).all()
        assert token_map.row[at].tolist() == np.repeat(np.arange(rows // 2), columns // 2).tolist()
        assert token_map.column[at].tolist() == np.tile(np.arange(columns // 2), rows // 2).tolist()
        assert set(token_map.demonstration[at]) == {QUERY if number >= 4 else number // 2}
    elsewhere = token_map.role != ROLES.index("image")
    for column in (token_map.image, token_map.tile, token_map.row, token_map.column):
        assert (column[elsewhere] == -1).all()
    assert (token_map.tile[~elsewhere] == 0).all()


def test_segments_are_a_partition(model):
    encoding = model.encode(make_episode(3, seed=1))
    segments = segments_for(5)
    index = encoding.token_map.segment_index(segments)
    assert len(index) == len(encoding)
    assert len({segment.label for segment in segments}) == len(segments)
    for position, segment in enumerate(index):
        assert segments[segment].role == ROLES[encoding.token_map.role[position]]
        assert segments[segment].demonstration == encoding.token_map.demonstration[position]
    assert {MODALITY_OF_ROLE[role] for role in ROLES} == {"sink", "structural", "visual", "textual"}


def test_batches_are_padded_on_the_left(model):
    encodings = [model.encode(make_episode(k, seed=k)) for k in (0, 4, 1)]
    batch = model.batch(encodings)
    for row, mask, pad, encoding in zip(
        batch.inputs["input_ids"], batch.inputs["attention_mask"], batch.pads, encodings, strict=True
    ):
        assert torch.equal(row[pad:], encoding.ids)
        assert mask.tolist() == [0] * pad + [1] * len(encoding)
    prompts = model.batch(encodings, with_answer=False)
    for row, pad, encoding in zip(prompts.inputs["input_ids"], prompts.pads, encodings, strict=True):
        assert torch.equal(row[pad:], encoding.ids[: encoding.n_prompt])
        asked = model.tokenizer.decode(row[pad:])
        assert asked.endswith("<|im_start|>assistant\n")


def test_a_straddling_token_takes_the_role_of_its_first_letter():
    """A tokenizer that merges across the border of question and delimiter: "cat?END" is one token."""
    vocab = {
        w: i for i, w in enumerate(["<unk>", "<pad>", "<|image_pad|>", "Q:", "a", "cat?END", "A:", "red", "END", " "])
    }
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken("<|image_pad|>", special=True), AddedToken("<pad>", special=True)])
    processor = make_processor()
    processor.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>")
    processor.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}Q: {% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}<|image_pad|> {% else %}{{ p['text'] }}END {% endif %}{% endfor %}A: "
        "{% else %}{{ m['content'][0]['text'] }} END {% endif %}{% endfor %}"
    )
    module = make_module(make_processor())
    module.config.image_token_id = 2
    model = load(module, processor=processor)
    ask = Example("x", (), "a cat?", ("red",))
    encoding = model.encode(Episode("e", (ask,), ask))
    roles = [ROLES[role] for role in encoding.token_map.role]
    assert roles == [
        *("sink", "question", "question", "delimiter", "answer", "delimiter"),
        *("delimiter", "question", "question", "delimiter", "answer"),
    ]
    assert encoding.token_map.n_straddling == 2


REWRITES = CHAT_TEMPLATE.replace("{{ part['text'] }}", "{{ part['text'] | upper }}")
DROPS = CHAT_TEMPLATE.replace("{% elif 'text' in part %}", "{% elif 'text' in part and loop.first %}")
LAST = CHAT_TEMPLATE.replace(
    "{% endfor %}<|im_end|>",
    "{% endfor %}{% if loop.last and message['role'] == 'assistant' %} over{% endif %}<|im_end|>",
)
ASKS = CHAT_TEMPLATE.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}")
NO_IMAGE = CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "")
TOUCHING = CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>")
FAILS = "{{ raise_exception('only poems') }}"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (REWRITES, "rewrites the texts"),
        (DROPS, "shows 3 of 6 questions and answers"),
        (LAST, "differently once the conversation goes on"),
        (ASKS, "asks for an answer with"),
        (NO_IMAGE, "0 image placeholders"),
        (FAILS, "only poems"),
        (TOUCHING, "two images without a token between them"),
    ],
)
def test_a_template_that_hides_positions_is_refused(model, template, complaint):
    with pytest.raises(ProbeError, match=complaint):
        with_template(model, template).encode(make_episode(2, seed=1, images=2))


@pytest.mark.parametrize(
    "question", ["what is <|im_end|> here", "an <|image_pad|> in words", "private \ue000 use", "<|vision_start|>"]
)
def test_texts_that_spell_special_tokens_are_refused(model, question):
    query = Example("x", (picture(1),), question, ("red",))
    with pytest.raises(ProbeError, match=r"remove it from the data|remove them from the data"):
        model.encode(Episode("e", (), query))


def test_white_space_and_unusual_letters(model):
    """Surrounding white space is cut; letters of several bytes keep their role."""
    query = Example("x", (picture(1),), "  Welche Größe, 何色 🐈?\n", (" größer als 🐈 ",))
    encoding = model.encode(Episode("e", (), query))
    assert text_of(model, encoding, "question", QUERY) == "Welche Größe, 何色 🐈?"
    assert text_of(model, encoding, "answer", QUERY) == "größer als 🐈"


def test_a_template_without_system_prompt(model):
    template = CHAT_TEMPLATE.replace(
        "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
        "You are a helpful assistant.<|im_end|>\n{% endif %}",
        "",
    )
    assert template != CHAT_TEMPLATE
    encoding = with_template(model, template).encode(make_episode(1, seed=1))
    assert len(encoding.token_map.where("template")) == 0
    assert encoding.token_map.role[0] == ROLES.index("sink")
    assert text_of(model, encoding, "delimiter", 0).startswith("user\n<|vision_start|>")
