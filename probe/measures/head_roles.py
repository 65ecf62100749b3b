"""What a head does where the answer is predicted: what it looks at, and which labels what it writes speaks for.

With a head's output through its projection, a = W_O z, in the residual stream of the row that predicts the answer, the
gain of the final norm folded into the unembedding rows w_y of the labels' first tokens y in Y:

- *task recognition* (TR): ‖Proj_span(w_y: y in Y) a‖, how much of what it writes is about the labels at all;
- *task learning* (TL): mean over y' != y* of a·(w_y* - w_y') / TR, how much of that speaks for the right one;

both from Yang et al., "Localizing Task Recognition and Task Learning in In-Context Learning via Attention Head
Analysis" (ICLR 2026, arXiv 2509.24164). *Label matching* is about attention: of the mass that the row pays to the
demonstrations' answers, how much goes to those that are right, beyond their share of these tokens:

    (m_right - s m_all) / (1 - s),      s the share of the answers' tokens that are right

It is 1 if all attention goes to right answers, and 0 if the head does not look at answers or does not tell them apart.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def label_matching(
    attention: Float[Tensor, "batch head key"],
    answers: Bool[Tensor, "batch key"],
    right: Bool[Tensor, "batch key"],
) -> Float[Tensor, "batch head"]:
    """Attention to right answers beyond their share.

    Parameters
    ----------
    attention
        Of the row that predicts the answer.
    answers
        Which keys are demonstrations' answers.
    right
        Which of these give the right one.

    Returns
    -------
    Tensor
        In [-1, 1]; NaN where no answer is right, or every one.
    """
    share = (right.sum(-1) / answers.sum(-1))[:, None]
    to_all, to_right = (torch.einsum("bhk,bk->bh", attention, keys.to(attention)) for keys in (answers, right))
    score = (to_right - share * to_all) / (1 - share)
    return score.masked_fill(~((share > 0) & (share < 1)), float("nan"))


def label_logits(
    outputs: Float[Tensor, "head width"],
    projection: Float[Tensor, "head hidden width"],
    labels: Float[Tensor, "label hidden"],
) -> Float[Tensor, "head label"]:
    """How far each head's output points along each label: a·w_y."""
    return torch.einsum("hd,hed,ye->hy", outputs, projection, labels)


def recognition(logits: Float[Tensor, "head label"], labels: Float[Tensor, "label hidden"]) -> Float[Tensor, "head"]:
    """TR: the length of each head's output in the span of the labels, from :func:`label_logits`.

    With G the Gram matrix of the labels, ‖Proj a‖² = cᵀ G⁺ c, where c are the logits; a is never built.
    """
    gram = labels.double() @ labels.double().T
    c = logits.double()
    square = torch.einsum("hy,yz,hz->h", c, torch.linalg.pinv(gram, hermitian=True), c)
    return square.clamp(min=0).sqrt().to(logits.dtype)


def learning(
    logits: Float[Tensor, "head label"], labels: Float[Tensor, "label hidden"], right: int
) -> Float[Tensor, "head"]:
    """TL: how much of each head's output in the span of the labels speaks for the right one, from the same logits.

    NaN where there is no other label, and where a head writes nothing there.
    """
    length = recognition(logits, labels)
    others = torch.cat([logits[:, :right], logits[:, right + 1 :]], 1)
    return (logits[:, right] - others.mean(1)) / length.masked_fill(length == 0, float("nan"))
