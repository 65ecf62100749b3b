"""Random Qwen2.5-VL checkpoints with a byte-level BPE tokenizer, built from configs: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from probe.data.example import Episode, Example

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CORPUS = (
    "What colour is the cat? red",
    "How many dogs are on the table? three dogs",
    "Which animal is this? a small brown cat with a long tail",
    "You are a helpful assistant. system user assistant",
) * 4

# The layout of Qwen2.5-VL's template: a system prompt is added, an image stands between vision start and end.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's way of splitting, trained on a few sentences."""
    core = Tokenizer(models.BPE())
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=sorted(alphabet), show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def make_config(tokenizer: PreTrainedTokenizerFast, **text: object) -> Qwen2_5_VLConfig:
    """A tiny configuration; ``text`` overrides the text stack's."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        **text,
    }
    half = sizes["hidden_size"] // sizes["num_attention_heads"] // 2
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("image_pad", "video_pad", "vision_start", "vision_end")
    }
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "rope_parameters": rope,
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **sizes,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": sizes["hidden_size"],
            "num_heads": 2,
            "intermediate_size": 48,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.pad_token_id,
    )


def make_processor(**options: object) -> SimpleNamespace:
    """Tokenizer and image processor, as ``probe.load`` takes them with a module."""
    size = {"shortest_edge": 28 * 28 * 2, "longest_edge": 28 * 28 * 12}
    image_processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2, size=size, **options)
    return SimpleNamespace(tokenizer=make_tokenizer(), image_processor=image_processor, chat_template=CHAT_TEMPLATE)


def make_module(
    processor: SimpleNamespace, *, seed: int = 0, attn: str = "sdpa", std: float = 0.2, **text: object
) -> Qwen2_5_VLForConditionalGeneration:
    """A random model; ``std`` is large enough for attention to be sharp."""
    torch.manual_seed(seed)
    config = make_config(processor.tokenizer, **text)
    module = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attn).float().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() >= 2 and "embed" not in name:
                parameter.normal_(0, std)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return module


def save_checkpoint(directory: Path, *, template: str = "jinja", shards: str = "100KB", video: bool = False) -> Path:
    """Write a checkpoint in the layout of the Hub: sharded safetensors, tokenizer.json, preprocessor_config.json …

    ``template`` says where the chat template lies: ``jinja``, ``json`` or ``tokenizer``.
    """
    processor = make_processor()
    make_module(processor).save_pretrained(directory, max_shard_size=shards)
    tokenizer = processor.tokenizer
    if template != "tokenizer":
        tokenizer.chat_template = None
    tokenizer.save_pretrained(directory)
    processor.image_processor.save_pretrained(directory)
    config = json.loads((directory / "preprocessor_config.json").read_text())
    config["image_processor_type"], config["processor_class"] = "Qwen2VLImageProcessor", "Qwen2_5_VLProcessor"
    (directory / "preprocessor_config.json").write_text(json.dumps(config))
    if template == "jinja":
        (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    elif template == "json":
        (directory / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    if video:
        (directory / "video_preprocessor_config.json").write_text(
            json.dumps({"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 14})
        )
    return directory


def picture(seed: int, size: tuple[int, int] = (84, 56)) -> Image.Image:
    """Noise of a given width and height."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_episode(
    shots: int, *, seed: int = 0, images: int = 1, sizes: tuple[tuple[int, int], ...] = ((84, 56),)
) -> Episode:
    """An episode of random pictures; questions and answers differ in length."""
    rng = np.random.default_rng(seed)
    questions = ("What colour is the cat?", "How many dogs are on the table?", "Which animal is this?")
    answers = ("red", "three dogs", "a small brown cat with a long tail", "brown")

    def example(place: int) -> Example:
        pictures = tuple(
            picture(1000 * seed + 10 * place + i, sizes[int(rng.integers(len(sizes)))]) for i in range(images)
        )
        question, answer = questions[rng.integers(len(questions))], answers[rng.integers(len(answers))]
        return Example(f"e{seed}-{place}", pictures, question, (answer,))

    made = [example(place) for place in range(shots + 1)]
    return Episode(id=f"episode{seed}", demonstrations=tuple(made[:-1]), query=made[-1], seed=seed)
