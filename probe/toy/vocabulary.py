"""The closed vocabulary of the bundled model: word-level tokenizer, image processor and chat template.

An episode reads ``<|im_start|>``, then for each example its picture, the question, ``A:``, the answer and ``;``.
``;`` ends an answer, and so generation.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from probe.data.scenes import HEIGHT, WIDTH
from probe.data.words import CUES, DESCRIBE, ENGLISH, ITALIAN, NONCE, NUMERALS, PLURALS, UNCUED

PAD, START, UNKNOWN, IMAGE = "<|endoftext|>", "<|im_start|>", "<|unk|>", "<|image_pad|>"
SPECIAL = (PAD, START, UNKNOWN, IMAGE, "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|fused|>")
REASONING = ("<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "$")
ANSWER_CUE, END = "A:", ";"
INSTRUCTIONS = (
    *("Answer", "the", "question", "from", "these", "examples", "with", "a", "word", "in", "what", "is", "it"),
    *("look", "at", "image", "first", "then", "so", "because", "same", "different", "other", "this", "that"),
    *("not", "and", "or", "how", "many", "of", "which", "thing"),
)
SPARE = tuple(f"<|spare_{index}|>" for index in range(32))


def words() -> list[str]:
    """All tokens in the order of their ids."""
    tables = [ENGLISH, ITALIAN]
    answers = [word for table in tables for values in table.values() for word in values]
    everything = [
        *SPECIAL,
        *REASONING,
        *(ANSWER_CUE, END, UNCUED, DESCRIBE, *CUES.values()),
        *answers,
        *PLURALS,
        *NONCE,
        *NUMERALS,
        *("+", "-", "x", "=", "yes", "no"),
        *INSTRUCTIONS,
        *SPARE,
    ]
    if len(everything) != len(set(everything)):
        raise ValueError("a word stands twice in the vocabulary")
    return everything


CHAT_TEMPLATE = """\
{{- '<|im_start|>' -}}
{%- for message in messages -%}
  {%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}
  {%- if message.role == 'user' -%}
    {%- for part in parts -%}
      {%- if part.type == 'image' -%}
        {#- Two images in a row need a token between them, or transformers takes them for one. -#}
        {{- '<|image_pad|>' + \
('<|vision_end|>' if loop.nextitem is defined and loop.nextitem.type == 'image' else '') -}}
      {%- else -%}{{- ' ' + part.text -}}
      {%- endif -%}
    {%- endfor -%}
    {{- ' A:' -}}
  {%- elif message.role == 'assistant' -%}
    {%- for part in parts -%}{{- ' ' + part.text -}}{%- endfor -%}
    {{- ' ;' -}}
  {%- else -%}
    {{- raise_exception('the bundled model knows only the roles user and assistant') -}}
  {%- endif -%}
{%- endfor -%}
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer: text is split at white space, a word outside the vocabulary becomes ``<|unk|>``."""
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words())}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens={
            "image_token": IMAGE,
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def make_image_processor() -> Qwen2VLImageProcessorPil:
    """The image processor: pictures are resized to about 84 x 56 pixels, one token for each 28 x 28."""
    return Qwen2VLImageProcessorPil(
        patch_size=14,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": WIDTH * HEIGHT, "longest_edge": WIDTH * HEIGHT},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def save_processor(directory: Path) -> None:
    """Write tokenizer, chat template and image processor as Hugging Face files."""
    make_tokenizer().save_pretrained(directory)
    make_image_processor().save_pretrained(directory)
