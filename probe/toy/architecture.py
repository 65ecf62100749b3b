"""The bundled model's architecture, and the two shortcuts that make its training fast.

The model is a plain ``Qwen2_5_VLForConditionalGeneration``. Training calls its own blocks, but replaces the vision
tower's loop over images by one batch (all pictures have the same size, :class:`ImageEncoder`) and attention by explicit
products (:class:`Decoder`), which also give the weights that attention guidance needs. Tests hold both equal to the
Hugging Face forward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision, rotate_half

from probe.data.scenes import COLUMNS, HEIGHT, ROWS, WIDTH
from probe.toy.vocabulary import make_tokenizer, words

PATCH, MERGE = 14, 2
GRID = (1, HEIGHT // PATCH, WIDTH // PATCH)
IMAGE_TOKENS = ROWS * COLUMNS


@dataclass(frozen=True)
class Size:
    """The numbers that set the model's size."""

    hidden: int = 128
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 256
    vision_hidden: int = 64
    vision_layers: int = 2
    vision_heads: int = 4
    vision_feed_forward: int = 160
    init_std: float = 0.06


def build(size: Size, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A model with random weights, in fp32."""
    tokenizer = make_tokenizer()
    half = size.hidden // size.heads // 2
    special: dict[str, Any] = {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(words()),
            "hidden_size": size.hidden,
            "intermediate_size": size.feed_forward,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": 1024,
            "initializer_range": size.init_std,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8],
            },
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_hidden,
            "out_hidden_size": size.hidden,
            "num_heads": size.vision_heads,
            "intermediate_size": size.vision_feed_forward,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": 8 * PATCH,
            "fullatt_block_indexes": list(range(size.vision_layers)),
            "initializer_range": size.init_std,
        },
        tie_word_embeddings=False,
        **special,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa").float()
    return cast(Qwen2_5_VLForConditionalGeneration, model)


class ImageEncoder(nn.Module):
    """The vision tower on a batch of pictures of the one training size."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration) -> None:
        super().__init__()
        self.tower = model.model.visual
        n_patches = GRID[1] * GRID[2]
        rotary: list[Tensor] = []
        # The tower's own code gives the rotary table of one picture; it is the same for all.
        handle = self.tower.blocks[0].register_forward_pre_hook(
            lambda _module, _args, kwargs: rotary.extend(kwargs["position_embeddings"]), with_kwargs=True
        )
        width = 3 * 2 * PATCH * PATCH
        with torch.no_grad():
            self.tower(torch.zeros(n_patches, width), grid_thw=torch.tensor([GRID]))
        handle.remove()
        self.cos, self.sin = rotary

    def forward(self, patches: Tensor) -> Tensor:
        """``[pictures, patches, 3*2*14*14]`` -> ``[pictures, image tokens, hidden]``."""
        tower, n = self.tower, len(patches)
        # Patches do not overlap: the tower's convolution is a product, and as such much faster on a CPU.
        states = patches @ tower.patch_embed.proj.weight.flatten(1).T
        for block in tower.blocks:
            states = states + self._attention(block.attn, block.norm1(states))
            states = states + block.mlp(block.norm2(states))
        return cast(Tensor, tower.merger(states.flatten(0, 1)).view(n, IMAGE_TOKENS, -1))

    def _attention(self, attn: Any, states: Tensor) -> Tensor:
        n, length, _ = states.shape
        query, key, value = attn.qkv(states).view(n * length, 3, attn.num_heads, -1).unbind(1)
        cos, sin = self.cos.repeat(n, 1), self.sin.repeat(n, 1)
        query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
        query, key, value = (x.view(n, length, attn.num_heads, -1).transpose(1, 2) for x in (query, key, value))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return cast(Tensor, attn.proj(mixed.transpose(1, 2).reshape(n, length, -1)))


@dataclass
class Decoded:
    """What the decoder gave: ``states`` after the last norm, ``[batch, position, hidden]``, and what was watched.

    By watched layer, ``attention`` holds the weights, ``[batch, head, query, key]``, and ``stream`` the residual stream
    behind the layer, ``[batch, position, hidden]``.
    """

    states: Tensor
    attention: dict[int, Tensor]
    stream: dict[int, Tensor]


class Decoder(nn.Module):
    """The decoder on a batch that is padded on the right.

    Attention is written out: on a CPU its backward pass is twice as fast as that of the fused kernel at these lengths,
    and the weights are at hand. Under autocast the products are in bfloat16, the residual stream stays in float32.
    """

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration) -> None:
        super().__init__()
        self.text = model.model.language_model

    def forward(self, embedded: Tensor, positions: Tensor, watch: frozenset[int] = frozenset()) -> Decoded:
        """``[batch, position, hidden]`` and ``[3, batch, position]`` -> :class:`Decoded`."""
        cos, sin = (table[:, None] for table in self.text.rotary_emb(embedded, positions))
        future = torch.ones(embedded.shape[1], embedded.shape[1], dtype=torch.bool).triu(1)
        states, attention, stream = embedded, {}, {}
        for index, layer in enumerate(self.text.layers):
            mixed, weights = self._attention(layer.self_attn, layer.input_layernorm(states), cos, sin, future)
            states = states + mixed
            states = states + layer.mlp(layer.post_attention_layernorm(states))
            if index in watch:
                attention[index], stream[index] = weights, states
        return Decoded(self.text.norm(states), attention, stream)

    def _attention(self, attn: Any, states: Tensor, cos: Tensor, sin: Tensor, future: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, _ = states.shape
        query, key, value = (
            project(states).view(batch, length, -1, attn.head_dim).transpose(1, 2)
            for project in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        query, key = (x * cos + rotate_half(x) * sin for x in (query, key))
        heads, kv_heads = query.shape[1], key.shape[1]
        grouped = (query * attn.scaling).reshape(batch, kv_heads, heads // kv_heads * length, attn.head_dim)
        scores = (grouped @ key.transpose(-1, -2)).view(batch, heads, length, length).float()
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        mixed = weights.to(value.dtype).view(batch, kv_heads, -1, length) @ value
        mixed = mixed.view(batch, heads, length, attn.head_dim).transpose(1, 2).reshape(batch, length, -1)
        return attn.o_proj(mixed), weights


def seed_look_back(
    model: Qwen2_5_VLForConditionalGeneration, heads: dict[tuple[int, int], int], sharpness: float
) -> None:
    """Set query and key biases so that a head starts by looking a fixed distance back.

    For distance d, the bias vectors are chosen on the rotary frequencies w of the temporal section so that their score
    is ``sharpness^2 * sum(cos((distance - d) w)) / sqrt(head_dim)``. They stay trainable.

    Parameters
    ----------
    model
        Changed in place.
    heads
        Distance in positions for each (layer, head).
    sharpness
        Size of each bias entry.
    """
    text = model.config.get_text_config()
    width = text.hidden_size // text.num_attention_heads
    groups = text.num_attention_heads // text.num_key_value_heads
    n_freq = text.rope_parameters["mrope_section"][0]
    frequency = [text.rope_parameters["rope_theta"] ** (-2 * i / width) for i in range(n_freq)]
    with torch.no_grad():
        for (layer, head), distance in heads.items():
            attn = model.model.language_model.layers[layer].self_attn
            query = attn.q_proj.bias.view(text.num_attention_heads, width)[head]
            key = attn.k_proj.bias.view(text.num_key_value_heads, width)[head // groups]
            for i, w in enumerate(frequency):
                key[i], key[i + width // 2] = sharpness, 0.0
                query[i] = sharpness * math.cos(distance * w)
                query[i + width // 2] = -sharpness * math.sin(distance * w)
