"""What to take away from a forward, said in a line, and the random control of the same size.

=============  =========================================================================================================
method         what happens at ``rows``
=============  =========================================================================================================
``knockout``   attention to ``keys`` is exactly zero, the rest is renormalised
``uniform``    heads attend alike to all that they can see
``mean``       heads write their mean over the other half of the episodes, by kind of position
``zero``       heads write nothing
=============  =========================================================================================================

In a window of ``layers``, or in single ``heads``.

Two controls, each drawn anew several times, say what taking away as much at random does. *Keys*: as many positions,
drawn for each episode from the turns that the meant ones belong to, whatever they are there (all demonstrations, or the
query); from the whole prompt if these turns are what is meant. The sink and the row that answers are never drawn. Some
of the meant keys are drawn too, so the control is the stricter the larger their share. *Heads*: as many heads of the
same layers that are not meant; none where a layer has too few others.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probe.data.example import Episode
from probe.errors import UsageError, did_you_mean
from probe.experiments.answering import units, within_memory
from probe.models.encoding import Batch, Encoding
from probe.models.model import Model
from probe.models.sites import Axis
from probe.models.token_map import ROLES, TokenMap, parse_selection
from probe.trace.ablate import (
    N_KINDS,
    Keys,
    count_hidden,
    hide_keys,
    kinds,
    mean_heads,
    uniform_attention,
)
from probe.trace.edit import Context, Edit
from probe.trace.read import LayerValues, read
from probe.trace.rows import ANSWER, parse_rows

Method = Literal["knockout", "uniform", "mean", "zero"]
Control = Literal["keys", "heads"]
Head = tuple[int, int]
"""Layer and head."""


@dataclass(frozen=True)
class Intervention:
    """One thing to take away.

    Attributes
    ----------
    method
        See above.
    keys
        What is hidden by ``knockout``, as in :func:`~probe.models.token_map.parse_selection`.
    rows
        Where: ``answer`` (the positions that predict the answer) or a selection; empty: ``answer`` for attention, and
        ``all`` where heads are replaced.
    layers
        A window; ``None`` is all.
    heads
        Single ones, in place of a window.
    """

    method: Method = "knockout"
    keys: str = ""
    rows: str = ""
    layers: tuple[int, ...] | None = None
    heads: tuple[Head, ...] | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise UsageError(f"There is no method {self.method!r}; {did_you_mean(self.method, get_args(Method))}")
        if (self.method == "knockout") != bool(self.keys):
            raise UsageError("A knockout says which keys it hides, and nothing else does; give keys to knockout alone.")
        if self.layers is not None and self.heads is not None:
            raise UsageError("An intervention is in a window of layers or in single heads; give one of the two.")
        if self.method in ("mean", "zero") and self.heads is None:
            raise UsageError(f"Which heads should be replaced ({self.method})? Name them, such as 2.2,3.0.")
        if self.heads is not None and not self.heads:
            raise UsageError("An intervention in single heads names at least one.")
        if self.keys:
            parse_selection(self.keys)
        parse_rows(self.rows or ANSWER)

    @property
    def at(self) -> str:
        """The rows, filled in."""
        return self.rows or (ANSWER if self.method in ("knockout", "uniform") else "all")

    @property
    def label(self) -> str:
        """In a line, for tables: ``demos/image → answer, layers 2-3``."""
        parts = [f"{self.keys} → {self.at}" if self.keys else f"{self.method} → {self.at}"]
        if self.layers is not None:
            parts.append(f"layer{'s' if len(self.layers) > 1 else ''} {_ranges(self.layers)}")
        if self.heads is not None:
            parts.append(", ".join(f"{layer}.{head}" for layer, head in self.heads))
        return ", ".join(parts)

    @property
    def controls(self) -> tuple[Control, ...]:
        """Which controls it has."""
        return (*(("keys",) if self.keys else ()), *(("heads",) if self.heads else ()))


def _ranges(layers: Sequence[int]) -> str:
    """``0,1,2,5`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def check_places(model: Model, intervention: Intervention) -> None:
    """Refuse layers and heads that a model does not have, before anything is read."""
    places = intervention.layers if intervention.heads is None else [layer for layer, _ in intervention.heads]
    if places is not None:
        model.choose_layers(places)
        for layer in places:
            if not any(
                site.layer == layer for site in model.sites if intervention.heads is None or site.axis == "text"
            ):
                raise UsageError(f"Layer {layer} of {model.name} has no self-attention.")
    for layer, head in intervention.heads or ():
        if not 0 <= head < model.n_heads:
            raise UsageError(f"{model.name} has heads 0 to {model.n_heads - 1} in layer {layer}; asked for {head}.")


def edits_of(
    model: Model,
    intervention: Intervention,
    means: Tensor | None = None,
    *,
    keys: Callable[[Axis], Keys] | None = None,
) -> list[Edit]:
    """The edits that an intervention is.

    Parameters
    ----------
    model
        Whose layers they are for.
    intervention
        What to take away.
    means
        Of :func:`mean_outputs`, for ``mean``.
    keys
        What a knockout hides on an axis in place of its own keys: the control.

    Returns
    -------
    list of Edit
    """
    rows, heads = intervention.at, intervention.heads
    if intervention.method in ("mean", "zero"):
        assert heads is not None  # checked when it was made
        nothing = torch.zeros(N_KINDS, model.head_dim)
        if intervention.method == "mean" and means is None:
            raise ValueError("Means are needed to replace heads by them.")
        return mean_heads({place: nothing if means is None else means[place] for place in heads}, rows)
    found: list[Edit] = []
    axes: tuple[Axis, ...] = ("text",) if model.reads_images_in_text or heads is not None else ("text", "vision")
    for axis in axes:
        if heads is None:
            chosen: dict[int, list[int] | None] = dict.fromkeys(model.choose_layers(intervention.layers, axis))
        else:
            chosen = {layer: [h for at, h in heads if at == layer] for layer in sorted({at for at, _ in heads})}
        for layer, own in chosen.items():
            if intervention.method == "knockout":
                hidden = keys(axis) if keys is not None else intervention.keys
                found += hide_keys([layer], hidden, rows, own, axis)
            else:
                found += uniform_attention([layer], rows, own, axis)
    return found


def n_hidden(intervention: Intervention, encoding: Encoding) -> int:
    """How many positions of the prompt, and image tokens on an axis of their own, an intervention hides."""
    if not intervention.keys:
        return 0
    meant = parse_selection(intervention.keys)
    images = 0 if encoding.vision_map is None else int(meant.of(encoding.vision_map).sum())
    return int(meant.of(encoding.token_map)[: encoding.n_prompt].sum()) + images


def count_hidden_keys(model: Model, batch: Batch, interventions: Sequence[Intervention]) -> NDArray[np.int64]:
    """How many keys each intervention takes from a row that can see them, ``[intervention, episode]``.

    Of several rows and layers, those that lose most; keys on the axes of text and of images together. It is 0 where
    keys cannot be seen anyway: in cross-attention, later text sees no earlier image; in layers with a window, nothing
    that is far. For interventions without keys it is 0.
    """
    hiding = [number for number, each in enumerate(interventions) if each.keys]
    found = np.zeros((len(interventions), len(batch)), dtype=np.int64)
    if not hiding:
        return found

    def reduce(values: LayerValues) -> Mapping[str, Tensor]:
        at = values.attention
        assert at is not None  # asked for
        context = Context(batch, values.layer, at)
        nothing = torch.zeros(len(batch), dtype=torch.int64, device=at.q.device)
        counts = [
            count_hidden(context, interventions[number].keys, interventions[number].at)
            if _acts(interventions[number], values.layer, at.axis)
            else nothing
            for number in hiding
        ]
        return {"n": torch.stack(counts)}

    reading = read(model, batch, ("attention",), reduce)
    for by_layer in (reading.layers, reading.cross):
        if by_layer:
            found[hiding] += torch.stack([values["n"] for values in by_layer.values()]).amax(0).numpy()
    return found


def _acts(intervention: Intervention, layer: int, axis: Axis) -> bool:
    """Whether an intervention changes an attention."""
    if intervention.heads is not None:
        return axis == "text" and layer in {place for place, _ in intervention.heads}
    return intervention.layers is None or layer in intervention.layers


def random_keys(intervention: Intervention, draw: int, seed: int) -> Callable[[Axis], Keys]:
    """As many keys as a knockout hides, at random for each episode; the same whatever the batch.

    Parameters
    ----------
    intervention
        A knockout.
    draw
        Which of several controls.
    seed
        Of all draws.

    Returns
    -------
    callable
        For an axis, which positions of an encoding to hide.
    """
    meant = parse_selection(intervention.keys)

    def on(axis: Axis) -> Keys:
        def choose(encoding: Encoding) -> NDArray[np.bool_]:
            token_map = encoding.token_map if axis == "text" else encoding.vision_map
            assert token_map is not None  # cross-attention runs only in families that map its axis
            end = encoding.n_prompt if axis == "text" else len(token_map)
            target = meant.of(token_map)
            target[end:] = False
            pool = _drawn_from(token_map, target, end - 1 if axis == "text" else end)
            # By the episode and not by its place in the batch: the control is the same whatever the batch.
            rng = np.random.default_rng((seed, draw, zlib.crc32(encoding.episode.encode()), axis == "vision"))
            found = np.zeros(len(token_map), dtype=bool)
            found[rng.permutation(np.flatnonzero(pool))[: target.sum()]] = True
            return found

        return choose

    return on


def _drawn_from(token_map: TokenMap, target: NDArray[np.bool_], end: int) -> NDArray[np.bool_]:
    """The positions before ``end`` among which as many as ``target`` has are drawn."""
    allowed = (token_map.role >= 0) & (token_map.role != ROLES.index("sink"))
    allowed[end:] = False
    owners = np.where(token_map.demonstration >= 0, 0, token_map.demonstration)
    turns: NDArray[np.bool_] = allowed & np.isin(owners, owners[target])
    return turns if (turns & ~target).any() else allowed


def random_heads(model: Model, intervention: Intervention, draw: int, seed: int) -> Intervention | None:
    """The same with as many other heads of the same layers; ``None`` where one of these has too few others.

    Parameters
    ----------
    model
        Whose heads.
    intervention
        In single heads.
    draw
        Which of several controls.
    seed
        Of all draws.
    """
    assert intervention.heads is not None  # only those have this control
    rng = np.random.default_rng((seed, draw, 7))
    drawn: list[Head] = []
    for layer in sorted({layer for layer, _ in intervention.heads}):
        meant = [head for at, head in intervention.heads if at == layer]
        others = [head for head in range(model.n_heads) if head not in meant]
        if len(others) < len(meant):
            return None
        drawn += [(layer, int(head)) for head in rng.choice(others, len(meant), replace=False)]
    return replace(intervention, heads=tuple(sorted(drawn)))


def mean_outputs(model: Model, batches: Iterable[Batch]) -> Tensor:
    """What each head writes on average over episodes, by kind of position.

    Parameters
    ----------
    model
        The model.
    batches
        Of the episodes, answers included.

    Returns
    -------
    Tensor
        ``[layer, head, kind, head_dim]``, float32 on the CPU; NaN for kinds that no episode has.
    """
    total = torch.zeros(model.n_layers, model.n_heads, N_KINDS, model.head_dim, dtype=torch.float64)
    count = torch.zeros(N_KINDS, dtype=torch.float64)
    for batch in batches:
        one_hot = torch.zeros(len(batch), batch.length, N_KINDS)
        for row, encoding, pad in zip(one_hot, batch.encodings, batch.pads, strict=True):
            row[torch.arange(pad, batch.length), torch.from_numpy(kinds(encoding))] = 1
        count += one_hot.sum((0, 1))
        weights = one_hot.to(model.device)

        def reduce(values: LayerValues, weights: Tensor = weights) -> Mapping[str, Tensor]:
            assert values.heads is not None  # asked for
            return {"sum": torch.einsum("bnk,bnhd->hkd", weights, values.heads.float())}

        reading = read(model, batch, ("heads",), reduce)
        for layer, values in reading.layers.items():
            total[layer] += values["sum"]
    return (total / count[:, None]).float()


HALVES = ("select", "report")


def halves(n: int) -> NDArray[np.str_]:
    """Every second of n episodes chooses, the others report."""
    return np.where(np.arange(n) % 2 == 0, *HALVES)


def means_of_other_half(model: Model, episodes: Sequence[Episode], batch_size: int) -> dict[str, Tensor]:
    """For each half of the episodes, what heads write on average in the other one (:func:`mean_outputs`).

    Raises
    ------
    UsageError
        If there is one episode only.
    """
    if len(episodes) < 2:
        raise UsageError("Means come from the other half of the episodes: two episodes or more are needed.")
    found = {}
    for own in HALVES:
        others = [e for e, half in zip(episodes, halves(len(episodes)), strict=True) if half != own]
        with within_memory(model, batch_size):
            batches = (model.batch([model.encode(e) for e in unit]) for unit in units(model, others, batch_size))
            found[own] = mean_outputs(model, batches)
    return found
