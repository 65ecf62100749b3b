"""How demonstrations shift what a head gives: the exact split of attention that LIVE and MimIC build on.

For a query row q, the keys D of the demonstrations and the keys Q of everything else,

    SA(q, [K_D; K_Q]) = (1 - mu) SA_Q + mu SA_D = SA_Q + mu (SA_D - SA_Q),

where SA_D and SA_Q are the outputs of attention to D alone and to Q alone, and mu, the attention mass of D, is
``Z_D / (Z_D + Z_Q)`` with ``Z = sum exp(scale q·k)``. So the demonstrations do two things: they choose a direction,
SA_D - SA_Q, and say how far to go, mu. What they add to the residual stream is ``mu (SA_D - SA_Q) W_O``.

Q here is read in the presence of D: layers below have mixed demonstrations into its keys and values, so SA_Q is not
what the head would give without demonstrations.

References
----------
Peng et al. (2024), "LIVE: Learnable In-Context Vector for Visual Question Answering", arXiv 2406.13185; Jiang et al.
(2025), "Mimic In-Context Learning for Multimodal Tasks", arXiv 2504.08851.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TOKENS = 16384
"""How many rows of the unembedding are brought to float32 at a time."""


@dataclass(frozen=True)
class Split:
    """Attention of some rows, split into demonstrations and the rest.

    Attributes
    ----------
    mu
        ``[batch, head, row]``, the attention mass of the demonstrations.
    of_demonstrations, of_rest
        ``[batch, head, row, width]``, SA_D and SA_Q; NaN where there is nothing to attend to: none of the keys is
        visible, or they have less mass than the smallest number there is.
    """

    mu: Float[Tensor, "batch head row"]
    of_demonstrations: Float[Tensor, "batch head row width"]
    of_rest: Float[Tensor, "batch head row width"]

    @property
    def difference(self) -> Float[Tensor, "batch head row width"]:
        """``SA_D - SA_Q``; NaN where either is undefined."""
        return self.of_demonstrations - self.of_rest

    @property
    def shift(self) -> Float[Tensor, "batch head row width"]:
        """``mu (SA_D - SA_Q)``; 0 where mu is."""
        mu = self.mu[..., None]
        return torch.where(mu > 0, mu * self.difference, torch.zeros_like(self.of_rest))

    @property
    def rebuilt(self) -> Float[Tensor, "batch head row width"]:
        """``SA_Q + mu (SA_D - SA_Q)``, which must be the output of the whole attention."""
        return torch.where(self.of_rest.isnan(), self.of_demonstrations, self.of_rest + self.shift)


def split_attention(
    attention: Float[Tensor, "batch head row key"],
    v: Float[Tensor, "batch kv key width"],
    demonstrations: Bool[Tensor, "batch key"],
    rest: Bool[Tensor, "batch key"],
) -> Split:
    """Split the attention of rows into that to the demonstrations and that to the rest.

    Parameters
    ----------
    attention
        From :func:`probe.measures.mass.row_attention`; each row sums to 1.
    v
        As the kernel gets them; a head of the group ``kv`` shares its values with the others.
    demonstrations, rest
        Which keys belong to each; padding belongs to neither.

    Returns
    -------
    Split
        In the precision of ``attention``.
    """
    values = v.to(attention.dtype)
    mu, of_demonstrations = _restricted(attention, values, demonstrations)
    _, of_rest = _restricted(attention, values, rest)
    return Split(mu, of_demonstrations, of_rest)


def _restricted(
    attention: Float[Tensor, "batch head row key"],
    v: Float[Tensor, "batch kv key width"],
    keys: Bool[Tensor, "batch key"],
) -> tuple[Float[Tensor, "batch head row"], Float[Tensor, "batch head row width"]]:
    """The mass of some keys, and the output of attention to them alone: NaN where they have no mass."""
    batch, heads, n_rows, n_keys = attention.shape
    kv = v.shape[1]
    part = attention * keys[:, None, None]
    mass = part.sum(-1)
    mass = mass.where(mass >= torch.finfo(mass.dtype).tiny, torch.zeros_like(mass))  # below, digits are lost
    outputs = (part.reshape(batch, kv, heads // kv * n_rows, n_keys) @ v).view(batch, heads, n_rows, -1)
    return mass, (outputs / mass[..., None]).masked_fill((mass == 0)[..., None], float("nan"))


def mean_unembedding(weight: Float[Tensor, "token hidden"]) -> Float[Tensor, "hidden"]:
    """The mean row of the unembedding, which reads the mean logit, in float32."""
    total = torch.zeros(weight.shape[1], device=weight.device)
    for start in range(0, len(weight), TOKENS):
        total += weight[start : start + TOKENS].detach().float().sum(0)
    return total / len(weight)


def logit_directions(
    unembedding: Float[Tensor, "token hidden"],
    mean: Float[Tensor, "hidden"],
    gain: Float[Tensor, "hidden"],
    tokens: Int[Tensor, "batch row"],
) -> Float[Tensor, "batch row hidden"]:
    """What reads, off the residual stream, the logit of a token minus the mean logit, but for the scale of the norm.

    Parameters
    ----------
    unembedding
        One row a token.
    mean
        From :func:`mean_unembedding`.
    gain
        Of the final norm.
    tokens
        A token for each row.

    Returns
    -------
    Tensor
        ``gain * (U[token] - mean)``, in float32.
    """
    return gain * (unembedding[tokens].detach().float() - mean)


def frozen_scale(
    normed: Float[Tensor, "batch row hidden"],
    stream: Float[Tensor, "batch row hidden"],
    gain: Float[Tensor, "hidden"],
) -> Float[Tensor, "batch row"]:
    """By how much a norm scaled a stream: the s of ``normed = s * gain * stream`` (least squares), in float32.

    It is 1 / root mean square in the norms of all families here; held fixed, the norm is linear.
    """
    weighted = gain * stream.float()
    scale: Tensor = (normed.float() * weighted).sum(-1) / weighted.square().sum(-1)
    return scale


def direct_effect(
    outputs: Float[Tensor, "batch head row width"],
    weight: Float[Tensor, "hidden width_of_heads"],
    directions: Float[Tensor, "batch row hidden"],
) -> Float[Tensor, "batch head row"]:
    """What each head adds along a direction of the residual stream: ``(z_h W_O^h) · direction``.

    Parameters
    ----------
    outputs
        Of the heads, or what shifts them.
    weight
        Of the output projection; head h owns columns h * width to (h + 1) * width.
    directions
        From :func:`logit_directions`; times the frozen scale of the final norm, the result is a change of logits.
    """
    read = (directions @ weight.detach().float()).unflatten(-1, (outputs.shape[1], -1))
    return torch.einsum("bhrd,brhd->bhr", outputs, read)
