"""The fitted shift: MimIC's form, found without a gradient from what demonstrations do in episodes that are read.

For each head, over the rows of queries and answers, with mu, SA_D and SA_Q of the teacher
(:mod:`probe.vectors.shifts`),

    w, b:  log Z1 ~ w·q + b                          (ridge regression)
    v:     sum mu~ Delta / sum mu~²                  (what leaves least of sum ‖Delta - mu~ v‖²)

where ``log Z1 = log sum_D exp(scale q·k)``, ``Delta = mu (SA_D - SA_Q)``, and ``mu~ = sigmoid(w·q + b - log Z2)`` is
what :class:`~probe.vectors.mimic.Mimic` makes of the regression. Episodes are read twice, since v follows from w and b.

Which q: the student's. It differs from the teacher's by where it stands, a rotation that w·q does not undo, so the
student is read under the oracle (:mod:`probe.vectors.oracle`) at positions of its own, where a vector will be used. On
the bundled model (operator:1 to operator:3, 8 shots, 160 episodes, seed 100), a regression on the student's q explains
0.86 to 0.88 of log Z1 (median over heads, other episodes); one on the teacher's q explains as much, of the teacher, and
nothing once it reads the student's (R² below 0). What vectors recover does not tell the two apart: accuracies of 0.87,
0.82 and 0.98, and of 0.91, 0.80 and 0.98.

The penalty is the same for all heads, on standardised q and for each row: what is made small is the mean of ``(log Z1 -
w·q - b)²`` plus ``penalty * sum_i var(q_i) w_i²``. That is scikit-learn's Ridge on standardised features with ``alpha =
penalty * rows``; it is solved from sums over rows, so that memory does not grow with the number of episodes.

The card's ``fitted`` says how well this describes the episodes that were held out, by layer and head: ``r2`` of log Z1,
and ``explained``, the share of ``sum ‖Delta‖²`` that ``mu~ v`` explains.

References
----------
The form: Jiang et al., "Mimic In-Context Learning for Multimodal Tasks", CVPR 2025, arXiv 2504.08851. The fit is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from probe.data.example import Episode
from probe.errors import UsageError
from probe.models.model import Model
from probe.trace.edit import Edit
from probe.trace.read import LayerValues, read
from probe.trace.steer import check_plain
from probe.vectors.method import Method, Parameters, Steps, all_heads, check_self_attention
from probe.vectors.mimic import Mimic
from probe.vectors.oracle import oracle_of
from probe.vectors.pairs import Pair, encode_pair
from probe.vectors.shifts import NOTHING, Shifts
from probe.vectors.teacher import Teacher
from probe.vectors.training import Training, describe, split
from probe.vectors.vector import Head, InContextVector

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Among which cross-validation chooses."""

FOLDS = 4


