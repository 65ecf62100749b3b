"""LoRA: the baseline in weight space. Projections of attention get a learned addition of low rank.

    W' = W + (alpha / r) B A

in q, k, v and o of every layer, through PEFT. It is no vector: it has no edits, and what is injected is a model with
other weights (:meth:`Lora.adapted`), which shares all of its own with the given one. All else is as for a trained
vector: the student reads the query alone, and the loss is that of the answer.

``where="text"`` acts in the decoder's self-attention. ``everywhere`` acts on each module with the name of one of these
projections, vision tower and connector included, as the baseline of MimIC's code does: the 17,588,224 numbers that are
published for Idefics2 are those of its decoder (13,631,488), its vision tower (2,985,984) and its resampler (970,752).
What differs from that code: there is no dropout (it has 0.05).

References
----------
Hu et al., "LoRA", ICLR 2022, arXiv 2106.09685; rank, alpha and step size as in MimIC's code (commit 9eda50b).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor

from probe.errors import UsageError, did_you_mean
from probe.models.model import Model
from probe.models.weights import twin
from probe.store import key
from probe.trace.edit import Edit
from probe.vectors.method import Objective, Parameters, Trained, turned
from probe.vectors.vector import Head

Where = Literal["text", "everywhere"]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NAME = "probe"
"""Of the adapter, within the modules of PEFT."""


@dataclass(frozen=True)
class Lora(Trained):
    """LoRA's options.

    Attributes
    ----------
    rank
        r.
    alpha
        Of the factor alpha / r.
    where
        ``text`` or ``everywhere``.
    ce, kl
        Weights of the losses; with a weight of KL there is a teacher.
    """

    rank: int = 16
    alpha: float = 32.0
    where: Where = "text"
    ce: float = 1.0
    kl: float = 0.0
    name: ClassVar[str] = "lora"
    changes_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"The rank of LoRA is 1 or more; got {self.rank}.")
        if self.where not in get_args(Where):
            raise UsageError(f"LoRA does not act {self.where!r}; {did_you_mean(self.where, get_args(Where))}")

    @property
    def objective(self) -> Objective:
        """Cross-entropy."""
        return Objective(ce=self.ce, kl=self.kl)

    def targets(self, model: Model) -> dict[str, str]:
        """The dotted names of the modules that it acts on, by what their parameters are called.

        In the decoder that is a layer and a projection (``3.q_proj``, of attention to images ``3.vision.q_proj``),
        whatever the architecture; elsewhere the name.
        """
        axes = {"text": "", "vision": "vision."} if self.where == "everywhere" else {"text": ""}
        sites = {f"{site.layer}.{axes[site.axis]}": site.attention for site in model.sites if site.axis in axes}
        found = {f"{place}{name}": f"{site}.{name}" for place, site in sites.items() for name in PROJECTIONS}
        if self.where == "everywhere":
            known = set(found.values())
            for name, part in model.module.named_modules():
                if name.rpartition(".")[2] in PROJECTIONS and isinstance(part, torch.nn.Linear) and name not in known:
                    found[name] = name
        return found

    def start(self, model: Model, generator: torch.Generator) -> dict[str, Tensor]:
        """A as PEFT has it (uniform, of variance 1 / (3 width)), and B of zeros: W' is W."""
        found = {}
        for name, module in self.targets(model).items():
            part = cast(torch.nn.Linear, model.module.get_submodule(module))
            bound = part.in_features**-0.5
            found[f"{name}.A"] = bound * (2 * torch.rand(self.rank, part.in_features, generator=generator) - 1)
            found[f"{name}.B"] = torch.zeros(part.out_features, self.rank)
        return found

    def step_size(self, name: str) -> float:
        """As published."""
        return 5e-4

    def student(self, model: Model, parameters: Parameters) -> Callable[[], Model]:
        """One model, whose adapters are the parameters themselves."""
        adapted = self._with_adapters(model, parameters, 1.0)
        return lambda: adapted

    def edits(self, parameters: Parameters, *, scale: float = 1.0, heads: Sequence[Head] | None = None) -> list[Edit]:
        """There are none.

        Raises
        ------
        UsageError
            Always.
        """
        raise UsageError("LoRA changes weights, and has no edits; put it into a model with probe.inject.")

    def acting(self, parameters: Parameters) -> list[int]:
        """The decoder's layers with adapters."""
        return sorted({layer for name in parameters if (layer := layer_of(name)) is not None})

    def adapted(self, model: Model, parameters: Parameters, *, scale: float, layers: Sequence[int] | None) -> Model:
        """The model with adapters; in some layers alone, those outside the decoder are left out too."""
        chosen = {name: value for name, value in parameters.items() if layers is None or layer_of(name) in layers}
        return self._with_adapters(model, chosen, scale)

    def random(self, parameters: Parameters, generator: torch.Generator) -> dict[str, Tensor]:
        """What B writes is turned: B A keeps its size, and what it reads."""
        return {
            name: turned(value.T, generator).T.contiguous() if name.endswith(".B") else value
            for name, value in sorted(parameters.items())
        }

    def _with_adapters(self, model: Model, parameters: Parameters, scale: float) -> Model:
        from peft import LoraConfig, inject_adapter_in_model

        known = self.targets(model)
        names = {name: known[name] for name in sorted({name.rpartition(".")[0] for name in parameters})}
        if any(hasattr(model.module.get_submodule(module), "lora_A") for module in names.values()):
            raise UsageError(f"{model.name} has adapters already; put LoRA into a model without.")
        own = [value.requires_grad for value in model.module.parameters()]
        module = twin(model.module)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=scale * self.alpha,
            target_modules=list(names.values()),
        )
        # On the meta device: what PEFT would draw is replaced, and drawing it would move torch's generator.
        inject_adapter_in_model(config, module, adapter_name=NAME, low_cpu_mem_usage=True)
        for value, asked in zip(model.module.parameters(), own, strict=True):
            value.requires_grad_(asked)  # PEFT freezes what the two models share
        for name, target in names.items():
            part: Any = module.get_submodule(target)
            for side, owner in (("A", part.lora_A), ("B", part.lora_B)):
                owner[NAME].weight = _as_parameter(parameters[f"{name}.{side}"], model.device)
        return replace(model, module=module.eval(), fingerprint=self._fingerprint(model, parameters, scale))

    def _fingerprint(self, model: Model, parameters: Parameters, scale: float) -> str:
        """Of the model with adapters."""
        content = hashlib.sha256()
        for name, value in sorted(parameters.items()):
            content.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        made = {"model": model.fingerprint, "adapters": content.hexdigest(), "factor": scale * self.alpha / self.rank}
        return key(made)


def layer_of(name: str) -> int | None:
    """The decoder's layer that a parameter belongs to; ``None`` outside of it."""
    first = name.partition(".")[0]
    return int(first) if first.isdecimal() else None


def _as_parameter(value: Tensor, device: torch.device) -> torch.nn.Parameter:
    """The same, if it is one: gradients of the adapter are then those of what is trained."""
    if isinstance(value, torch.nn.Parameter):
        return value
    return torch.nn.Parameter(value.to(device), requires_grad=False)
