"""Where a training stands: parameters, optimiser, how it went. A step down; written down, and gone on from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probe.errors import ProbeError, UsageError
from probe.models.model import Model
from probe.store import write_bytes
from probe.vectors.method import Trained
from probe.vectors.parallel import Processes
from probe.vectors.vector import InContextVector

if TYPE_CHECKING:
    from probe.vectors.training import Training


def given_start(values: Mapping[str, Tensor], begin: InContextVector, method: Trained) -> dict[str, Tensor]:
    """The parameters to begin with, as copies."""
    shapes = {part: tuple(value.shape) for part, value in values.items()}
    given = {part: value for part, value in begin.parameters.items() if part not in method.extracted}
    if shapes != {part: tuple(value.shape) for part, value in given.items()}:
        raise UsageError(
            f"{method.label} cannot begin from {begin.label}, which has other parameters; give a vector of the same "
            f"form ({', '.join(f'{part} {list(shape)}' for part, shape in shapes.items())})."
        )
    return {part: given[part].to(values[part], copy=True) for part in values}


def check_finite(value: float, what: str) -> None:
    """Stop a training that has lost its way."""
    if not math.isfinite(value):
        raise ProbeError(f"{what}; lower the step size (--speed), or use float32 (--dtype).")


class State:
    """Where a training stands."""

    def __init__(
        self, name: str, parameters: dict[str, Tensor], optimiser: torch.optim.AdamW, processes: Processes
    ) -> None:
        self.name = name
        self.processes = processes
        self.parameters = parameters
        self.optimiser = optimiser
        self.epoch = 0
        self.best_epoch = 0
        self.curve: list[dict[str, float]] = []
        self.best = {name: value.detach().cpu().clone() for name, value in parameters.items()}

    @classmethod
    def start(
        cls,
        method: Trained,
        model: Model,
        options: Training,
        name: str,
        begin: InContextVector | None,
        processes: Processes,
    ) -> State:
        """Before the first step."""
        values = method.start(model, torch.Generator().manual_seed(options.seed))
        if begin is not None:
            values = given_start(values, begin, method)
        parameters = {part: torch.nn.Parameter(value.to(model.device)) for part, value in values.items()}
        groups = [
            {
                "params": [value],
                "lr": options.speed * method.step_size(part),
                "weight_decay": 0.0 if part == "b" else options.weight_decay,
            }
            for part, value in parameters.items()
        ]
        optimiser = torch.optim.AdamW(groups)
        for group in optimiser.param_groups:
            group["full"] = group["lr"]
        return cls(name, dict(parameters), optimiser, processes)

    def step(self, loss: Tensor, number: int, total: int, options: Training) -> None:
        """One step down."""
        check_finite(float(self.processes.sum(loss.detach().clone())), f"The loss is not finite in step {number + 1}")
        self.optimiser.zero_grad()
        if loss.requires_grad or self.processes.size == 1:  # else the whole batch is read by others
            loss.backward()
        self.processes.sum_gradients(self.parameters.values())
        size = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), options.clip)
        check_finite(float(size), f"The gradient is not finite in step {number + 1}")
        rise = max(1, round(options.warm_up * total))
        share = (
            (number + 1) / rise if number < rise else 0.5 + 0.5 * math.cos(math.pi * (number - rise) / (total - rise))
        )
        for group in self.optimiser.param_groups:
            group["lr"] = group["full"] * share
        self.optimiser.step()

    def end_epoch(self, terms: Mapping[str, float], validation: float | None) -> None:
        """Write down how it went, and remember the best."""
        self.epoch += 1
        if validation is not None:
            check_finite(validation, f"The loss of the episodes that validate is not finite after epoch {self.epoch}")
        self.curve.append({"epoch": self.epoch, **terms, **({} if validation is None else {"validation": validation})})
        checked = [point["validation"] for point in self.curve if "validation" in point]
        if validation is None or validation <= min(checked):
            self.best = {name: value.detach().cpu().clone() for name, value in self.parameters.items()}
            self.best_epoch = self.epoch

    def exhausted(self, patience: int) -> bool:
        """Whether it did not get better for too long."""
        return patience > 0 and self.epoch - self.best_epoch >= patience

    def save(self, path: Path) -> None:
        """Write the state down."""
        from safetensors.torch import save

        tensors = {f"best.{name}": value for name, value in self.best.items()}
        for name, value in self.parameters.items():
            tensors[f"parameter.{name}"] = value.detach().cpu().contiguous()
            for part, moment in self.optimiser.state[value].items():
                tensors[f"{part}.{name}"] = moment.cpu().contiguous()
        about = {"name": self.name, "epoch": self.epoch, "best_epoch": self.best_epoch, "curve": self.curve}
        write_bytes(path, save(tensors, {"state": json.dumps(about)}))

    def resume(self, path: Path) -> None:
        """Go on from a state that was written down, if there is one."""
        from safetensors import SafetensorError, safe_open

        if not path.exists():
            return
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["state"])
                name, epoch, best_epoch, curve = (about[each] for each in ("name", "epoch", "best_epoch", "curve"))
                tensors = {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ProbeError(f"{path} is not the state of a training ({error}); delete it to begin anew.") from error
        if name != self.name:
            raise ProbeError(f"{path} is the state of another training; choose another directory, or delete it.")
        self.epoch, self.best_epoch, self.curve = epoch, best_epoch, curve
        for name, value in self.parameters.items():
            with torch.no_grad():
                value.copy_(tensors[f"parameter.{name}"])
            self.optimiser.state[value] = {
                part: tensors[f"{part}.{name}"].to("cpu" if part == "step" else value.device)
                for part in ("step", "exp_avg", "exp_avg_sq")
            }
            self.best[name] = tensors[f"best.{name}"]
