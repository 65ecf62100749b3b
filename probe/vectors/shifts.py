"""What demonstrations do to every head at every row that a student has too, read off the teacher.

For a row, split the keys that it sees into parts of the demonstrations and the rest Q. With Z_p and SA_p the partition
function and the output of attention to the keys of part p alone,

    SA = SA_Q + mu (SA_D - SA_Q),    mu = Z_D / (Z_D + Z_Q),    Z_D = sum_p Z_p,    SA_D = sum_p Z_p SA_p / Z_D,

so that parts can be joined afterwards (:meth:`Shifts.joined`), and left out: a row that had only some of the
demonstrations' keys would give ``SA_Q + mu_m (SA_m - SA_Q)`` with ``mu_m = Z_m / (Z_m + Z_Q)``. Q are the keys that
the student has too: sink, template, query, and what has been said of the answer; D all others, which are those of the
demonstrations' turns. (Where a template writes nothing before the first turn, the sink of the teacher begins a
demonstration, and counts as structure of it.)

In float32, or in float64 if the model is. A few rows at a time: no array of rows x keys outlives its layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probe.errors import ProbeError, UsageError, did_you_mean
from probe.measures.mass import RESIDUAL_BOUND, residual, row_visibility
from probe.measures.partition import SCORES
from probe.models.sites import Axis
from probe.models.token_map import MODALITY_OF_ROLE, ROLES
from probe.trace.edit import Attention
from probe.trace.read import LayerValues
from probe.vectors.pairs import Pair

MODALITIES = ("visual", "textual", "structural")
"""The parts that demonstrations have."""

WHOLE, REST = "demonstrations", "rest"

NOTHING = float("-inf")
"""The logarithm of no mass."""


@dataclass(frozen=True)
class Shifts:
    """The split attention of some rows; leading dimensions (batch) as they come.

    Attributes
    ----------
    log_mass
        ``[…, part, head, row]``, log of the attention mass of each part of the demonstrations; minus infinity where a
        row sees none of it.
    log_rest
        ``[…, head, row]``, the same of all other keys.
    log_total
        ``[…, head, row]``, log Z of all keys together.
    outputs
        ``[…, part, head, row, width]``, attention to each part alone; 0 where a row sees none of it.
    rest
        ``[…, head, row, width]``, attention to the other keys alone.
    first, seen
        ``[…, row]``: the first of the kept keys that a row sees, counted among those, and how many it sees. On the
        vision axis, none are kept.
    """

    log_mass: Float[Tensor, "*_ part head row"]
    log_rest: Float[Tensor, "*_ head row"]
    log_total: Float[Tensor, "*_ head row"]
    outputs: Float[Tensor, "*_ part head row width"]
    rest: Float[Tensor, "*_ head row width"]
    first: Int[Tensor, "*_ row"]
    seen: Int[Tensor, "*_ row"]

    def of(self, episode: int, rows: int) -> Shifts:
        """One episode's, without rows that only fill the batch."""
        return Shifts(
            **{
                field.name: getattr(self, field.name)[episode].narrow(_row_dimension(field.name), 0, rows).clone()
                for field in fields(self)
            }
        )

    def at(self, rows: Int[Tensor, "chosen"]) -> Shifts:
        """Some rows of one episode's."""
        return Shifts(
            **{f.name: getattr(self, f.name).index_select(_row_dimension(f.name), rows) for f in fields(self)}
        )

    def joined(self, parts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As if demonstrations had these parts alone.

        Returns
        -------
        tuple of Tensor
            ``log mu/(1 - mu) [..., head, row]`` (minus infinity where none of it is seen), and ``SA_D [..., head, row,
            width]`` (0 there).
        """
        mass, outputs = self.log_mass[..., list(parts), :, :], self.outputs[..., list(parts), :, :, :]
        whole = mass.logsumexp(-3)
        weights = (mass - whole.unsqueeze(-3)).exp().nan_to_num(0.0)
        odds = torch.where(whole > NOTHING, whole - self.log_rest, whole)
        return odds, (weights[..., None] * outputs).sum(-4)

    @property
    def rebuilt(self) -> Tensor:
        """The heads' outputs, ``[…, head, row, width]``."""
        of_parts = (self.log_mass.exp()[..., None] * self.outputs).sum(-4)
        return of_parts + self.log_rest.exp()[..., None] * self.rest


def part_names(by_modality: bool) -> tuple[str, ...]:
    """The parts of demonstrations that are held apart."""
    return MODALITIES if by_modality else (WHOLE,)


def choose_parts(modalities: Sequence[str], held: Sequence[str]) -> list[int]:
    """Which of the parts that are held make up some modalities; none asked for is all of them.

    Raises
    ------
    UsageError
        If there is no such modality, or parts were not held apart.
    """
    for name in modalities:
        if name not in MODALITIES:
            raise UsageError(f"Demonstrations have no {name!r} keys; {did_you_mean(name, MODALITIES)}")
        if name not in held:
            raise UsageError(
                "The demonstrations' keys were read as one; read the oracle with by_modality=True to leave some out."
            )
    return [place for place, name in enumerate(held) if not modalities or name in modalities]


def split_layer(values: LayerValues, pairs: Sequence[Pair], by_modality: bool) -> Shifts:
    """Split one attention call of a batch of teachers, at all rows that the students have too.

    Parameters
    ----------
    values
        With ``attention`` and ``heads``.
    pairs
        Their teachers are the batch's encodings.
    by_modality
        Whether demonstrations have the parts :data:`MODALITIES`, or a single one.

    Returns
    -------
    Shifts
        ``[batch, …]``; an episode with fewer rows than others has rows that mean nothing behind its own.

    Raises
    ------
    ProbeError
        If the parts do not add up to what the heads gave.
    """
    at, batch = values.attention, values.batch
    assert at is not None  # asked for
    assert values.heads is not None
    device, width = at.k.device, at.k.shape[2]
    rows = padded_rows(pairs, batch.pads).to(device)
    names = (*part_names(by_modality), REST)
    keys = [_keys(p, at.axis, n, pad, width) for n in names for p, pad in zip(pairs, batch.pads, strict=True)]
    parts = torch.stack(keys).unflatten(0, (len(names), -1)).to(device)
    step = max(1, SCORES // (len(pairs) * at.q.shape[1] * width))
    found = [_split(at, rows[:, start : start + step], parts) for start in range(0, rows.shape[1], step)]
    each = {f.name: torch.cat([getattr(x, f.name) for x in found], _row_dimension(f.name)) for f in fields(Shifts)}
    joined = Shifts(**each)
    _check(joined, values, rows, [len(pair.kept) for pair in pairs])
    return joined


def _row_dimension(name: str) -> int:
    return -2 if name in ("outputs", "rest") else -1


def padded_rows(pairs: Sequence[Pair], pads: Sequence[int]) -> Int[Tensor, "batch row"]:
    """Where in a batch of teachers the students' positions stand; the last again, where there are none left."""
    n = max(len(pair.kept) for pair in pairs)
    each = [
        np.pad(pair.kept, (0, n - len(pair.kept)), mode="edge") + pad for pair, pad in zip(pairs, pads, strict=True)
    ]
    return torch.from_numpy(np.stack(each))


def _keys(pair: Pair, axis: Axis, name: str, pad: int, width: int) -> Bool[Tensor, "key"]:
    """Which keys of a teacher's attention call are a part of the demonstrations, or the rest."""
    token_map = pair.teacher.token_map if axis == "text" else pair.teacher.vision_map
    found = torch.zeros(width, dtype=torch.bool)
    if token_map is None:  # an episode without images
        return found
    modality = np.array([MODALITY_OF_ROLE[role] for role in ROLES])[token_map.role]
    shown = token_map.demonstration >= 0
    if axis == "text":
        shown = np.ones_like(shown)
        shown[pair.kept] = False
        modality = np.where(modality == "sink", "structural", modality)  # where a demonstration begins with it
    else:
        modality = np.full_like(modality, "visual", dtype=object)  # unused tiles of an image too
    chosen = ~shown if name == REST else shown if name == WHOLE else shown & (modality == name)
    start = pad if axis == "text" else 0
    found[start : start + len(chosen)] = torch.from_numpy(chosen)
    return found


def _split(at: Attention, rows: Int[Tensor, "batch row"], parts: Bool[Tensor, "part batch key"]) -> Shifts:
    """Split the attention of some rows; the last part is the rest."""
    (batch, heads, n, _), (kv, n_keys) = at.q.shape, at.k.shape[1:3]
    kind = torch.promote_types(at.q.dtype, torch.float32)
    q = at.q.gather(2, rows[:, None, :, None].expand(-1, heads, -1, at.q.shape[3])).to(kind)
    k, v = at.k.to(kind), at.v.to(kind)
    visible = row_visibility(at.mask, at.causal, rows, n, n_keys)
    scores = (q.unflatten(1, (kv, -1)).flatten(2, 3) @ k.transpose(-1, -2)).view(batch, heads, -1, n_keys) * at.scale
    scores = scores.masked_fill(~visible[:, None], NOTHING)
    top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(kind).min)
    scores -= top  # masses are small differences of large logits
    total = scores.logsumexp(-1)
    masses, outputs = [], []
    for keys in parts:
        own = scores.masked_fill(~keys[:, None, None], NOTHING)
        mass = own.logsumexp(-1)
        weights = (own - mass[..., None]).exp().nan_to_num(0.0)
        outputs.append((weights.unflatten(1, (kv, -1)).flatten(2, 3) @ v).view(batch, heads, -1, v.shape[-1]))
        masses.append(torch.where(mass > NOTHING, mass - total, mass))
    kept = visible & parts[-1][:, None]
    place = parts[-1].long().cumsum(-1) - 1
    first = place.gather(1, kept.to(torch.uint8).argmax(-1))
    mass, output = torch.stack(masses, 1), torch.stack(outputs, 1)
    total = total + top[..., 0]
    return Shifts(mass[:, :-1], mass[:, -1], total, output[:, :-1], output[:, -1], first, kept.sum(-1))


def _check(shifts: Shifts, values: LayerValues, rows: Int[Tensor, "batch row"], lengths: Sequence[int]) -> None:
    """Refuse a split that is not that of the model's own attention."""
    assert values.heads is not None
    batch = torch.arange(len(rows), device=rows.device)[:, None]
    own = values.heads[batch, rows].transpose(1, 2)
    used = torch.arange(rows.shape[1], device=rows.device) < torch.tensor(lengths, device=rows.device)[:, None]
    used = used & (shifts.log_total[:, 0] > torch.finfo(shifts.log_total.dtype).min / 2)  # a row may see nothing
    off = residual(shifts.rebuilt, own).masked_fill(~used[:, None], 0.0).max()
    bound = RESIDUAL_BOUND[values.heads.dtype]
    if not bool(off <= bound):
        raise ProbeError(
            f"Layer {values.layer}: attention split into demonstrations and the rest is off by {float(off):.1e} of its "
            f"size, more than {bound:g} for {values.heads.dtype}. It would not be that of this model; please report "
            "it, with the model's name and its type of weights."
        )
