"""Training over several processes is training in one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from probe.errors import ProbeError, UsageError
from probe.vectors.hificl import Hificl
from probe.vectors.i2cl import I2cl
from probe.vectors.live import Live
from probe.vectors.lora import Lora
from probe.vectors.m2iv import M2iv
from probe.vectors.mimic import Mimic
from probe.vectors.parallel import Processes
from probe.vectors.training import STATE, Training
from probe.vectors.vector import InContextVector
from tests.test_vectors import exact
from tests.tiny_qwen import make_episode

METHODS: dict[str, Any] = {
    "live": Live(),
    "live as released": Live(released=True),
    "mimic": Mimic(kl=0.5),
    "m2iv": M2iv(synergy=0.0),
    "hificl": Hificl(),
    "i2cl": I2cl(),
    "lora": Lora(rank=2),
}
EPISODES = [make_episode(1, seed=seed, images=0) for seed in range(3, 12)]
# Seven to learn from in batches of three: of the last batch one process reads nothing. Answers differ in length.
OPTIONS = Training(epochs=2, batch_size=3, validation=0.25, seed=2)


def fit_all(directory: Path) -> None:
    """Train with each method, and save what this process found."""
    model = exact("qwen2_5_vl")
    rank = Processes.now().rank
    for kind, method in METHODS.items():
        state = directory / f"state {kind}"
        method.fit(model, EPISODES, training=OPTIONS, directory=state).save(directory / f"{kind} {rank}")


def run(directory: Path, size: int) -> list[subprocess.CompletedProcess[str]]:
    """This file as a program, in so many processes with gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parent.parent
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.test_parallel", str(directory)],
            cwd=root,
            env={**os.environ, **common, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        return [subprocess.CompletedProcess(each.args, each.wait(240), *each.communicate()) for each in started]
    finally:
        for each in started:
            each.kill()


def test_two_processes_find_what_one_finds(tmp_path):
    """To rounding, and the two of them to the bit; curves and the best epoch too. State is written once."""
    both, alone = tmp_path / "both", tmp_path / "alone"
    for each in run(both, 2):
        assert each.returncode == 0, each.stderr
    fit_all(alone)
    for kind in METHODS:
        first, second, wanted = (
            InContextVector.load(place) for place in (both / f"{kind} 0", both / f"{kind} 1", alone / f"{kind} 0")
        )
        assert (both / f"state {kind}" / STATE).exists()
        assert first.card["best_epoch"] == wanted.card["best_epoch"]
        for mine, theirs in zip(first.card["curve"], wanted.card["curve"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)
        for name, value in wanted.parameters.items():
            assert torch.equal(first.parameters[name], second.parameters[name])
            # AdamW divides by the size of gradients, so that rounding of small ones is seen: observed 1e-6.
            assert float((first.parameters[name] - value).abs().max()) < 2e-5, (kind, name)


def test_gradients_of_a_share_add_up(monkeypatch):
    """Without processes: what two would compute, by hand."""
    model = exact("qwen2_5_vl")
    from probe.vectors import training as module
    from probe.vectors.teacher import Teacher

    teacher = Teacher(model)
    for method in METHODS.values():
        objective = method.objective
        site = objective.align_site if objective.align else None
        lessons = teacher.lessons(EPISODES, site)
        parameters = {
            name: torch.nn.Parameter(value + 0.05) for name, value in method.start(model, torch.Generator()).items()
        }
        student = method.student(model, {**parameters, **method.extract(model, EPISODES, 4)})
        with module.frozen(model.module):
            whole = module.losses_of(student(), lessons, teacher, objective)["loss"]
            wanted = torch.autograd.grad(whole, list(parameters.values()))
            rows = [len(x.logits) - objective.released for x in lessons]
            totals = torch.tensor([len(lessons), sum(rows)], dtype=torch.float64)
            monkeypatch.setattr(Processes, "sum", lambda _self, value, totals=totals: totals)
            parts = [
                module._shared(student, own, teacher, objective, Processes(0, 2))["loss"]
                for own in (lessons[:2], lessons[2:])
            ]
            found = torch.autograd.grad(sum(parts), list(parameters.values()))  # type: ignore[arg-type]
            monkeypatch.undo()
        assert float(sum(parts).detach()) == pytest.approx(float(whole.detach()), rel=1e-6)
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_processes_that_do_not_train_the_same_are_refused(monkeypatch):
    """Another training, or another epoch, as where a directory is not shared."""
    for other in (("b", 3), ("a", 0)):

        def gather(found: list[Any], own: Any, other: Any = other) -> None:
            found[:] = [own, other]

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        with pytest.raises(
            ProbeError, match=r"process 0: a after epoch 3, process 1: . after epoch .*a directory that"
        ):
            Processes(0, 2).check_alike("a", 3)
    monkeypatch.setattr(
        torch.distributed, "all_gather_object", lambda found, own: found.__setitem__(slice(2), [own] * 2)
    )
    Processes(0, 2).check_alike("a", 3)


def test_a_loss_over_a_batch_is_refused():
    with pytest.raises(UsageError, match=r"train in one process, or without it \(m2iv:synergy=0\)"):
        Processes(0, 2).check(M2iv().objective)
    Processes(0, 1).check(M2iv().objective)
    assert Processes.now() == Processes(0, 1)


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    fit_all(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
