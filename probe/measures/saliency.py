"""Saliency of attention: which of its weights the loss depends on, and how this flows between groups of positions.

For the attention A_{l,h} of layer l and head h, and a loss L, the saliency matrix of a layer is

    I_l = | sum_h  A_{l,h} * dL/dA_{l,h} |        (element by element; heads are summed first)

(Wang et al., "Label Words are Anchors", EMNLP 2023, section 2, as its code computes it and its author confirmed). An
entry I_l(i, j) is how much L changes, to first order and relative to the change, if the attention of row i to key j is
scaled in all heads at once. It is taken as a flow of information from j to i.

A *flow* is the mean of I_l over the legal pairs from some positions to others: pairs of a row and another position that
this row can see. The diagonal counts nowhere. Two partitions of all legal pairs (p are the demonstrations' answers, q
is the row that predicts the answer):

========================= ============================================== =========================================
flow                      from                                           to
========================= ============================================== =========================================
``wp``                    everything                                     p
``pq``                    p                                              q
``ww``                    the pairs that are neither
``image->answer``         the image of a demonstration                   the answer of the same demonstration
``question->answer``      the question of a demonstration                the answer of the same demonstration
``answer->q``             the demonstrations' answers (the same as pq)   q
``image->q``              the demonstrations' images                     q
``question->q``           the demonstrations' questions                  q
``query image->q``        the query's image                              q
``query question->q``     the query's question                           q
``rest``                  the pairs that are none of these eight
========================= ============================================== =========================================

The first three are S_wp, S_pq and S_ww of the paper, with the answers in place of its label words. The paper's code
divides S_ww by N(N+1)/2 minus the other pairs, which counts the diagonal although it is zero; here only legal pairs
count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ANCHOR_FLOWS = ("wp", "pq", "ww")
"""The paper's, a partition of the legal pairs."""

DEMONSTRATION_FLOWS = ("image->answer", "question->answer", "answer->q", "image->q", "question->q")
"""Those that every demonstration has for itself."""

SPLIT_FLOWS = (*DEMONSTRATION_FLOWS, "query image->q", "query question->q", "rest")
"""The multimodal split, another partition of the legal pairs."""

FLOWS = (*ANCHOR_FLOWS, *SPLIT_FLOWS)


@dataclass(frozen=True)
class Groups:
    """Which of the n positions of one episode are what.

    Attributes
    ----------
    q
        ``[n]``, the row that predicts the answer; in none of the other groups.
    images, questions, answers
        ``[demonstration, n]``, the positions of each demonstration; nothing where it has none.
    query_image, query_question
        ``[n]``.
    """

    q: Bool[Tensor, " n"]
    images: Bool[Tensor, "demonstration n"]
    questions: Bool[Tensor, "demonstration n"]
    answers: Bool[Tensor, "demonstration n"]
    query_image: Bool[Tensor, " n"]
    query_question: Bool[Tensor, " n"]


@dataclass(frozen=True)
class Flows:
    """Sums of saliency over legal pairs, and the numbers of pairs.

    Attributes
    ----------
    total, n_pairs
        ``[flow]``, of :data:`FLOWS`.
    demonstration_total, demonstration_n_pairs
        ``[flow, demonstration]``, of :data:`DEMONSTRATION_FLOWS`.
    """

    total: Float[Tensor, " flow"]
    n_pairs: Int[Tensor, " flow"]
    demonstration_total: Float[Tensor, "own demonstration"]
    demonstration_n_pairs: Int[Tensor, "own demonstration"]

    @property
    def mean(self) -> Float[Tensor, " flow"]:
        """Over legal pairs; NaN without any."""
        return self.total / self.n_pairs

    @property
    def demonstration_mean(self) -> Float[Tensor, "own demonstration"]:
        """The same of each demonstration."""
        return self.demonstration_total / self.demonstration_n_pairs


def saliency_matrix(
    attention: Float[Tensor, "batch head row key"], gradient: Float[Tensor, "batch head row key"]
) -> Float[Tensor, "batch row key"]:
    """``|sum_h A_h * dL/dA_h|``, head by head, so that no second array of all heads is made.

    Parameters
    ----------
    attention
        Weights after the softmax.
    gradient
        Of the loss with respect to them.

    Returns
    -------
    Tensor
        In the unit of the loss.
    """
    total = torch.zeros_like(attention[:, 0])
    for head in range(attention.shape[1]):
        total.addcmul_(attention[:, head], gradient[:, head])
    return total.abs_()


def flows(saliency: Float[Tensor, "n n"], visible: Bool[Tensor, "n n"], groups: Groups) -> Flows:
    """Sum a saliency matrix over the legal pairs of each flow.

    Parameters
    ----------
    saliency
        Row i, key j.
    visible
        Which keys each row can see; the diagonal is left out here.
    groups
        Of the same positions.

    Returns
    -------
    Flows
        A flow without a legal pair has 0 and 0: it has no mean.
    """
    pairs = visible & ~torch.eye(len(visible), dtype=torch.bool, device=visible.device)
    matrix, counted = torch.where(pairs, saliency, 0).double(), pairs.double()
    q, p = groups.q, groups.answers.any(0)
    everything = torch.ones_like(q)
    others = ~(p | q)
    named = (groups.answers | groups.images | groups.questions).any(0) | groups.query_image | groups.query_question
    own = {
        "image->answer": [(a, v) for a, v in zip(groups.answers, groups.images, strict=True)],
        "question->answer": [(a, t) for a, t in zip(groups.answers, groups.questions, strict=True)],
        "answer->q": [(q, a) for a in groups.answers],
        "image->q": [(q, v) for v in groups.images],
        "question->q": [(q, t) for t in groups.questions],
    }
    pooled = {
        "wp": [(p, everything)],
        "pq": [(q, p)],
        "ww": [(others, everything), (q, ~p)],
        **own,
        "query image->q": [(q, groups.query_image)],
        "query question->q": [(q, groups.query_question)],
        "rest": [
            (others, everything),
            (q, ~named),
            *((a, ~(v | t)) for a, v, t in zip(groups.answers, groups.images, groups.questions, strict=True)),
        ],
    }

    def over(values: Tensor, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        """``[part]``: the sum over the rows and keys of each."""
        if not parts:
            return values.new_zeros(0)
        rows, keys = (torch.stack(masks).double() for masks in zip(*parts, strict=True))
        return ((rows @ values) * keys).sum(-1)

    return Flows(
        total=torch.stack([over(matrix, pooled[name]).sum() for name in FLOWS]),
        n_pairs=torch.stack([over(counted, pooled[name]).sum() for name in FLOWS]).long(),
        demonstration_total=torch.stack([over(matrix, own[name]) for name in DEMONSTRATION_FLOWS]),
        demonstration_n_pairs=torch.stack([over(counted, own[name]) for name in DEMONSTRATION_FLOWS]).long(),
    )
