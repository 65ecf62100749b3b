"""Random checkpoints of 14 model families, each with its genuine processor, built from configs: no download."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers as hf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers.processing_utils import ProcessorMixin

from tests.tiny_qwen import CHAT_TEMPLATE as QWEN2_CHAT
from tests.tiny_qwen import CORPUS

Settings = dict[str, Any]
# What a builder makes: the config's arguments, the image processor, the processor's other arguments.
Parts = tuple[Settings, Any, Settings]


@dataclass(frozen=True)
class Tiny:
    """A module with the processor that is its oracle; base checkpoints have no chat template."""

    module: torch.nn.Module
    processor: Any
    chat_template: str | None


# --- Tokenizers ------------------------------------------------------------------------------------------------------

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The real vocabularies have a token of two newlines, so what an image expands to can merge with the text around it.
NEWLINES = ("User: What is this?\n\nAssistant: a cat\n\nQuestion: What colour is it?\nAnswer: red\n",) * 4


@cache
def trained() -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces in the order of their ids, and merges, of a byte-level BPE."""
    core = byte_level(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator((*CORPUS, *NEWLINES), trainer)
    vocabulary = core.get_vocab()
    merges = json.loads(core.to_str())["model"]["merges"]
    return sorted(vocabulary, key=vocabulary.__getitem__), [(left, right) for left, right in merges]


def byte_level(model: models.BPE) -> Tokenizer:
    core = Tokenizer(model)
    split, level = pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    core.decoder = decoders.ByteLevel()
    return core


@dataclass(frozen=True)
class Words:
    """A tokenizer's special tokens: ``first`` have the lowest ids, ``last`` the highest."""

    common: dict[str, str]  # bos_token, eos_token, pad_token, unk_token
    add_bos: bool = False
    first: str = ""
    last: str = ""
    plain: tuple[str, ...] = ()  # added between the pieces and ``last``, not special
    extra: dict[str, str] | list[str] = field(default_factory=list)  # extra_special_tokens: named, or a mere list

    def tokenizer(self) -> hf.PreTrainedTokenizerFast:
        """The trained pieces among the family's special tokens."""
        pieces, merges = trained()
        vocabulary = {piece: index for index, piece in enumerate([*self.first.split(), *pieces])}
        core = byte_level(models.BPE(vocab=vocabulary, merges=merges))
        core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in self.first.split()])
        core.add_tokens([AddedToken(token, normalized=False) for token in self.plain])
        core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in self.last.split()])
        if self.add_bos:
            bos = self.common["bos_token"]
            ids = [(bos, core.token_to_id(bos))]
            core.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos}:1 $B:1", ids)
        return hf.PreTrainedTokenizerFast(
            tokenizer_object=core, extra_special_tokens=self.extra, padding_side="left", **self.common
        )


def named(**tokens: str) -> dict[str, str]:
    return {f"{name}_token": token for name, token in tokens.items()}


