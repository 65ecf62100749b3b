"""A loaded model: module, tokenizer, image processor and family, with the few facts that every experiment needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch

from probe.data.example import Episode
from probe.data.images import open_images
from probe.errors import ProbeError, UsageError
from probe.models.encoding import Batch, Encoding, collate, refuse_special_tokens, tokenise
from probe.models.family import Family
from probe.models.prompt import Message, Prompt, expand_images, render_prompt
from probe.models.sites import AttentionSite, Axis, decoder_of, find_sites
from probe.models.weights import acting_weight

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, eq=False)
class Model:
    """A vision-language model ready to be read.

    Made by :func:`probe.load`.

    Attributes
    ----------
    name
        What the user called it.
    module
        The Hugging Face module, in evaluation mode.
    tokenizer, image_processor
        Its own.
    chat_template
        A Jinja template.
    family
        What is special about its kind.
    fingerprint
        Identifies weights, configuration and processor files.
    prompt
        Where the template is from: ``chat template``, the name of a format, or that of a file.
    origin
        ``owner/name@commit`` if it is from the Hugging Face Hub, else empty.
    caveat
        What every picture drawn on this model must say; empty for most.
    """

    name: str
    module: torch.nn.Module
    tokenizer: PreTrainedTokenizerFast
    image_processor: Any
    chat_template: str
    family: Family
    fingerprint: str
    prompt: str = "chat template"
    origin: str = ""
    caveat: str = ""

    # ----------------------------------------------------------------------------------------------------------- facts

    @property
    def config(self) -> Any:
        """The Hugging Face configuration."""
        return self.module.config

    @property
    def text_config(self) -> Any:
        """The configuration of the text stack."""
        return self.config.get_text_config()

    @property
    def layers(self) -> list[torch.nn.Module]:
        """The decoder layers, first to last."""
        return list(decoder_of(self.module).layers)

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @cached_property
    def sites(self) -> tuple[AttentionSite, ...]:
        """The attention modules of the text stack, in the order in which they run."""
        return find_sites(self.module)

    @property
    def image_token(self) -> int | None:
        """The id of tokens that stand for image features; ``None`` where images are no tokens of the text."""
        return self.family.image_token(self.config) if self.family.image_token else None

    @property
    def reads_images_in_text(self) -> bool:
        """Whether images are tokens of the text; else the text reads them through cross-attention."""
        return self.family.image_token is not None

    @property
    def n_heads(self) -> int:
        """Query heads in each layer."""
        return int(self.text_config.num_attention_heads)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return int(getattr(self.text_config, "head_dim", None) or self.text_config.hidden_size // self.n_heads)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the text stack's weights."""
        return next(self.layers[0].parameters()).dtype

    @property
    def attention_implementation(self) -> str:
        """Which kernel the text stack runs: ``sdpa`` or ``eager``."""
        return str(self.text_config._attn_implementation)

    def output_weight(self, layer: int, axis: Axis = "text") -> torch.Tensor:
        """What maps a layer's heads to the residual stream, ``[hidden, heads * head_dim]``.

        Head h owns columns h*head_dim to (h+1)*head_dim. A gate is included, and the weight of a norm that follows
        (which also divides by :meth:`output_size`).
        """
        weight = self._projection(layer, axis)
        if axis == "vision":
            return self.gate(layer).to(weight)[:, None] * weight
        norm = self._norm(layer)
        return weight if norm is None else norm[0].to(weight)[:, None] * weight

    def output_size(self, layer: int, heads: torch.Tensor) -> torch.Tensor | None:
        """What the norm behind self-attention divides by: the root mean square of what all heads together write.

        Parameters
        ----------
        layer
            Index of the decoder layer.
        heads
            Their outputs, ``[batch, head, row, width]``.

        Returns
        -------
        Tensor or None
            ``[batch, row]``; ``None`` in families without such a norm.
        """
        norm = self._norm(layer)
        if norm is None:
            return None
        written = heads.transpose(1, 2).flatten(2).float() @ self._projection(layer, "text").float().T
        return (written.square().mean(-1) + norm[1]).sqrt()

    def _projection(self, layer: int, axis: Axis) -> torch.Tensor:
        site = next(site for site in self.sites if (site.axis, site.layer) == (axis, layer))
        return acting_weight(cast(Any, self.module.get_submodule(site.attention)).o_proj)

    def _norm(self, layer: int) -> tuple[torch.Tensor, float] | None:
        if self.family.norm is None:
            return None
        weight, epsilon = self.family.norm(self.layers[layer])
        return weight.detach(), epsilon

    def gate(self, layer: int) -> torch.Tensor:
        """The factor on what the cross-attention of a layer writes: one number, or ``[hidden]``."""
        site = next(site for site in self.sites if (site.axis, site.layer) == ("vision", layer))
        if self.family.gate is None:
            return torch.ones(1)
        return self.family.gate(self.module.get_submodule(site.block)).detach().flatten()

    def choose_layers(self, layers: Sequence[int] | None, axis: Axis = "text") -> list[int]:
        """The chosen layers that have attention on ``axis``, checked; ``None`` is all of them."""
        there = [site.layer for site in self.sites if site.axis == axis]
        if layers is None:
            return there
        wrong = [layer for layer in layers if not 0 <= layer < self.n_layers]
        if wrong or not layers:
            raise UsageError(
                f"{self.name} has layers 0 to {self.n_layers - 1}; asked for {', '.join(map(str, wrong)) or 'none'}."
            )
        return sorted(set(layers) & set(there))

    # ------------------------------------------------------------------------------------------------------------ text

    def chat(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """Run the chat template."""
        from jinja2.exceptions import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ProbeError(
                f"The chat template of {self.name} fails on a conversation of users and assistants: {error}."
            ) from error
        return cast(str, text)

    def unknown_words(self, episodes: Sequence[Episode]) -> tuple[int, int]:
        """How many tokens of all questions and shown answers the tokenizer does not know, and how many there are."""
        texts = Counter(text for e in episodes for x in e.examples for text in (x.question, x.answer))
        if not texts:
            return 0, 0
        rows = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        unknown = self.tokenizer.unk_token_id
        counts = list(zip(rows, texts.values(), strict=True))
        return sum(row.count(unknown) * n for row, n in counts), sum(len(row) * n for row, n in counts)

    def render(self, episode: Episode) -> Prompt:
        """Render an episode as text whose characters are known; opens no image.

        Raises
        ------
        ProbeError
            If the chat template does not keep the texts as they are, or a text contains a special token.
        """
        prompt = render_prompt(episode, self.chat, self.family.placeholder)
        pair = self.family.placeholder * 2
        if not self.family.adjacent_images and pair in prompt.text:
            raise ProbeError(
                f"Episode {episode.id}: the chat template of {self.name} writes two images without a token between "
                f"them, and {self.family.name} would take them for one; use a template that separates them."
            )
        refuse_special_tokens(prompt, self.tokenizer, episode.id)
        return prompt

    def encode(self, episode: Episode, images: Sequence[Image.Image] | None = None) -> Encoding:
        """Render, tokenise and map one episode (its gold answer included).

        Parameters
        ----------
        episode
            What to encode.
        images
            Its images in reading order, if they are open already (:func:`probe.data.images.open_images`).

        Raises
        ------
        ProbeError
            If an image cannot be read, or the chat template does not keep the texts as they are.
        """
        return self.encode_answers(episode, [episode.query.answer], images)[0]

    def encode_answers(
        self, episode: Episode, answers: Sequence[str], images: Sequence[Image.Image] | None = None
    ) -> list[Encoding]:
        """The same episode with each of several answers to its query; its images are processed once."""
        opened = list(images) if images is not None else open_images(episode)
        try:
            inputs, tokens = self.family.process_images(self, opened) if opened else ({}, [])
        except ValueError as error:  # such as a picture 200 times as wide as it is high
            raise ProbeError(
                f"Episode {episode.id}: the image processor of {self.name} refuses an image: {error}. Sizes (width, "
                f"height) "
                f"are {', '.join(str(image.size) for image in opened)}; replace or crop it."
            ) from error
        image_token = self.image_token
        spelled = cast(str, self.tokenizer.convert_ids_to_tokens(image_token)) if image_token is not None else None
        written = [image.text or (spelled or "") * len(image) for image in tokens]
        encodings = []
        for answer in answers:
            prompt = self.render(replace(episode, query=replace(episode.query, answers=(answer,))))
            expanded = expand_images(prompt, written, spelled, self.family.beside)
            encodings.append(tokenise(expanded, self.tokenizer, image_token, tokens, inputs, episode.id))
        return encodings

    def batch(self, encodings: Sequence[Encoding], *, with_answer: bool = True) -> Batch:
        """Pad encodings on the left and move them to the model's device.

        Raises
        ------
        UsageError
            If the family cannot read these episodes side by side.
        """
        counts = {len(encoding.images) for encoding in encodings}
        if self.family.like_images and len(counts) > 1:
            raise UsageError(
                f"Episodes with {', '.join(map(str, sorted(counts)))} images cannot share a batch: {self.family.name} "
                "reads padding images too. Read them one by one (--batch-size 1), or give all equally many images."
            )
        pad_id = cast(int, self.tokenizer.pad_token_id)
        batch = collate(encodings, pad_id, with_answer=with_answer, by_episode=self.family.by_episode)
        batch.inputs.update(self.family.finish(self, batch))
        return batch.to(self.device)

    def positions(self, batch: Batch) -> torch.Tensor:
        """The positions that the rotary embedding gives the tokens of a batch.

        Returns
        -------
        Tensor
            ``[batch, length]``, or ``[3, batch, length]`` in families that count time, rows and columns apart. Given to
            the model as ``position_ids``, they change nothing but rounding.
        """
        return self.family.positions(self, batch)

    def inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """What a forward of a batch is given: with positions that do not count padding, as generation has them.

        Most families count it in a plain forward. To the model that is the same but for rounding, since rotary
        embeddings are relative; to what reads its queries, such as a vector that is sized by them, it is not.
        """
        if not any(batch.pads) or "position_ids" in batch.inputs:
            return batch.inputs
        return {**batch.inputs, "position_ids": self.positions(batch)}

    # --------------------------------------------------------------------------------------------------------- answers

    def logits(self, batch: Batch, *, logits_to_keep: int = 1) -> torch.Tensor:
        """What the model predicts at the last positions of a batch, ``[batch, kept positions, vocabulary]``."""
        with torch.no_grad():
            out = self.module(**self.inputs(batch), logits_to_keep=logits_to_keep, use_cache=False)
        return cast(torch.Tensor, out.logits)

    def generate(self, batch: Batch, *, max_new_tokens: int, num_beams: int = 1, stop: bool = True) -> list[str]:
        """Answers, greedy or by beam search.

        The checkpoint's own sampling settings (temperature, repetition penalty) are switched off: they belong to
        chatting, and a repetition penalty would punish a model for answering as a demonstration does.

        Parameters
        ----------
        batch
            Prompts that stop before the answer (``with_answer=False``).
        max_new_tokens
            Where to stop at the latest.
        num_beams
            1 is greedy. More are compared by the sum of their log-probabilities, not by the mean over tokens, as the
            published evaluations of in-context vectors do.
        stop
            Whether an answer may end before ``max_new_tokens``; False is for measuring time.

        Returns
        -------
        list of str
            One answer an episode, without special tokens, stripped.
        """
        with self.decoding(max_new_tokens, num_beams, stop):
            ids = cast(Any, self.module).generate(**batch.inputs)
        return self.read_answers(ids, batch)

    @contextmanager
    def decoding(self, max_new_tokens: int, num_beams: int = 1, stop: bool = True) -> Iterator[None]:
        """Set the module to generate deterministically, and back."""
        from transformers import GenerationConfig

        module = cast(Any, self.module)
        own = module.generation_config
        end = own.eos_token_id if own.eos_token_id is not None else self.tokenizer.eos_token_id
        # Transformers fills what a call leaves open from the checkpoint's settings: they are set aside, not overridden.
        module.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=num_beams,
            **({"length_penalty": 0.0} if num_beams > 1 else {}),
            eos_token_id=end if stop else None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        try:
            with torch.no_grad():
                yield
        finally:
            module.generation_config = own

    def read_answers(self, ids: torch.Tensor, batch: Batch) -> list[str]:
        """The texts behind the prompts of a batch."""
        new = ids[:, batch.length :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
