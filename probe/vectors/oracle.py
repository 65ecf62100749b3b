"""The oracle: what demonstrations do to every head at every row, put back without them.

With mu and SA_D of the teacher's own forward (:mod:`probe.vectors.shifts`), every head of the student gives

    o' = SA_Q + mu (SA_D - SA_Q),

where SA_Q is what it gives by itself. By induction over layers this is the forward with demonstrations, to rounding:
nothing that they do goes by another way. So it is the ceiling of vectors that act on heads, and what is lost when mu or
the shift d = SA_D - SA_Q is replaced says what such a vector cannot do without:

=====================  ================================================================================================
option                 what each row gets
=====================  ================================================================================================
``mu="own"``           its mu
``mu="mean"``          one number a head: the mean of mu over rows
``shift="own"``        its d: the teacher's SA_D minus the student's SA_Q, as that is
``shift="mean"``       one vector a head: the v that leaves least of ``sum ‖mu d - mu v‖²``, which is
                       ``sum mu² d / sum mu²``
``shift="direction"``  the direction of its d with one length a head: the s that leaves least of ``sum ‖mu d - mu s
                       d/‖d‖‖²``, which is ``sum mu² ‖d‖ / sum mu²``
``shift="size"``       the length of its d with one direction a head: the unit vector u that leaves least of ``sum ‖mu d
                       - mu ‖d‖ u‖²``, which is that of ``sum mu² ‖d‖ d``
``modalities``         mu and SA_D as if demonstrations had the keys of these modalities alone: ``mu_m = Z_m / (Z_m +
                       Z_Q)``; keys and values stay as they were with all
=====================  ================================================================================================

Means are over all rows of the *other half* of the episodes (every second one) that see demonstrations. Rows that see
none are never changed. Layers, heads and rows are chosen as with any vector (:meth:`Oracle.edits`).

Exactness takes more of the student than its heads (:meth:`Oracle.as_in_context`): the teacher's positions, since the
query stands further from the sink when demonstrations stand between; and in families with cross-attention, open gates
for rows that saw a demonstration's image. A vector has neither, so an ablation that is to be compared with vectors is
read where the student stands by itself; the two can differ much. With sliding windows, demonstrations push keys out of
the window: for such rows SA_Q is computed again, from the keys that the teacher's row could see.

In families with cross-attention, text between the last demonstration and the query's image looks at the demonstration's
image. That is attention with mu = 1 on the axis of images, and it is put back too; ``mu`` and ``shift`` do not apply to
it. A query without an image has no cross-attention to put it back into, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from probe.data.example import Episode
from probe.errors import UsageError, did_you_mean
from probe.models.encoding import Batch, Encoding
from probe.models.model import Model
from probe.trace.edit import Context, Edit
from probe.trace.rows import meant, parse_rows
from probe.trace.steer import check_plain
from probe.vectors.lookup import GATES, Lookup, Place, output_alone, read_lookups
from probe.vectors.method import check_heads, widen
from probe.vectors.pairs import Pair, encode_pair
from probe.vectors.shift_means import Means, means_of
from probe.vectors.shifts import NOTHING, Shifts, choose_parts, part_names
from probe.vectors.vector import Head, model_facts

Mu = Literal["own", "mean"]
Shift = Literal["own", "mean", "direction", "size"]


@dataclass(frozen=True, eq=False)
class Oracle:
    """What demonstrations did in some episodes; made by :func:`read_oracle`, and injected like a vector.

    It answers for these episodes alone, in any batch of them, and only where the teacher has been: in prompts and their
    gold answers, not in what is generated. For every episode and layer it holds ``2 * heads * positions * head_dim``
    numbers (twice as many with the parts of the demonstrations apart): linear in the length of the query, whatever the
    number of shots.

    Attributes
    ----------
    lookups
        By the episode's id.
    facts
        What model it is of.
    parts
        The parts of demonstrations that were read apart.
    mu, shift
        What is put back; see the tables above. Change them with :func:`dataclasses.replace`.
    modalities
        Whose keys demonstrations have, of ``visual``, ``textual`` and ``structural``; default all.
    """

    lookups: Mapping[str, Lookup]
    facts: Mapping[str, object]
    parts: tuple[str, ...]
    mu: Mu = "own"
    shift: Shift = "own"
    modalities: tuple[str, ...] = ()
    _kept: dict[Place, tuple[Means, ...]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for what, given, known in (("mu", self.mu, get_args(Mu)), ("shift", self.shift, get_args(Shift))):
            if given not in known:
                raise UsageError(f"There is no {what} {given!r} of an oracle; {did_you_mean(given, known)}")
        choose_parts(self.modalities, self.parts)

    @property
    def label(self) -> str:
        """How tables and messages call it."""
        parts = [f"{n}={v}" for n, v in (("mu", self.mu), ("shift", self.shift)) if v != "own"]
        return " ".join(["oracle", *parts, *(["+".join(self.modalities)] if self.modalities else [])])

    def check(self, model: Model) -> None:
        """Refuse a model that it was not read off.

        Raises
        ------
        UsageError
            If it is another.
        """
        if model_facts(model) != self.facts:
            raise UsageError(f"The oracle was read off another model than {model.name}; read it off this one.")

    def edits(
        self,
        *,
        scale: float = 1.0,
        layers: Sequence[int] | None = None,
        heads: Sequence[Head] | None = None,
        rows: str | None = None,
    ) -> list[Edit]:
        """What it changes in a forward of queries without demonstrations.

        Parameters
        ----------
        scale
            How much of the way is gone from the head's own output to the oracle's.
        layers, heads, rows
            Where, as for :meth:`probe.InContextVector.edits`; default everywhere.

        Raises
        ------
        UsageError
            If a layer or head does not exist, or there is no other half to take a mean over.
        """
        if (layers is not None and not layers) or (heads is not None and not heads):
            raise UsageError("The oracle is to act in no layer or head; name one, or leave the choice out.")
        places = next(iter(self.lookups.values())).shifts
        there = sorted({layer for _, layer in places})
        if layers is not None and not set(layers) <= set(there):
            wrong = ", ".join(str(layer) for layer in sorted(set(layers) - set(there)))
            raise UsageError(f"The oracle has layers {there[0]} to {there[-1]}; asked for {wrong}.")
        n_heads = next(iter(places.values())).log_rest.shape[0]
        check_heads(heads, there[-1] + 1, n_heads)
        found = []
        for axis, layer in places:
            chosen = [head for head in range(n_heads) if heads is None or (layer, head) in heads]
            if chosen and (layers is None or layer in layers):
                means = None if axis == "vision" else self._means((axis, layer))
                found.append(Edit("heads", layer, self._edit((axis, layer), chosen, means, scale, rows or "all"), axis))
        return found

    def into(self, model: Model, **where: Any) -> tuple[Model, list[Edit]]:
        """The same model, and :meth:`edits`, whose arguments it takes."""
        return model, self.edits(**where)

    def as_in_context(self, batch: Batch) -> Batch:
        """A batch of queries, read from where they stand behind their demonstrations.

        Parameters
        ----------
        batch
            Queries alone, with their answers or without.

        Returns
        -------
        Batch
            With the teacher's ``position_ids``; and in families with cross-attention, with an open gate where a row saw
            an image of the demonstrations. (It then sees one of its own, which the oracle replaces.)

        Raises
        ------
        UsageError
            If an episode was not read.
        """
        known = [self._find(e, batch.length - pad) for e, pad in zip(batch.encodings, batch.pads, strict=True)]
        ids = batch.inputs["input_ids"]
        positions = ids.new_zeros(*known[0].positions.shape[:-1], *ids.shape)
        inputs = dict(batch.inputs)
        gate = next((name for name in GATES if name in inputs), None)
        if gate:
            inputs[gate] = inputs[gate].clone(memory_format=torch.contiguous_format)
        for b, (each, pad) in enumerate(zip(known, batch.pads, strict=True)):
            n = batch.length - pad
            positions[..., b, pad:] = each.positions[..., :n].to(ids.device)
            if gate and each.looking is not None:
                seen = inputs[gate][b, pad:].flatten(1)
                closed = each.looking[:n].to(ids.device) & ~seen.any(1)
                seen[:, 0] |= closed.to(seen.dtype)
        return replace(batch, inputs={**inputs, "position_ids": positions})

    # --------------------------------------------------------------------------------------------------------- within

    def _edit(
        self, place: Place, heads: Sequence[int], means: Sequence[Means] | None, scale: float, rows: str
    ) -> Callable[[Tensor, Context], Tensor]:
        asked = parse_rows(rows)
        parts = choose_parts(self.modalities, self.parts)

        def fn(value: Tensor, context: Context) -> Tensor:
            batch = context.batch
            if context.step:
                raise UsageError(
                    "An oracle knows nothing of what is generated: its teacher read the gold answer. Compare the "
                    "probabilities of given answers, or generate a single token (max_new_tokens=1)."
                )
            known = [self._find(e, batch.length - pad) for e, pad in zip(batch.encodings, batch.pads, strict=True)]
            own = [each.shifts[place] for each in known]
            alone = output_alone(value, context, own) if place[0] == "text" else widen(value)
            moved = widen(value).clone()
            for b, (shifts, pad) in enumerate(zip(own, batch.pads, strict=True)):
                mean = None if means is None else means[1 - known[b].half]
                moved[b, pad:] = self._moved(alone[b, pad:], shifts, parts, mean)
            moved = value + scale * (moved - value) if scale != 1 else moved
            chosen = torch.zeros(value.shape[:3], dtype=torch.bool)
            chosen[..., list(heads)] = meant(asked, batch, 0, value.shape[1])[..., None]
            return torch.where(chosen[..., None].to(value.device), moved.to(value.dtype), value)

        return fn

    def _moved(self, alone: Tensor, shifts: Shifts, parts: Sequence[int], means: Means | None) -> Tensor:
        """``SA_Q + mu d``, ``[row, head, width]``, from SA_Q."""
        odds, target = (x[:, : len(alone)].to(alone) for x in shifts.joined(parts))
        odds, target = odds.T[..., None], target.transpose(0, 1)
        blind = (shifts.log_rest == NOTHING)[:, : len(alone)].T[..., None].to(alone.device)
        if means is None or (self.mu == "own" and self.shift == "own"):
            mu = odds.sigmoid()  # 1 where there is nothing else to see
            moved = (1 - mu) * torch.where(blind, torch.zeros_like(alone), alone) + mu * target
            return torch.where((mu > 0) | blind, moved, alone)
        mean = Means(*(getattr(means, name).to(alone) for name in ("mu", "length", "shift", "direction")))
        mu = odds.sigmoid() if self.mu == "own" else mean.mu[:, None]
        d = target - alone
        if self.shift == "mean":
            d = mean.shift
        elif self.shift == "direction":
            d = mean.length[:, None] * d / d.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(d.dtype).tiny)
        elif self.shift == "size":
            d = d.norm(dim=-1, keepdim=True) * mean.direction
        return torch.where(odds > NOTHING, alone + mu * d, alone)

    def _find(self, encoding: Encoding, n: int) -> Lookup:
        """What was read of an episode whose first n positions are to be changed."""
        known = self.lookups.get(encoding.episode)
        if known is None:
            raise UsageError(
                f"The oracle has not read episode {encoding.episode}; read it too (read_oracle), or leave it out."
            )
        if not torch.equal(known.ids[:n], encoding.ids[:n]):
            raise UsageError(
                f"Episode {encoding.episode} has other tokens than the query that the oracle knows, which stands "
                "without demonstrations and with its gold answer. Leave them out (probe.vectors.pairs.alone), or read "
                "the oracle with this answer."
            )
        return known

    def _means(self, place: Place) -> tuple[Means, ...] | None:
        """Of each half."""
        if self.mu == "own" and self.shift == "own":
            return None
        if place in self._kept:
            return self._kept[place]
        parts = choose_parts(self.modalities, self.parts)
        halves = [[each.shifts[place] for each in self.lookups.values() if each.half == half] for half in (0, 1)]
        if not all(halves):
            raise UsageError("Means come from the other half of the episodes: two episodes or more are needed.")
        self._kept[place] = tuple(means_of(half, parts) for half in halves)
        return self._kept[place]


def read_oracle(
    model: Model, episodes: Sequence[Episode], *, batch_size: int = 16, by_modality: bool = False
) -> Oracle:
    """Read what demonstrations do, one forward an episode.

    Parameters
    ----------
    model
        The model, without what steers it.
    episodes
        With demonstrations.
    batch_size
        Episodes in one forward.
    by_modality
        Hold the keys of the demonstrations' images, texts and structure apart, so that some can be left out
        (``dataclasses.replace(oracle, modalities=("textual",))``); it takes twice the memory.

    Returns
    -------
    Oracle
        For these episodes.

    Raises
    ------
    UsageError
        If an episode has no demonstrations, two have the same id, or the query has no image in a family that would have
        to put a demonstration's image back through cross-attention.
    ProbeError
        If an episode cannot be read, or attention does not split.
    """
    check_plain(model)
    lookups: dict[str, Lookup] = {}
    for start in range(0, len(episodes), batch_size):
        pairs = [encode_pair(model, episode) for episode in episodes[start : start + batch_size]]
        for name, found in oracle_of(model, pairs, by_modality=by_modality).lookups.items():
            if name in lookups:
                raise _same_name(name)
            lookups[name] = replace(found, half=len(lookups) % 2)
    if not lookups:
        raise UsageError("There are no episodes to read an oracle from.")
    return Oracle(lookups, model_facts(model), part_names(by_modality))


def oracle_of(model: Model, pairs: Sequence[Pair], *, by_modality: bool = False) -> Oracle:
    """An oracle of one batch that is encoded already; see :func:`read_oracle`."""
    lookups: dict[str, Lookup] = {}
    for pair, found in zip(pairs, read_lookups(model, pairs, by_modality), strict=True):
        name = pair.student.episode
        if name in lookups:
            raise _same_name(name)
        lookups[name] = replace(found, half=len(lookups) % 2)
    return Oracle(lookups, model_facts(model), part_names(by_modality))


def _same_name(name: str) -> UsageError:
    return UsageError(f"Two episodes are called {name}; an oracle finds them by their names, so rename one.")