FAKE, UTTERANCE = "<fake_token_around_image>", "<end_of_utterance>"
TILES = "<global-img> " + " ".join(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
CHATML = "<|endoftext|> <|im_start|> <|im_end|>"
LLAMA3_TOKENS = (
    "<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> <|finetune_right_pad_id|> "
    "<|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|> <|python_tag|>"
)
QWEN_TOKENS = (
    "<|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> "
    "<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
)

QWEN = Words(
    named(eos="<|im_end|>", pad="<|endoftext|>"), last=f"<|endoftext|> {QWEN_TOKENS}", extra=QWEN_TOKENS.split()
)
ONEVISION = replace(QWEN, last=f"{CHATML} <image> <video>", extra=named(image="<image>", video="<video>"))
INTERNVL = replace(
    QWEN,
    last=f"{CHATML} <img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box> <video>",
    extra=named(start_image="<img>", end_image="</img>", context_image="<IMG_CONTEXT>", video="<video>"),
)
LLAMA = named(bos="<s>", eos="</s>", unk="<unk>", pad="<unk>")
IDEFICS = Words(LLAMA, True, "<unk> <s> </s>", f"{FAKE} <image>", extra=[FAKE, "<image>"])
IDEFICS2 = replace(IDEFICS, last=f"{FAKE} <image> {UTTERANCE}", extra=[FAKE, "<image>", UTTERANCE])
LLAVA = replace(IDEFICS, common={**LLAMA, "pad_token": "<pad>"}, last="<image> <pad>", extra=named(image="<image>"))
LLAMA3 = named(bos="<|begin_of_text|>", eos="<|eot_id|>", pad="<|finetune_right_pad_id|>")
MLLAMA = Words(LLAMA3, True, last=f"{LLAMA3_TOKENS} <|image|>")
IDEFICS3 = Words(
    named(bos="<|begin_of_text|>", eos="<|end_of_text|>", pad="<|reserved_special_token_0|>"),
    True,
    last=f"{LLAMA3_TOKENS} {FAKE} <image> {UTTERANCE} {TILES}",
    extra=[FAKE, "<image>", UTTERANCE],
)
SMOLVLM = Words(
    named(bos="<|im_start|>", eos=UTTERANCE, pad="<|im_end|>", unk="<|endoftext|>"),
    first=CHATML,
    last=f"{TILES} {FAKE} <image> {UTTERANCE}",
    extra=named(end_of_utterance=UTTERANCE, fake_image=FAKE, global_image="<global-img>", image="<image>"),
)
GEMMA3 = Words(
    named(bos="<bos>", eos="<eos>", unk="<unk>", pad="<pad>"),
    True,
    "<pad> <eos> <bos> <unk> <mask> <start_of_turn> <end_of_turn>",
    "<start_of_image> <end_of_image> <image_soft_token>",
    extra=named(image="<image_soft_token>", boi="<start_of_image>", eoi="<end_of_image>"),
)
PALIGEMMA = replace(
    GEMMA3,
    first="<pad> <eos> <bos> <unk> <mask>",
    plain=(*(f"<loc{i:04}>" for i in range(1024)), *(f"<seg{i:03}>" for i in range(128))),
    last="<image>",
    extra=named(image="<image>"),
)

# --- Chat templates --------------------------------------------------------------------------------------------------


def template(
    opening: str, image: str, closing: str, generation: str, *, begin: str = "", text: str = "{{ part['text'] }}"
) -> str:
    """A template whose every turn is an opening, the parts of its content in their order, and a closing."""
    return (
        begin + "{% for message in messages %}" + opening + "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% elif part['type'] == 'text' %}" + text + "{% endif %}"
        "{% endfor %}" + closing + "{% endfor %}{% if add_generation_prompt %}" + generation + "{% endif %}"
    )


def by_role(user: str, assistant: str) -> str:
    return "{{ '" + user + "' if message['role'] == 'user' else '" + assistant + "' }}"


def chatml(image: str, line: str = "\n", end: str = "\n", **text: str) -> str:
    opening = "<|im_start|>{{ message['role'] }}" + line
    return template(opening, image, "<|im_end|>" + end, "<|im_start|>assistant\n", **text)


def idefics_chat(begin: str = "") -> str:
    opening = "{{ message['role'] | capitalize }}{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    return template(opening, "<image>", f"{UTTERANCE}\n", "Assistant:", begin=begin)


LLAVA_CHAT = template("{{ message['role'] | upper }}: ", "<image>\n", by_role(" ", "</s>"), "ASSISTANT:")
# The answer follows the user's turn at once, so there is nothing for add_generation_prompt to write.
LLAVA_NEXT_CHAT = template(by_role("[INST] ", " "), "<image>\n", by_role(" [/INST]", "</s>"), "")
ONEVISION_CHAT = chatml("<image>", by_role(" ", ""), "", text="{{ '\n' + part['text'] }}")
BOS = {"begin": "{{ bos_token }}", "text": "{{ part['text'] | trim }}"}
TURN = "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
GEMMA3_CHAT = template(TURN, "<start_of_image>", "<end_of_turn>\n", "<start_of_turn>model\n", **BOS)
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
# As the published one, it writes a system prompt only where no message has an image.
MLLAMA_BEGIN = (
    "{{ bos_token }}{% set seen = namespace(images=false) %}{% for message in messages %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{% set seen.images = true %}{% endfor %}"
    "{% endfor %}{% if not seen.images %}" + HEADER.format("system") + "{{ 'Today is Friday.' }}<|eot_id|>{% endif %}"
)
MLLAMA_CHAT = template(
    HEADER.format("{{ message['role'] }}"),
    "<|image|>",
    "<|eot_id|>",
    HEADER.format("assistant"),
    begin=MLLAMA_BEGIN,
    text=BOS["text"],
)

# --- Families: the text sizes are given, the pictures become 4 to 64 tokens ------------------------------------------

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TEXT = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 8192, **HEADS}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
CLIP = {**VISION, "model_type": "clip_vision_model", "num_hidden_layers": 3, "image_size": 24, "projection_dim": 32}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def head_dim(text: Settings) -> int:
    return int(text["hidden_size"] // text["num_attention_heads"])


def config(text: Settings, vision: Settings, **settings: Any) -> Settings:
    return {"text_config": text, "vision_config": vision, **settings}


def qwen(words: Any, text: Settings, vision: Settings, patch: int, **rope: object) -> Parts:
    half = head_dim(text) // 2
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, **rope}
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{key}_token_id": words.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}
    vision = {"depth": 2, "num_heads": 2, "patch_size": patch, "intermediate_size": 48, **vision}
    area = 4 * patch * patch  # of what becomes one token
    size = {"shortest_edge": 2 * area, "longest_edge": 12 * area}
    image_processor = hf.Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, temporal_patch_size=2, size=size)
    return config({**text, "rope_parameters": rope}, vision, **ids), image_processor, {}


