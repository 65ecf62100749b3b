"""What a method found, with all that it takes to use it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probe.errors import ProbeError, UsageError
from probe.models.model import Model
from probe.store import key, stamp, write_bytes, write_json
from probe.trace.edit import Context, Edit
from probe.trace.rows import meant, parse_rows

if TYPE_CHECKING:
    from probe.vectors.method import Method

TENSORS, CARD = "vector.safetensors", "card.json"
Head = tuple[int, int]
"""Layer and head."""


@dataclass(frozen=True, eq=False)
class InContextVector:
    """A method with its parameters.

    Attributes
    ----------
    method
        What the parameters mean.
    parameters
        By name, float32 on the CPU.
    card
        JSON values: the ``model`` that they are for, the ``data`` that they are from, how they were found.
    """

    method: Method
    parameters: Mapping[str, Tensor]
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """How tables and messages call it."""
        return str(self.card.get("label") or self.method.label)

    @property
    def n_parameters(self) -> int:
        """How many numbers it is."""
        return sum(value.numel() for value in self.parameters.values())

    @property
    def n_bytes(self) -> int:
        """How large they are when stored."""
        return sum(value.nbytes for value in self.parameters.values())

    @property
    def identity(self) -> str:
        """Differs where two vectors differ in what they do."""
        content = hashlib.sha256()
        for name, value in sorted(self.parameters.items()):
            content.update(name.encode() + value.contiguous().numpy().tobytes())
        return key({"method": self.method.name, "options": asdict(self.method), "tensors": content.hexdigest()})

    def check(self, model: Model) -> None:
        """Refuse a model that the vector was not made for.

        Raises
        ------
        UsageError
            If weights, revision, or the prompt's template are others.
        """
        made_for = self.card.get("model", {})
        for name, value in model_facts(model).items():
            if name in made_for and made_for[name] != value:
                raise UsageError(
                    f"The vector {self.label} was made for another {_MEANING[name]} ({made_for[name]}) than that of "
                    f"{model.name} ({value}); fit one for this model, or load the model that it was made for."
                )

    def edits(
        self,
        *,
        scale: float = 1.0,
        layers: Sequence[int] | None = None,
        heads: Sequence[Head] | None = None,
        rows: str | None = None,
    ) -> list[Edit]:
        """What it changes in a forward.

        Parameters
        ----------
        scale
            Factor on what is added.
        layers
            Where; default all that it acts in.
        heads
            In which heads, each a layer and a head; only for methods that act on heads.
        rows
            At which positions: ``all``, ``answer`` (those that predict the answer, and all generated), ``first`` (the
            one that predicts its first token), or a selection such as ``query/image``; default those of the method.

        Raises
        ------
        UsageError
            If the method does not act there.
        """
        if self.method.changes_weights:
            raise UsageError(f"{self.label} changes weights, and has no edits; put it into a model with probe.inject.")
        if heads is not None and not heads:
            raise UsageError(f"The vector {self.label} is to act in no head; name one, or leave the choice out.")
        found = self.method.edits(self.parameters, scale=scale, heads=heads)
        self.check_layers(layers, sorted({edit.layer for edit in found}))
        if layers is not None:
            found = [edit for edit in found if edit.layer in layers]
        chosen = rows if rows is not None else self.method.rows
        return found if chosen == "all" else [at_rows(edit, chosen) for edit in found]

    def into(
        self,
        model: Model,
        *,
        scale: float = 1.0,
        layers: Sequence[int] | None = None,
        heads: Sequence[Head] | None = None,
        rows: str | None = None,
    ) -> tuple[Model, list[Edit]]:
        """What runs when it is put into a model, for :func:`probe.inject`: the model, unless weights change, and edits.

        Raises
        ------
        UsageError
            If the method does not act there.
        """
        if not self.method.changes_weights:
            return model, self.edits(scale=scale, layers=layers, heads=heads, rows=rows)
        if heads is not None or rows not in (None, "all"):
            raise UsageError(f"{self.label} changes weights, for all heads and positions; choose layers.")
        self.check_layers(layers)
        return self.method.adapted(model, self.parameters, scale=scale, layers=layers), []

    @property
    def layers(self) -> list[int]:
        """Those in which it acts."""
        return self.method.acting(self.parameters)

    def check_layers(self, layers: Sequence[int] | None, acting: Sequence[int] | None = None) -> None:
        """Refuse layers in which it does not act, by default in any head.

        Raises
        ------
        UsageError
            If there is one, or none is named.
        """
        if layers is None:
            return
        there = self.layers if acting is None else acting
        if not layers:
            raise UsageError(f"The vector {self.label} is to act in no layer; name one, or leave the choice out.")
        if wrong := sorted(set(layers) - set(there)):
            raise UsageError(
                f"The vector {self.label} does not act in layer {', '.join(map(str, wrong))}; it does in "
                f"{', '.join(map(str, there))}."
            )

    def save(self, directory: Path) -> None:
        """Write ``vector.safetensors`` and then ``card.json``: where the card is, all is.

        Raises
        ------
        ProbeError
            If the system refuses.
        """
        from safetensors.torch import save

        data = save({name: value.contiguous() for name, value in self.parameters.items()})
        write_bytes(Path(directory) / TENSORS, data)
        own = {
            "method": self.method.name,
            "options": asdict(self.method),
            "tensors": hashlib.sha256(data).hexdigest(),
        }
        card = {**own, **self.card, **own, "stamp": stamp()}
        write_json(Path(directory) / CARD, card)

    @classmethod
    def load(cls, directory: Path) -> InContextVector:
        """Read a vector that :meth:`save` wrote.

        Raises
        ------
        ProbeError
            If it is not there, is damaged, or was not written by :meth:`save`; pickles are never opened.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        from probe.vectors.methods import method_of

        directory = Path(directory)
        if directory.is_file():
            raise ProbeError(
                f"{directory} is a file, and a vector is a directory with {TENSORS} and {CARD}. Files that other code "
                "wrote, and pickles above all, are not opened."
            )
        try:
            card = json.loads((directory / CARD).read_text(encoding="utf-8"))
            data = (directory / TENSORS).read_bytes()
            if hashlib.sha256(data).hexdigest() != card["tensors"]:
                raise ProbeError(f"{directory / TENSORS} is not the file that {CARD} was written for; restore it.")
            method = method_of(card["method"], card["options"])
            parameters = load(data)
            method.acting(parameters)  # has all that it needs
            if not isinstance(card.get("model", {}), dict):
                raise TypeError("its model is no object")
        except FileNotFoundError as error:
            raise ProbeError(f"There is no vector in {directory}: {Path(error.filename).name} is missing.") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise ProbeError(f"The vector in {directory} cannot be read ({error}); save it again.") from error
        own = {name: value for name, value in card.items() if name not in ("method", "options", "tensors")}
        return cls(method, parameters, own)


_MEANING = {
    "fingerprint": "model or revision",
    "template": "template of the prompt",
    "layers": "number of layers",
    "hidden": "width",
    "heads": "number of heads",
    "head_dim": "width of heads",
}


def model_facts(model: Model) -> dict[str, object]:
    """What of a model decides whether a vector fits it."""
    return {
        "fingerprint": model.fingerprint,
        "template": key({"template": model.chat_template})[:16],
        "layers": model.n_layers,
        "hidden": int(model.text_config.hidden_size),
        "heads": model.n_heads,
        "head_dim": model.head_dim,
    }


def at_rows(edit: Edit, rows: str) -> Edit:
    """The same edit at some positions only."""
    asked = parse_rows(rows)

    def fn(value: Tensor, context: Context) -> Tensor:
        chosen = meant(asked, context.batch, context.step, value.shape[1]).to(value.device)
        return torch.where(chosen.reshape(*chosen.shape, *[1] * (value.ndim - 2)), edit.fn(value, context), value)

    return Edit(edit.site, edit.layer, fn, edit.axis)