@dataclass(frozen=True)
class FittedShift(Method):
    """Options of the fitted shift.

    Attributes
    ----------
    penalty
        Of the regression of log Z1; -1 lets cross-validation over the episodes that are learned from choose.
    """

    penalty: float = -1.0
    name: ClassVar[str] = "fitted-shift"

    def __post_init__(self) -> None:
        if self.penalty < 0 and self.penalty != -1:
            raise UsageError(f"A penalty is 0 or more, or -1 to have it chosen; it is {self.penalty:g}.")

    def acting_heads(self, parameters: Parameters) -> list[Head]:
        """All."""
        return all_heads(parameters["v"])

    def edits(self, parameters: Parameters, *, scale: float = 1.0, heads: Sequence[Head] | None = None) -> list[Edit]:
        """MimIC's."""
        return Mimic().edits(parameters, scale=scale, heads=heads)

    def fit(
        self,
        model: Model,
        episodes: Sequence[Episode],
        *,
        training: Training | None = None,
        teacher: Teacher | None = None,
        directory: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> InContextVector:
        """Read all episodes twice; arguments as for :meth:`Method.fit`, but ``teacher`` and ``directory`` are not used.

        Raises
        ------
        UsageError
            If there are too few episodes to choose a penalty, or a layer has no attention to the text.
        """
        check_plain(model)
        check_self_attention(model)
        options = training or Training()
        learn, validate = split(episodes, options)
        folds = _folds(learn) if self.penalty < 0 else [learn]
        steps = Steps(progress, 2 * len(episodes))
        moments = [_sums(model, part, options.batch_size, _of_regression, steps) for part in (*folds, validate)]
        penalty = self.penalty if self.penalty >= 0 else _choose(moments[:-1])
        line = ridge(_total(moments[:-1]), penalty)

        def of_shift(rows: Rows) -> Sums:
            return _of_shift(rows, line[rows.layer])

        v_sums = [_sums(model, part, options.batch_size, of_shift, steps) for part in (learn, validate)]
        v = v_sums[0]["delta"] / v_sums[0]["square"].clamp_min(torch.finfo(torch.float64).tiny)[..., None]
        fitted: dict[str, object] = {"penalty": penalty, "rows": int(_total(moments[:-1])["n"].max())}
        if validate:
            fitted |= {"r2": _listed(r2(moments[-1], line)), "explained": _listed(explained(v_sums[1], v))}
        parameters = {"v": v, "w": line[..., :-1], "b": line[..., -1]}
        card = {**describe(model, self, episodes, options), "fitted": fitted}
        return InContextVector(self, {name: value.float().contiguous() for name, value in parameters.items()}, card)


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Rows:
    """What one layer's rows of a batch have to say, those of all episodes one after the other; float64.

    Attributes
    ----------
    layer
        Index of the decoder layer.
    q
        ``[head, row, width + 1]``, the student's, and 1.
    log_z1, log_z2
        ``[head, row]``, log of the partition function of the demonstrations, and of the rest.
    delta
        ``[head, row, width]``, ``mu (SA_D - SA_Q)``.
    """

    layer: int
    q: Tensor
    log_z1: Tensor
    log_z2: Tensor
    delta: Tensor

    @classmethod
    def of(cls, layer: int, q: Tensor, shifts: Shifts) -> Rows:
        """Of one episode: ``[head, row, width]``, and what was read of these rows."""
        odds, target = (x.double() for x in shifts.joined([0]))
        total = shifts.log_total.double()
        delta = odds.sigmoid()[..., None] * (target - shifts.rest.double())
        ones = torch.ones_like(q[..., :1], dtype=torch.float64)
        log_z1 = shifts.log_mass[0].double() + total
        return cls(layer, torch.cat([q.double(), ones], -1), log_z1, shifts.log_rest.double() + total, delta)


Sums = dict[str, Tensor]
"""Over rows, by name."""


def _sums(model: Model, episodes: Sequence[Episode], batch_size: int, of: Callable[[Rows], Sums], steps: Steps) -> Sums:
    """Sums over the rows of queries and answers, ``[layer, head, …]``; empty without episodes."""
    sums: Sums = {}
    for start in range(0, len(episodes), batch_size):
        pairs = [encode_pair(model, episode) for episode in episodes[start : start + batch_size]]
        sums = _added(sums, _sums_of_batch(model, pairs, of))
        steps.add(len(pairs))
    return sums


def _sums_of_batch(model: Model, pairs: Sequence[Pair], of: Callable[[Rows], Sums]) -> Sums:
    oracle = oracle_of(model, pairs)
    batch = model.batch([pair.student for pair in pairs])

    def keep(values: LayerValues) -> Sums:
        found: Sums = {}
        if values.axis == "text":
            assert values.attention is not None  # asked for
            for pair, pad, q in zip(pairs, batch.pads, values.attention.q.cpu(), strict=True):
                shifts = oracle.lookups[pair.student.episode].shifts["text", values.layer]
                rows = torch.from_numpy(pair.query)
                rows = rows[shifts.log_mass[0, 0, rows] > NOTHING]  # with a window, some see no demonstration
                found = _added(found, of(Rows.of(values.layer, q[:, rows + pad], shifts.at(rows))))
        return found

    reading = read(model, batch, ("attention",), keep, oracle.edits())
    layers = [reading.layers[layer] for layer in range(model.n_layers)]
    return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}


def _added(sums: Sums, more: Sums) -> Sums:
    return {name: value + sums[name] for name, value in more.items()} if sums else more


