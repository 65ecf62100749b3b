"""Encoders: pictures and texts become vectors, so that demonstrations can be chosen by likeness.

:func:`own_encoder` takes what the analysed model itself makes of them, :func:`tfidf_encoder` the words of texts, and
:func:`checkpoint_encoder` runs another checkpoint, such as the CLIP of the papers. Vectors are as the encoder makes
them: whoever compares them by their cosine divides by their length. :mod:`probe.models.vector_cache` keeps them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from probe.data.example import Episode, Example, Picture
from probe.data.images import open_image
from probe.errors import ProbeError, UsageError
from probe.models.fingerprint import of_directory
from probe.models.load import placement, reason_of
from probe.models.names import find

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix

    from probe.models.encoding import Encoding
    from probe.models.model import Model

BATCH = 32
"""How many pictures or texts are encoded at once."""

WHERE = "a list of pictures"
"""Who asks for a picture, in the message of an error."""

_LEAVE_OUT = "leave out the example that it belongs to."

Item = TypeVar("Item")


@dataclass(frozen=True)
class Encoder:
    """What turns pictures and texts into vectors; an empty list and what has no vector are a ``ProbeError``.

    Attributes
    ----------
    name
        What it is, with a fingerprint of its weights: two encoders of one name give the same vectors.
    images
        ``pictures -> [n, width]``, float32; ``None`` if it cannot see. Pictures are files or images in memory, opened
        by :func:`probe.data.images.open_image`, as many at a time as are encoded at once.
    texts
        ``texts -> [n, width]``, float32 or sparse; ``None`` if it cannot read.
    cheap
        Whether a vector is made as fast as it is looked up, so that keeping it is no use.
    """

    name: str
    images: Callable[[Sequence[Picture]], NDArray[np.float32]] | None
    texts: Callable[[Sequence[str]], NDArray[np.float32] | csr_matrix] | None
    cheap: bool = False


def own_encoder(model: Model, *, batch_size: int = BATCH) -> Encoder:
    """The analysed model as its own encoder.

    A picture is the mean of its tokens as they enter the first decoder layer: what the connector makes of it, in the
    space of the residual stream. Each picture is encoded alone, in an episode without demonstrations; some families cut
    a picture into more crops there than beside others. Where the text reads pictures through cross-attention, it is the
    mean of what the keys of the first such attention are made from. A text is the mean of the embeddings of its tokens,
    without special tokens and without the white space around it.

    Parameters
    ----------
    model
        Any model of :func:`probe.load`.
    batch_size
        How many pictures go through the model at once.

    Returns
    -------
    Encoder
        Its pictures and texts were not trained to be compared with each other; with cross-attention they may even
        differ in width.
    """

    def encode_images(pictures: Sequence[Picture]) -> Tensor:
        encodings = []
        for picture in pictures:
            image = open_image(picture, where=WHERE)
            # No text reaches the vector. A letter behind a question mark is a token of its own in any vocabulary.
            name = f"of the picture {picture}"
            encodings.append(model.encode(Episode(name, (), Example(name, (image,), "?", ("a",))), [image]))
        return _image_means(model, encodings)

    def encode_texts(texts: Sequence[str]) -> Tensor:
        embed = cast(Any, model.module).get_input_embeddings()
        rows = model.tokenizer([text.strip() for text in texts], add_special_tokens=False)["input_ids"]
        if not all(rows):
            raise ProbeError(f"{model.name} has no token for the text {texts[rows.index([])]!r}; {_LEAVE_OUT}")
        return torch.stack([embed(torch.tensor(row, device=model.device)).float().mean(0) for row in rows])

    return Encoder(
        f"{model.origin or model.name} [{model.fingerprint}, mean of image tokens or embeddings, {model.dtype}]",
        lambda pictures: _encode(pictures, batch_size, encode_images),
        lambda texts: _encode(texts, batch_size, encode_texts),
    )


def _image_means(model: Model, encodings: list[Encoding]) -> Tensor:
    """``[n, width]``: the mean over the tokens of the one image of each encoding."""
    batch = model.batch(encodings, with_answer=False)
    if model.reads_images_in_text:
        reader = model.layers[0]
        places = [e.token_map.where("image") + pad for e, pad in zip(encodings, batch.pads, strict=True)]
    else:
        site = next(site for site in model.sites if site.axis == "vision")
        reader = cast(Any, model.module.get_submodule(site.attention)).k_proj
        places = [e.vision_map.where("image") for e in encodings if e.vision_map is not None]
    entering = _entering(reader, model.module, batch.inputs)
    # The keys of an episode may still be split into tiles: [episode * tile, key, width].
    states = entering.reshape(len(encodings), -1, entering.shape[-1]).float()
    return torch.stack([row[at.tolist()].mean(0) for row, at in zip(states, places, strict=True)])


class _SeenError(Exception):
    """Ends a forward that has got far enough."""


def _entering(part: torch.nn.Module, module: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The hidden states that ``part`` is called with, in a forward of ``module`` that ends there."""
    seen: list[Tensor] = []

    def look(_part: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(arguments[0] if arguments else named["hidden_states"])
        raise _SeenError

    handle = part.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with suppress(_SeenError):
            module(**inputs, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def tfidf_encoder(corpus: Sequence[str]) -> Encoder:
    """Words weighted by how rare they are in a corpus: texts only, no model.

    Words are runs of letters and digits of any length, in lower case. Vectors are those of scikit-learn's
    ``TfidfVectorizer``: sparse and of unit length. A text of which the corpus has no word is a vector of zeros.

    Parameters
    ----------
    corpus
        Where words and their weights are from: the texts of the pool.

    Raises
    ------
    UsageError
        If the corpus has no words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = list(corpus)
    # By default scikit-learn drops words of one character, which are whole answers here: "2", "a".
    vectorizer = TfidfVectorizer(lowercase=True, token_pattern=r"(?u)\b\w+\b", dtype=np.float32)
    try:
        vectorizer.fit(texts)
    except ValueError as error:
        raise UsageError(f"The corpus of {len(texts)} texts has no words to compare by; give other texts.") from error
    digest = hashlib.sha256("".join(f"{len(text)}:{text}" for text in texts).encode()).hexdigest()[:16]
    return Encoder(
        f"tf-idf [{len(texts)} texts {digest}]", None, lambda items: vectorizer.transform(list(items)), cheap=True
    )


def checkpoint_encoder(
    name: str | Path, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> Encoder:
    """Another checkpoint of transformers as the encoder.

    A checkpoint with a tower for each of pictures and texts (CLIP, SigLIP and their like) gives the features that it
    was trained to compare, projection included. Texts to SigLIP are padded to full length, as in its training. Of any
    other checkpoint a text is the mean of the last hidden states over its tokens, special ones included. Of those made
    for another pooling (the first or last token), a prefix to every text, or with further layers (sentence-t5), that
    is not what their authors compute.

    Parameters
    ----------
    name
        A directory in Hugging Face layout, or a repository: ``owner/name`` or ``owner/name@revision``.
    device, dtype
        As in :func:`probe.load`.

    Returns
    -------
    Encoder
        No text is cut: one that is longer than the checkpoint can read is an error.

    Raises
    ------
    UsageError
        If the name means nothing.
    ProbeError
        If the checkpoint cannot be fetched or loaded, or lacks weights.
    """
    number, chosen = placement(dtype, device)
    directory, origin = find(name)
    module, tokenizer, image_processor = _load(directory, number, chosen)
    called, is_dual = origin or str(name), image_processor is not None
    positions = getattr(module.config.get_text_config(), "max_position_embeddings", math.inf)
    longest = min(tokenizer.model_max_length, positions)
    padding = "max_length" if "siglip" in module.config.model_type else "longest"

    def encode_images(pictures: Sequence[Picture]) -> Tensor:
        images = [open_image(picture, where=WHERE) for picture in pictures]
        inputs = image_processor(images=images, return_tensors="pt").to(chosen, module.dtype)
        return _features(module.get_image_features(**inputs))

    def encode_texts(texts: Sequence[str]) -> Tensor:
        for text, row in zip(texts, tokenizer(texts)["input_ids"], strict=True):
            if not text.strip():
                raise ProbeError(f"{called} is to encode the empty text {text!r}; {_LEAVE_OUT}")
            if len(row) > longest:
                raise ProbeError(
                    f"{called} reads at most {longest} tokens, but a text has {len(row)}: {text[:80]!r}. Shorten it, "
                    "or choose another encoder."
                )
        tokens = tokenizer(texts, return_tensors="pt", padding=padding, max_length=longest).to(chosen)
        if is_dual:
            return _features(module.get_text_features(**tokens))
        is_text = tokens["attention_mask"][..., None].bool()
        # Filled, not multiplied: what stands at padding may be no number.
        states = module(**tokens).last_hidden_state.float().masked_fill(~is_text, 0)
        return cast(Tensor, states.sum(1) / is_text.sum(1))

    return Encoder(
        f"{called} [{of_directory(directory)}, {'features' if is_dual else 'mean of states'}, {module.dtype}]",
        (lambda pictures: _encode(pictures, BATCH, encode_images)) if is_dual else None,
        lambda texts: _encode(texts, BATCH, encode_texts),
    )


def _load(directory: Path, dtype: torch.dtype | str, device: torch.device) -> tuple[Any, Any, Any]:
    """Module, tokenizer and, if it has a tower for pictures and one for texts, image processor."""
    import transformers
    from transformers.image_processing_backends import PilBackend
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING as READERS

    if not any(directory.glob("*.safetensors")):
        raise ProbeError(f"{directory} holds no safetensors; choose a revision that has them (owner/name@revision).")
    local: dict[str, Any] = {"local_files_only": True}
    try:
        kind = type(transformers.AutoConfig.from_pretrained(directory, **local))
        # Of models that also write text (T5) only the half that reads it.
        auto = transformers.AutoModelForTextEncoding if kind in READERS else transformers.AutoModel
        settings = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        module, report = auto.from_pretrained(directory, **settings, **local)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **local)
        is_dual = hasattr(module, "get_image_features") and hasattr(module, "get_text_features")
        images = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil", **local) if is_dual else None
    except Exception as error:  # whatever a foreign checkpoint makes transformers raise: the user has to mend it
        raise ProbeError(f"The encoder in {directory} cannot be loaded: {reason_of(error)}") from error
    # The mean of hidden states does not go through the layer that pools the first token, which many files leave out.
    missing = sorted(key for key in report["missing_keys"] if is_dual or not key.startswith("pooler."))
    if missing:
        raise ProbeError(
            f"The encoder in {directory} lacks {len(missing)} weights, such as {missing[0]}; complete the checkpoint."
        )
    if is_dual and not isinstance(images, PilBackend):
        raise ProbeError(f"transformers has no image processor on PIL for the encoder in {directory}; choose another.")
    if tokenizer.pad_token_id is None:
        raise ProbeError(f"The tokenizer in {directory} has no padding token; set `pad_token` in its configuration.")
    return module.to(device).eval(), tokenizer, images


def _features(found: Any) -> Tensor:
    """The features, bare or in a record, depending on the release of transformers."""
    return found if isinstance(found, Tensor) else cast(Tensor, found.pooler_output)


def _encode(items: Sequence[Item], batch_size: int, encode: Callable[[Sequence[Item]], Tensor]) -> NDArray[np.float32]:
    """Encode items, a batch at a time."""
    if not items:
        raise UsageError("There is nothing to encode: the list of pictures or texts is empty.")
    with torch.no_grad():
        batches = (items[start : start + batch_size] for start in range(0, len(items), batch_size))
        vectors = np.concatenate([encode(batch).float().cpu().numpy() for batch in batches])
    wrong = np.count_nonzero(~np.isfinite(vectors).all(1))
    if wrong:
        raise ProbeError(f"{wrong} of {len(vectors)} vectors are not finite; load the encoder in float32 or bfloat16.")
    return vectors
