"""Learning a vector: one loop for all methods, the model frozen.

The student reads the query alone through the method's edits; the teacher has read the demonstrations
(:mod:`probe.vectors.teacher`). Parameters are float32 whatever the model's type; AdamW, a cosine after a warm-up,
gradients clipped. After each epoch the episodes that validate are read, the best parameters are remembered, and the
state of the training is written, so that training that was stopped goes on where it was: the same numbers come out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probe.data.example import Episode
from probe.data.manifest import content_key, query_keys
from probe.errors import UsageError
from probe.models.model import Model
from probe.segments import QUERY
from probe.store import key
from probe.trace.edit import Output
from probe.trace.gradients import check_gradients, frozen
from probe.trace.read import LayerValues, read
from probe.trace.steer import check_plain
from probe.vectors import losses
from probe.vectors.descent import State
from probe.vectors.method import Method, Objective, Trained
from probe.vectors.parallel import Processes
from probe.vectors.teacher import Lesson, Teacher, flat_places, stack
from probe.vectors.vector import InContextVector, model_facts

STATE = "training.safetensors"


@dataclass(frozen=True)
class Training:
    """How to train.

    Attributes
    ----------
    epochs
        How often each episode is read.
    batch_size
        Episodes in one step.
    speed
        Factor on the method's published step sizes.
    weight_decay
        Of all parameters but biases.
    warm_up
        Share of the steps in which the step size rises.
    clip
        Largest norm of the gradient.
    validation
        Share of the episodes that validate and are not learned from.
    patience
        Epochs without a better validation after which training stops; 0 never stops early.
    seed
        Of the start, the order and the choice of what validates.
    """

    epochs: int = 10
    batch_size: int = 16
    speed: float = 1.0
    weight_decay: float = 1e-3
    warm_up: float = 0.1
    clip: float = 1.0
    validation: float = 0.2
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.patience < 0 or self.seed < 0:
            raise UsageError(
                "Training has one epoch or more, batches of one or more, and patience and seed are 0 or more."
            )
        if self.speed <= 0 or self.clip <= 0 or self.weight_decay < 0:
            raise UsageError("Speed and clip are more than 0, and weight decay is 0 or more.")
        if self.patience and not self.validation:
            raise UsageError("Patience waits for validation: let some episodes validate, or leave it out.")
        if not (0 <= self.validation < 1 and 0 <= self.warm_up < 1):
            raise UsageError("The shares of validation and warm-up are 0 or more and less than 1.")


def split(episodes: Sequence[Episode], training: Training) -> tuple[list[Episode], list[Episode]]:
    """Episodes to learn from, and to validate with; those of one query are on one side."""
    queries = list(dict.fromkeys(episode.query.id for episode in episodes))
    order = np.random.default_rng((training.seed, 3)).permutation(len(queries))
    n = round(training.validation * len(queries))
    chosen = {queries[i] for i in order[:n].tolist()}
    if n == len(queries):
        raise UsageError("There are no episodes to learn from; give more, or let fewer validate.")
    return (
        [episode for episode in episodes if episode.query.id not in chosen],
        [episode for episode in episodes if episode.query.id in chosen],
    )


def describe(model: Model, method: Method, episodes: Sequence[Episode], training: Training) -> dict[str, Any]:
    """The card of a vector: what it is for, and what it is from."""
    return {
        "model": {
            **model_facts(model),
            "name": model.name,
            "origin": model.origin,
            "family": model.family.name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "caveat": model.caveat,
        },
        "data": {
            "episodes": len(episodes),
            "shots": sorted({episode.shots for episode in episodes}),
            "strategies": sorted({episode.strategy for episode in episodes}),
            "key": content_key(episodes),
            "queries": query_keys(episodes),
        },
        "training": asdict(training),
    }


def train(
    method: Trained,
    model: Model,
    episodes: Sequence[Episode],
    *,
    training: Training | None = None,
    teacher: Teacher | None = None,
    directory: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    begin: InContextVector | None = None,
) -> InContextVector:
    """Learn a method's parameters; the arguments are those of :meth:`probe.vectors.method.Trained.fit`.

    Raises
    ------
    UsageError
        If a number is out of range, an episode has no demonstrations, the model's gradients would be wrong, or
        ``begin`` has other parameters or was made for another model.
    ProbeError
        If an episode cannot be read, the loss is not finite, or the state in ``directory`` is of another training.
    """
    check_plain(model)
    check_gradients(model)
    method.check(model)
    options, objective, processes = training or Training(), method.objective, Processes.now()
    processes.check(objective)
    learn, validate = split(episodes, options)
    teacher = teacher or Teacher(model)
    if (teacher.model.fingerprint, teacher.model.chat_template) != (model.fingerprint, model.chat_template):
        raise UsageError(
            f"The teacher is {teacher.model.name}, another model or template than that of {model.name}; make a teacher "
            "of the model that is trained."
        )
    card = describe(model, method, episodes, options)
    if begin is not None:
        begin.check(model)
        card["begin"] = {"label": begin.label, "identity": begin.identity}
    card["step_sizes"] = {
        part: options.speed * method.step_size(part) for part in method.start(model, torch.Generator())
    }
    name = key({"method": method.name, "options": asdict(method), **card})
    state = State.start(method, model, options, name, begin, processes)
    lessons = processes.lessons(teacher, learn, objective, options.batch_size)
    checks = processes.lessons(teacher, validate, objective, options.batch_size)
    if directory is not None:
        state.resume(Path(directory) / STATE)
    processes.check_alike(name, state.epoch)
    n_batches = math.ceil(len(learn) / options.batch_size)
    fixed = method.extract(model, learn, options.batch_size)
    there = {part: value.to(model.device) for part, value in fixed.items()}
    student = method.student(model, {**there, **state.parameters})
    with frozen(model.module):
        while state.epoch < options.epochs and not state.exhausted(options.patience):
            order = np.random.default_rng((options.seed, state.epoch)).permutation(len(learn))
            sums: dict[str, float] = {}
            for number in range(n_batches):
                chosen = order[number * options.batch_size : (number + 1) * options.batch_size]
                own = [lessons[i] for i in chosen if i in lessons]
                terms = _shared(student, own, teacher, objective, processes)
                state.step(terms["loss"], state.epoch * n_batches + number, options.epochs * n_batches, options)
                for term, value in terms.items():
                    sums[term] = sums.get(term, 0.0) + float(processes.sum(value.detach())) / n_batches
                if progress:
                    progress(state.epoch * n_batches + number + 1, options.epochs * n_batches)
            state.end_epoch(sums, _validate(student, checks, len(validate), teacher, objective, options, processes))
            if directory is not None and processes.rank == 0:
                state.save(Path(directory) / STATE)
    return InContextVector(
        method, {**fixed, **state.best}, {**card, "curve": state.curve, "best_epoch": state.best_epoch}
    )


def _validate(
    student: Callable[[], Model],
    lessons: Mapping[int, Lesson],
    n: int,
    teacher: Teacher,
    objective: Objective,
    options: Training,
    processes: Processes,
) -> float | None:
    """Mean loss over n lessons, of which this process has its own; ``None`` if there are none."""
    if not n:
        return None
    total = 0.0
    with torch.no_grad():
        for start in range(0, n, options.batch_size):
            part = range(start, min(n, start + options.batch_size))
            own = [lessons[i] for i in part if i in lessons]
            terms = _shared(student, own, teacher, objective, processes, gradients=False)
            total += float(processes.sum(terms["loss"])) * len(part)
    return total / n


def _shared(
    student: Callable[[], Model],
    lessons: Sequence[Lesson],
    teacher: Teacher,
    objective: Objective,
    processes: Processes,
    *,
    gradients: bool = True,
) -> dict[str, Tensor]:
    """What one process has to add to the terms of a batch's loss; those of all processes add up to them."""
    rows = sum(lesson.n_predictions - objective.released for lesson in lessons)
    own = torch.tensor([len(lessons), rows], dtype=torch.float64, device=teacher.model.device)
    episodes, positions = (own / processes.sum(own.clone())).tolist()
    if not lessons:
        nothing = torch.zeros((), device=teacher.model.device)
        return {name: nothing.clone() for name in (*objective.terms, "loss")}
    terms = losses_of(student(), lessons, teacher, objective, gradients=gradients)
    del terms["loss"]
    parts = {name: value * (positions if name == "kl" else episodes) for name, value in terms.items()}
    return {**parts, "loss": objective.weigh(parts)}