def qwen2_vl(words: Any, text: Settings) -> Parts:
    return qwen(words, text, {"embed_dim": 32, "hidden_size": text["hidden_size"], "mlp_ratio": 2}, 14)


def qwen2_5_vl(words: Any, text: Settings) -> Parts:
    vision = {"hidden_size": 32, "out_hidden_size": text["hidden_size"]}
    return qwen(words, text, {**vision, "window_size": 56, "fullatt_block_indexes": [1]}, 14)


def qwen3_vl(words: Any, text: Settings) -> Parts:
    vision: Settings = {"hidden_size": 32, "out_hidden_size": text["hidden_size"]}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    return qwen(words, {"head_dim": head_dim(text), **text}, vision, 16, mrope_interleaved=True)


def llava(words: Any, text: Settings) -> Parts:
    settings = config({"model_type": "llama", **text}, CLIP, image_token_index=words.image_token_id, image_seq_length=9)
    # CLIP's class token is the additional one; the strategy "default" drops it.
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return settings, hf.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=square(24)), options


def llava_next(words: Any, text: Settings) -> Parts:
    settings, _, options = llava(words, {"model_type": "mistral", "sliding_window": None, **text})
    pinpoints = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]  # the published ones, in tiles of 24 pixels
    size, crop = {"shortest_edge": 24}, square(24)
    image_processor = hf.LlavaNextImageProcessorPil(size=size, crop_size=crop, image_grid_pinpoints=pinpoints)
    return {**settings, "image_grid_pinpoints": pinpoints}, image_processor, options


