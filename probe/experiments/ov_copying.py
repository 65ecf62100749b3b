"""How much each head copies the tokens that it attends to, from the weights alone."""

from __future__ import annotations

from typing import Any, cast

import torch
import xarray as xr
from torch import Tensor

from probe.errors import UsageError
from probe.experiments.answering import facts
from probe.measures.ov_copying import copying_scores, token_circuit
from probe.models.model import Model
from probe.models.sites import AttentionSite, decoder_of
from probe.models.weights import acting_weight


def ov_copying(model: Model, *, draws: int = 5, seed: int = 0) -> xr.Dataset:
    """Score every head's copying by the eigenvalues of its path from token to logits.

    No text is read: :mod:`probe.measures.ov_copying` says what the score is and what it leaves out. The null pairs each
    token's unembedding with another token's embedding, and so says what a head's weights give that knows no token.

    Parameters
    ----------
    model
        From :func:`probe.load`.
    draws
        Permutations for the null.
    seed
        Of the permutations.

    Returns
    -------
    xarray.Dataset
        ``ov_copying`` (layer, head) and ``ov_copying_null`` (draw, layer, head), in [-1, 1]; NaN for a head that writes
        nothing that is read. Layers with cross-attention alone are left out: what their heads carry are images, which
        are no tokens.

    Raises
    ------
    UsageError
        If ``draws`` or ``seed`` is negative.
    """
    if draws < 0 or seed < 0:
        raise UsageError(f"Draws and a seed are 0 or more; asked for {draws} and {seed}.")
    module = cast(Any, model.module)
    embedding, unembedding = (
        layer.weight.detach() for layer in (module.get_input_embeddings(), module.get_output_embeddings())
    )
    n = min(len(embedding), len(unembedding))  # Mllama has embeddings of tokens that it cannot say
    generator = torch.Generator().manual_seed(seed)
    orders = [None, *(torch.randperm(n, generator=generator).to(embedding.device) for _ in range(draws))]
    last = norm_gain(decoder_of(model.module).norm)
    circuits = [last[:, None] * token_circuit(embedding[:n], unembedding[:n], order) for order in orders]
    sites = [site for site in model.sites if site.axis == "text"]
    by_layer = [[copying_scores(circuit, *head_weights(model, site)) for circuit in circuits] for site in sites]
    scores = torch.stack([torch.stack(drawn) for drawn in by_layer], 1).numpy()
    return xr.Dataset(
        {"ov_copying": (("layer", "head"), scores[0]), "ov_copying_null": (("draw", "layer", "head"), scores[1:])},
        coords={"draw": range(draws), "layer": [site.layer for site in sites], "head": range(model.n_heads)},
        attrs={
            "experiment": "ov_copying",
            **facts(model),
            "seed": seed,
            "n_tokens": n,
            "left_out": "biases; what norms divide by; cross-attention",
            "null": "each token's unembedding with the embedding of another, drawn at random",
        },
    )


def head_weights(model: Model, site: AttentionSite) -> tuple[Tensor, Tensor]:
    """What a layer's heads read from the residual stream as values, and what they write, with the norms' gains.

    Returns
    -------
    tuple of Tensor
        ``[head, hidden, head_dim]`` and ``[head, head_dim, hidden]``, in float32. Query heads that share a value head
        each have it.
    """
    block, attention = (cast(Any, model.module.get_submodule(name)) for name in (site.block, site.attention))
    width = model.head_dim
    value = acting_weight(attention.v_proj).detach().float() * norm_gain(block.input_layernorm)
    value = value.unflatten(0, (-1, width)).transpose(1, 2)
    output = model.output_weight(site.layer).detach().float().T.unflatten(0, (-1, width))
    return value.repeat_interleave(len(output) // len(value), 0), output


def norm_gain(norm: torch.nn.Module) -> Tensor:
    """The factor of a norm on each direction of the residual stream, ``[hidden]``, as it acts.

    Whether it multiplies by its weight or by one more is thereby told without knowing its kind; a bias drops out.
    """
    weight = next(norm.parameters())
    probe = torch.ones_like(weight.detach())
    probe[1::2] = -1  # of mean 0 and mean square 1
    with torch.no_grad():
        gain: Tensor = (norm(probe[None]) - norm(-probe[None]))[0] / (2 * probe)
    return gain.float()
