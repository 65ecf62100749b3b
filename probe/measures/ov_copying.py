"""Whether what a head reads from a token makes that token more likely: copying, from the weights alone.

A head that attends to a token t adds ``W_E[t] W_V W_O`` to the residual stream, which the unembedding turns into
logits. Over all tokens this is the matrix

    M = W_E diag(a) W_V W_O diag(b) W_U,

tokens by tokens, with the gains a of the norm before attention and b of the norms behind it. Its eigenvalues say
whether tokens raise their own logits (positive), lower them (negative), or those of others; the score is

    sum(Re λ) / sum(|λ|), from -1 to 1.

M has the rank of one head, and its eigenvalues other than 0 are those of ``W_O diag(b) (W_U W_E) diag(a) W_V``, a
matrix as small as a head is wide. ``W_U W_E`` is shared by all heads.

What is left out: biases, the normalisation itself (by a number that varies from token to token; the mean that a
LayerNorm takes away), and whatever the layers between do to the token and to what the head writes.

References
----------
Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits", section on copying heads.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

TOKENS = 16384
"""How many tokens are brought to float32 at a time."""


def token_circuit(
    embedding: Float[Tensor, "token hidden"],
    unembedding: Float[Tensor, "token hidden"],
    order: Int[Tensor, "token"] | None = None,
) -> Float[Tensor, "hidden hidden"]:
    """``W_U W_E``: the product of what tokens write and what they are read by, summed over the tokens.

    Parameters
    ----------
    embedding, unembedding
        One row a token.
    order
        Which token's embedding stands in place of each token's: a permutation, to see what chance gives.
    """
    total = torch.zeros(unembedding.shape[1], embedding.shape[1], device=embedding.device)
    for start in range(0, len(embedding), TOKENS):
        part = slice(start, start + TOKENS)
        written = embedding[part] if order is None else embedding[order[part]]
        total += unembedding[part].float().T @ written.float()
    return total


def copying_scores(
    circuit: Float[Tensor, "hidden hidden"],
    value: Float[Tensor, "head hidden width"],
    output: Float[Tensor, "head width hidden"],
) -> Float[Tensor, "head"]:
    """The copying score of each head.

    Parameters
    ----------
    circuit
        From :func:`token_circuit`.
    value
        ``diag(a) W_V`` of each head (of the group that it shares its values with).
    output
        ``W_O diag(b)`` of each head.

    Returns
    -------
    Tensor
        In [-1, 1], on the CPU in float64; NaN for a head that leads from no token to any.
    """
    # Here, because it takes seconds; it starts no process and asks nothing of the network.
    from transformer_lens import FactoredMatrix

    eigenvalues = FactoredMatrix((circuit @ value).cpu().double(), output.cpu().double()).eigenvalues
    scores: Tensor = eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1)
    return scores