def losses_of(
    model: Model, lessons: Sequence[Lesson], teacher: Teacher, objective: Objective, *, gradients: bool = True
) -> dict[str, Tensor]:
    """The terms of the loss of a batch, and ``loss``, their weighted sum; ``model`` has the vector in it."""
    students = [lesson.student for lesson in lessons]
    batch = model.batch(students)
    sites: list[Output] = [objective.align_site] if objective.align else []
    sites += [site for site in ("attention_output", "mlp_output") if objective.synergy and site not in sites]
    rows = [torch.from_numpy(np.flatnonzero(student.token_map.demonstration == QUERY)) for student in students]
    places = flat_places(batch, rows)

    def reduce(values: LayerValues) -> dict[str, Tensor]:
        return {site: getattr(values, site)[places] for site in sites}

    whole = objective.released and objective.ce > 0
    keep = batch.length if whole else 1 + max(len(student) - student.n_prompt for student in students)
    reading = read(model, batch, sites, reduce if sites else None, logits_to_keep=keep, gradients=gradients)
    own = [row[-(1 + len(s) - s.n_prompt) :] for row, s in zip(reading.logits, students, strict=True)]
    terms: dict[str, Tensor] = {}
    if objective.kl:
        terms["kl"] = _distil(own, lessons, objective)
    if objective.ce and whole:
        full = [row[-len(s) :][:-1] for row, s in zip(reading.logits, students, strict=True)]
        terms["ce"] = losses.cross_entropy(full, [s.ids[1:] for s in students])
    elif objective.ce:
        ends = [torch.cat([s.ids[s.n_prompt :], torch.tensor([x.end])]) for s, x in zip(students, lessons, strict=True)]
        terms["ce"] = losses.cross_entropy(own, ends)
    stacked = {site: stack(model, reading, site) for site in sites}
    if objective.align:
        wanted = torch.cat(teacher.states(lessons, objective.align_site), 1).to(model.device)
        lengths = [len(row) for row in rows]
        terms["align"] = losses.distance(stacked[objective.align_site], wanted, lengths, objective.reduction)
    if objective.synergy:
        terms["synergy"] = losses.synergy(stacked["attention_output"], stacked["mlp_output"], objective.off_diagonal)
    return {**terms, "loss": objective.weigh(terms)}


def _distil(student: Sequence[Tensor], lessons: Sequence[Lesson], objective: Objective) -> Tensor:
    """KL at the predictions of the answer's tokens and of its end; as released, without the first."""
    cut = slice(1 if objective.released else 0, None)
    predicted = [lesson.logits for lesson in lessons if lesson.logits is not None]
    if len(predicted) < len(lessons):
        raise ValueError("The teacher's predictions were not asked for; get lessons with logits=True.")
    wanted = torch.cat([logits[cut] for logits in predicted]).to(student[0].device)
    floor = 1e-6 if objective.released else 0.0
    return losses.distillation(
        torch.cat([logits[cut] for logits in student]), wanted, objective.temperature, floor=floor
    )