def llava_onevision(words: Any, text: Settings) -> Parts:
    pinpoints = [[24 * rows, 24 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
    ids = {"image_token_index": words.image_token_id, "video_token_index": words.video_token_id}
    anyres = {"vision_aspect_ratio": "anyres_max_4"}  # so that large grids are sampled down
    vision = {**SIGLIP, "image_size": 24}
    settings = config({"model_type": "qwen2", **text}, vision, image_grid_pinpoints=pinpoints, **ids, **anyres)
    options = {"num_image_tokens": 9, "vision_feature_select_strategy": "full", **anyres}
    return settings, hf.LlavaOnevisionImageProcessorPil(size=square(24), image_grid_pinpoints=pinpoints), options


RESAMPLER = {"resampler_n_latents": 8, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16}


def idefics(words: Any, text: Settings) -> Parts:
    settings = {
        **{key: value for key, value in text.items() if key != "num_key_value_heads"},
        "additional_vocab_size": 0,
        "cross_layer_interval": 2,
        "qk_layer_norms": True,
        "alpha_initializer": "ones",
        "alpha_type": "float",
        "use_resampler": True,
        "vision_config": {**VISION, "embed_dim": VISION["hidden_size"], "image_size": 32},
        "perceiver_config": {**RESAMPLER, "use_resampler": True},
    }
    return settings, hf.IdeficsImageProcessorPil(image_size=32), {"image_size": 32}


def idefics2(words: Any, text: Settings) -> Parts:
    perceiver = {**RESAMPLER, "num_key_value_heads": 1, "hidden_size": text["hidden_size"]}
    text, vision = {"model_type": "mistral", "sliding_window": None, **text}, {**VISION, "image_size": 48}
    image = words.convert_tokens_to_ids("<image>")
    size = {"shortest_edge": 32, "longest_edge": 48}
    image_processor = hf.Idefics2ImageProcessorPil(size=size, do_image_splitting=False)
    return config(text, vision, perceiver_config=perceiver, image_token_id=image), image_processor, {"image_seq_len": 8}


def idefics3(words: Any, text: Settings, image_processor: Any = hf.Idefics3ImageProcessorPil) -> Parts:
    text, vision = {"model_type": "llama", **text}, {**VISION, "image_size": 32}
    image = words.convert_tokens_to_ids("<image>")
    sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    pictures = image_processor(**sizes, do_image_splitting=True)
    return config(text, vision, image_token_id=image, scale_factor=2), pictures, {"image_seq_len": 4}


def smolvlm(words: Any, text: Settings) -> Parts:
    return idefics3(words, text, hf.SmolVLMImageProcessorPil)


def internvl(words: Any, text: Settings) -> Parts:
    text, vision = {"model_type": "qwen2", **text}, {**VISION, "image_size": 32}
    settings = config(text, vision, image_token_id=words.context_image_token_id, image_seq_length=4)
    # As published: the image processor does not crop into tiles unless the processor asks it to, which it does.
    image_processor = hf.GotOcr2ImageProcessorPil(size=square(32), crop_to_patches=False, min_patches=1, max_patches=6)
    return settings, image_processor, {"image_seq_length": 4}


def gemma3(words: Any, text: Settings) -> Parts:
    kinds = ["full_attention" if i % 6 == 2 else "sliding_attention" for i in range(text["num_hidden_layers"])]
    head = {"head_dim": head_dim(text), "query_pre_attn_scalar": head_dim(text)}
    text = {**head, "sliding_window": 8, "layer_types": kinds, **text}
    ids = {f"{name}_token_index": getattr(words, f"{name}_token_id") for name in ("image", "boi", "eoi")}
    settings = config(text, {**SIGLIP, "image_size": 32}, mm_tokens_per_image=4, **ids)
    return settings, hf.Gemma3ImageProcessorPil(size=square(32)), {"image_seq_length": 4}


def paligemma(words: Any, text: Settings) -> Parts:
    sizes = {"projection_dim": text["hidden_size"], "hidden_size": text["hidden_size"]}
    text, vision = {"model_type": "gemma", "head_dim": head_dim(text), **text}, {**SIGLIP, "image_size": 32}
    image_processor: Any = hf.SiglipImageProcessorPil(size=square(32))
    image_processor.image_seq_length = 16
    return config(text, vision, image_token_index=words.image_token_id, **sizes), image_processor, {}


def mllama(words: Any, text: Settings) -> Parts:
    crossing = [layer for layer in range(text["num_hidden_layers"]) if layer % 3 == 1]
    rope = {"rope_type": "default", "rope_theta": 1e4}
    vision: Settings = {**VISION, "num_global_layers": 1, "attention_heads": 2, "max_num_tiles": 4, "image_size": 32}
    vision |= {"intermediate_layers_indices": [0], "vision_output_dim": 64}  # the last layer's output and that one's
    text = {"cross_attention_layers": crossing, "rope_parameters": rope, **text}
    image = words.convert_tokens_to_ids("<|image|>")
    image_processor = hf.MllamaImageProcessorPil(size=square(32), max_image_tiles=4)
    return config(text, vision, image_token_index=image), image_processor, {}


@dataclass(frozen=True)
class Family:
    """How a family is put together; ``name`` begins the names of its classes."""

    name: str
    parts: Callable[[Any, Settings], Parts]
    words: Words
    chat_template: str | None
    layers: int = 4
    module: str = "ForConditionalGeneration"
    video: str | None = None  # how the name of its video processor begins


QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
FAMILIES = {
    "qwen2_vl": Family("Qwen2VL", qwen2_vl, QWEN, QWEN2_CHAT, video="Qwen2VL"),
    "qwen2_5_vl": Family("Qwen2_5_VL", qwen2_5_vl, QWEN, QWEN2_CHAT, video="Qwen2VL"),
    "qwen3_vl": Family("Qwen3VL", qwen3_vl, QWEN, chatml(QWEN_IMAGE), video="Qwen3VL"),
    "llava": Family("Llava", llava, LLAVA, LLAVA_CHAT),
    "llava_next": Family("LlavaNext", llava_next, LLAVA, LLAVA_NEXT_CHAT),
    "llava_onevision": Family("LlavaOnevision", llava_onevision, ONEVISION, ONEVISION_CHAT, video="LlavaOnevision"),
    "idefics": Family("Idefics", idefics, IDEFICS, None, module="ForVisionText2Text"),
    "idefics2": Family("Idefics2", idefics2, IDEFICS2, idefics_chat()),
    "idefics3": Family("Idefics3", idefics3, IDEFICS3, idefics_chat("<|begin_of_text|>")),
    "smolvlm": Family("SmolVLM", smolvlm, SMOLVLM, idefics_chat("<|im_start|>"), video="SmolVLM"),
    "internvl": Family("InternVL", internvl, INTERNVL, chatml("<IMG_CONTEXT>\n"), video="InternVL"),
    "gemma3": Family("Gemma3", gemma3, GEMMA3, GEMMA3_CHAT),
    "paligemma": Family("PaliGemma", paligemma, PALIGEMMA, None),
    "mllama": Family("Mllama", mllama, MLLAMA, MLLAMA_CHAT, layers=6),
}
MODEL_TYPES: tuple[str, ...] = tuple(FAMILIES)

# --- Building and saving ---------------------------------------------------------------------------------------------


@contextmanager
def without_video() -> Iterator[None]:
    """Let a processor be made without a video processor, which needs torchvision, and without num2words."""
    check: Any = ProcessorMixin.check_argument_for_proper_class

    def lenient(self: ProcessorMixin, name: str, argument: Any) -> Any:
        return None if name == "video_processor" and argument is None else check(self, name, argument)

    with (
        mock.patch.object(ProcessorMixin, "check_argument_for_proper_class", lenient),
        mock.patch("transformers.models.smolvlm.processing_smolvlm.num2words", str),
    ):
        yield


def build(model_type: str, *, seed: int = 0, attn: str = "sdpa", std: float = 0.2, **text: object) -> Tiny:
    """A random checkpoint; ``std`` is large enough for attention to be sharp, ``text`` overrides the text sizes."""
    family = FAMILIES[model_type]
    words = family.words.tokenizer()
    bos = words.pad_token_id if words.bos_token_id is None else words.bos_token_id
    ids = {"bos_token_id": bos, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    vocabulary = 8 * (len(words) // 8 + 1)  # a few rows more than tokens, as published
    sizes = {**TEXT, **ids, "num_hidden_layers": family.layers, "vocab_size": vocabulary, **text}
    settings, image_processor, options = family.parts(words, sizes)
    if family.video:
        options = {**options, "video_processor": None}
    with without_video():
        make = getattr(hf, f"{family.name}Processor")
        processor = make(image_processor=image_processor, tokenizer=words, **options)
    processor.chat_template = family.chat_template
    assert len(words) < vocabulary, "the processor added tokens"

    torch.manual_seed(seed)
    configuration = getattr(hf, f"{family.name}Config")(**settings)
    module: Any = getattr(hf, family.name + family.module)._from_config(configuration, attn_implementation=attn)
    module = module.float().eval()
    head = module.get_output_embeddings().weight
    tied = head is module.get_input_embeddings().weight
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() >= 2 and ("embed" not in name or (tied and parameter is head)):
                parameter.normal_(0, std)
            elif name.endswith(tuple(f"{side}_{norm}.weight" for side in "qk" for norm in ("norm", "layer_norm"))):
                parameter.add_(1.0)  # twice what it was: normed queries and keys would attend evenly
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif parameter.numel() == 1:  # the gates of Idefics and Mllama
                parameter.fill_(0.7)
    return Tiny(module, processor, family.chat_template)


def save(model_type: str, directory: Path, *, layout: str = "new", shards: str = "100KB") -> Path:
    """Write a checkpoint as the Hub has it: sharded safetensors, tokenizer.json, and a processor in one of two ways.

    ``new`` nests the image processor's settings in processor_config.json and has a chat_template.jinja; ``old`` has
    them in preprocessor_config.json, the template in chat_template.json and the processor's own settings, if there
    are any, in processor_config.json.
    """
    family, tiny = FAMILIES[model_type], build(model_type)
    module: Any = tiny.module
    module.save_pretrained(directory, max_shard_size=shards)
    family.words.tokenizer().save_pretrained(directory)  # as it was: PaliGemma's processor takes the bos token away

    def write(name: str, content: Settings) -> None:
        (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")

    settings = tiny.processor.to_dict()
    if layout == "new":
        if family.video:
            settings["video_processor"] = {"video_processor_type": f"{family.video}VideoProcessor"}
        write("processor_config.json", settings)
        if tiny.chat_template:
            (directory / "chat_template.jinja").write_text(tiny.chat_template)
        return directory

    images, name = settings.pop("image_processor"), settings["processor_class"]
    settings.pop("video_processor", None)
    if model_type in ("qwen2_vl", "qwen2_5_vl"):
        size = images.pop("size")
        images |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    elif model_type == "idefics":
        del images["size"]  # it has image_size
    write("preprocessor_config.json", {**images, "processor_class": name})
    if set(settings) != {"processor_class"}:
        write("processor_config.json", settings)
    if tiny.chat_template:
        write("chat_template.json", {"chat_template": tiny.chat_template})
    return directory
