"""Training over several processes: each reads its share of every batch, and the gradients of the vector are added up.

A model never travels, nor do its gradients, for it is frozen: between two steps the processes exchange as many numbers
as the vector has. Every term of a loss is weighted by the share of its units (episodes, or for KL positions) that a
process has read, so that the sum over processes is the gradient of one process with the whole batch, to rounding. All
then take the same step from the same parameters.

Where torch's process group is initialised, training uses it; where it is not, there is one process::

    # torchrun --nproc-per-node 2 train.py
    torch.distributed.init_process_group("gloo")  # "nccl" where each process has a GPU of its own
    vector = Mimic().fit(model, episodes, training=Training(), directory=Path("state"))
    if torch.distributed.get_rank() == 0:
        vector.save(Path("vector"))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from probe.data.example import Episode
from probe.errors import ProbeError, UsageError
from probe.vectors.method import Objective
from probe.vectors.teacher import Lesson, Teacher


@dataclass(frozen=True)
class Processes:
    """Those that train together.

    Attributes
    ----------
    rank
        Which of them this is.
    size
        How many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def now(cls) -> Processes:
        """Of torch's process group, if there is one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def check(self, objective: Objective) -> None:
        """Refuse a loss that is no sum over episodes.

        Raises
        ------
        UsageError
            If there are several processes and it is not.
        """
        if self.size > 1 and objective.synergy:
            raise UsageError(
                "M²IV's synergistic loss is a correlation over all positions of a batch, which no process has to "
                "itself: train in one process, or without it (m2iv:synergy=0)."
            )

    def lessons(
        self, teacher: Teacher, episodes: Sequence[Episode], objective: Objective, batch_size: int
    ) -> dict[int, Lesson]:
        """What this process learns from or validates with, by place among all episodes: every ``size``-th of them."""
        places = range(self.rank, len(episodes), self.size)
        chosen = [episodes[place] for place in places]
        own = teacher.lessons(chosen, objective.site, logits=objective.kl > 0, batch_size=batch_size)
        return dict(zip(places, own, strict=True))

    def sum(self, value: Tensor) -> Tensor:
        """Over all processes."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Of all parameters; where there is none, as of a vision tower without images, it is zero."""
        for value in parameters:
            value.grad = self.sum(torch.zeros_like(value) if value.grad is None else value.grad.contiguous())

    def check_alike(self, training: str, epoch: int) -> None:
        """Refuse processes that do not train the same from the same state.

        Raises
        ------
        ProbeError
            If they do not.
        """
        if self.size == 1:
            return
        found: list[tuple[str, int]] = [("", 0)] * self.size
        dist.all_gather_object(found, (training, epoch))
        if len(set(found)) > 1:
            told = ", ".join(f"process {rank}: {name} after epoch {done}" for rank, (name, done) in enumerate(found))
            raise ProbeError(
                f"The processes are not at the same point of the same training ({told}): give all of them the same "
                "model, episodes and options, and a directory that all can read, or none."
            )