def _of_regression(rows: Rows) -> Sums:
    """What a regression of log Z1 needs; its last feature is 1."""
    return {
        "n": torch.full((len(rows.q),), float(rows.q.shape[1]), dtype=torch.float64),
        "xx": rows.q.transpose(1, 2) @ rows.q,
        "xy": torch.einsum("hrd,hr->hd", rows.q, rows.log_z1),
        "yy": rows.log_z1.square().sum(-1),
    }


def _of_shift(rows: Rows, line: Tensor) -> Sums:
    """What the least squares of the shift need; ``line`` is ``[head, width + 1]``."""
    mu = torch.sigmoid(torch.einsum("hrd,hd->hr", rows.q, line) - rows.log_z2)
    return {
        "delta": torch.einsum("hr,hrd->hd", mu, rows.delta),
        "square": mu.square().sum(-1),
        "size": rows.delta.square().sum((-1, -2)),
    }


# ------------------------------------------------------------------------------------------------------------- fitting


def ridge(sums: Mapping[str, Tensor], penalty: float) -> Tensor:
    """Ridge regression from sums over rows: w and b, ``[…, width + 1]``.

    Parameters
    ----------
    sums
        ``n [...]``, and of features whose last is 1 ``xx [..., width + 1, width + 1]``, with the target ``xy [...,
        width + 1]``.
    penalty
        On standardised features, for each row.
    """
    n, xx, xy = sums["n"].clamp_min(1.0), sums["xx"], sums["xy"]
    mean, target = xx[..., -1, :-1] / n[..., None], xy[..., -1] / n
    covariance = xx[..., :-1, :-1] / n[..., None, None] - mean[..., :, None] * mean[..., None, :]
    toward = xy[..., :-1] / n[..., None] - mean * target[..., None]
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    floor = 1e-12 * variance.amax(-1, keepdim=True).clamp_min(
        torch.finfo(variance.dtype).tiny
    )  # features may be constant
    w = torch.linalg.solve(covariance + torch.diag_embed(penalty * variance + floor), toward)
    return torch.cat([w, (target - (w * mean).sum(-1))[..., None]], -1)


def r2(sums: Mapping[str, Tensor], line: Tensor) -> Tensor:
    """Share of the variance of log Z1 that a line explains, ``[…]``; NaN where there is none."""
    off = sums["yy"] - 2 * (line * sums["xy"]).sum(-1) + torch.einsum("...i,...ij,...j->...", line, sums["xx"], line)
    whole = sums["yy"] - sums["xy"][..., -1].square() / sums["n"]
    return torch.where(whole > 0, 1 - off / whole, torch.full_like(whole, float("nan")))


def explained(sums: Mapping[str, Tensor], v: Tensor) -> Tensor:
    """Share of ``sum ‖Delta‖²`` that ``mu~ v`` explains, ``[…]``; NaN where there is no shift."""
    off = sums["size"] - 2 * (v * sums["delta"]).sum(-1) + sums["square"] * v.square().sum(-1)
    size = sums["size"]
    return torch.where(size > 0, 1 - off / size, torch.full_like(size, float("nan")))


def _choose(folds: Sequence[Sums]) -> float:
    """The penalty with the best mean R² over heads and folds, each predicted from the others."""
    scores = []
    for penalty in PENALTIES:
        found = [r2(own, ridge(_total([x for x in folds if x is not own]), penalty)) for own in folds]
        scores.append(float(torch.stack(found).nanmean()))
    return PENALTIES[scores.index(max(scores))]


def _folds(episodes: Sequence[Episode]) -> list[list[Episode]]:
    """Parts of the episodes; those of one query are in the same."""
    queries = {name: i for i, name in enumerate(dict.fromkeys(episode.query.id for episode in episodes))}
    if len(queries) < FOLDS:
        raise UsageError(
            f"To choose a penalty takes {FOLDS} queries or more to learn from, and there are {len(queries)}; give more "
            "episodes, or a penalty."
        )
    return [[e for e in episodes if queries[e.query.id] % FOLDS == fold] for fold in range(FOLDS)]


def _total(parts: Sequence[Sums]) -> Sums:
    return reduce(_added, parts)


def _listed(values: Tensor) -> list[list[float | None]]:
    """As JSON has it, with three digits behind the point."""
    return [[None if value != value else round(value, 3) for value in row] for row in values.tolist()]
