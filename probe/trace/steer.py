"""A model with a vector in it: the same weights, read through edits that stay.

``Model.logits`` and ``Model.generate`` run the module as it is. Those of a steered model always trace, for an edit is
silently absent from a forward that is not traced. So its module cannot be run by hand: every way to a value is edited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Protocol, cast

import torch

from probe.errors import UsageError
from probe.models.encoding import Batch
from probe.models.model import Model
from probe.trace.edit import Edit


class Injectable(Protocol):
    """What can be put into a model."""

    @property
    def label(self) -> str:
        """How tables and messages call it."""
        ...

    def check(self, model: Model) -> None:
        """Refuse a model that it was not made for."""
        ...

    def into(
        self,
        model: Model,
        *,
        scale: float = 1.0,
        layers: Sequence[int] | None = None,
        heads: Sequence[tuple[int, int]] | None = None,
        rows: str | None = None,
    ) -> tuple[Model, list[Edit]]:
        """The model that runs, which is the given one unless weights change, and the edits of its forward."""
        ...


@dataclass(frozen=True, eq=False)
class Steered(Model):
    """A model whose every forward is edited; made by :func:`inject`.

    Attributes
    ----------
    plain
        The model that runs, without the edits.
    edits
        In the order in which they were put in; several at one site act one after the other.
    original
        The model that vectors were put into: ``plain``, unless one of them changed weights.
    """

    plain: Model | None = None
    edits: tuple[Edit, ...] = ()
    original: Model | None = None

    def logits(self, batch: Batch, *, logits_to_keep: int = 1) -> torch.Tensor:
        """As :meth:`probe.Model.logits`, edited."""
        from probe.trace.read import read

        return read(self, batch, logits_to_keep=logits_to_keep).logits

    def generate(self, batch: Batch, *, max_new_tokens: int, num_beams: int = 1, stop: bool = True) -> list[str]:
        """As :meth:`probe.Model.generate`, edited."""
        from probe.trace.generate import generate

        return generate(self, batch, max_new_tokens=max_new_tokens, num_beams=num_beams, stop=stop)

    def __enter__(self) -> Steered:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to undo: the model that was steered was never changed."""


def inject(
    model: Model,
    vector: Injectable,
    *,
    scale: float = 1.0,
    layers: Sequence[int] | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
    rows: str | None = None,
) -> Steered:
    """Put a vector into a model.

    Parameters
    ----------
    model
        From :func:`probe.load`, or steered already: the new edits act after the old ones.
    vector
        An :class:`probe.InContextVector`, or an oracle.
    scale
        Factor on what it adds.
    layers, heads, rows
        Where; default everywhere that it acts (:meth:`probe.InContextVector.edits`). A head is a layer and a head.

    Returns
    -------
    Steered
        A model for every experiment. The given one stays as it is. Works as a context manager too.

    Raises
    ------
    UsageError
        If the vector was made for another model, or a layer or head does not exist.

    Examples
    --------
    >>> with probe.inject(model, vector, scale=0.5) as steered:  # doctest: +SKIP
    ...     probe.answering(steered, episodes)
    """
    vector.check(original_of(model))
    plain, _ = unsteered(model, ())
    runs, chosen = vector.into(plain, scale=scale, layers=layers, heads=heads, rows=rows)
    factor = "" if scale == 1 else f" x {scale:g}"
    return steer(model, chosen, f"{vector.label}{factor}", runs)


def steer(model: Model, edits: Sequence[Edit], label: str, runs: Model | None = None) -> Steered:
    """A model that stays edited.

    Parameters
    ----------
    model
        Steered already, or not.
    edits
        To act after its own.
    label
        Of what they are.
    runs
        What is to run in place of the model without its edits.
    """
    plain, before = unsteered(model, ())
    runs = runs or plain
    own = {field.name: getattr(runs, field.name) for field in fields(Model)}
    own |= {"module": _Untouchable(runs.module), "name": f"{model.name} + {label}"}
    return Steered(**own, plain=runs, edits=(*before, *edits), original=original_of(model))


def original_of(model: Model) -> Model:
    """The model as it was before anything was put into it."""
    return cast(Model, model.original) if isinstance(model, Steered) else model


def check_plain(model: Model) -> None:
    """Refuse a model that something was put into.

    Raises
    ------
    UsageError
        If it was.
    """
    if isinstance(model, Steered):
        raise UsageError(f"{model.name} was steered; give the model as it is, without what was put into it.")


def unsteered(model: Model, edits: Sequence[Edit]) -> tuple[Model, tuple[Edit, ...]]:
    """The model that runs, and all edits: its own, then the given ones."""
    if isinstance(model, Steered):
        return cast(Model, model.plain), (*model.edits, *edits)
    return model, tuple(edits)


class _Untouchable:
    """A module whose weights and configuration can be read and which cannot be run."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        if name in ("forward", "generate"):
            return self
        value = getattr(self._module, name)
        return _Untouchable(value) if isinstance(value, torch.nn.Module) else value

    def __setattr__(self, name: str, value: object) -> None:
        raise UsageError(f"The module of a steered model is not to be changed; change {name} of the model itself.")

    def __call__(self, *arguments: object, **options: object) -> Any:
        raise UsageError(
            "The module of a steered model, run by hand, would know nothing of the vector; use the model's logits or "
            "generate, or any experiment."
        )
