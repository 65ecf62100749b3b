"""Learning a vector: losses, gradients and teachers against plain torch hooks; stopping, and going on."""

from __future__ import annotations

import copy
import dataclasses
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import probe
import probe.vectors.training as module
from probe.data.example import Episode
from probe.errors import ProbeError, UsageError
from probe.experiments.answering import answering
from probe.models.load import load
from probe.models.model import Model
from probe.segments import QUERY
from probe.trace.steer import inject
from probe.vectors import losses
from probe.vectors.hificl import Hificl
from probe.vectors.live import Live
from probe.vectors.lora import Lora
from probe.vectors.m2iv import M2iv
from probe.vectors.method import Objective
from probe.vectors.mimic import Mimic
from probe.vectors.pairs import alone, encode_pair
from probe.vectors.teacher import Lesson, Teacher
from probe.vectors.training import STATE, Training, losses_of, split, train
from tests.tiny_qwen import make_episode, make_module, make_processor


def answered(episode: Episode, answer: str) -> Episode:
    return dataclasses.replace(episode, query=dataclasses.replace(episode.query, answers=(answer,)))


EPISODES = [
    answered(make_episode(2, seed=2), "a small brown cat"),
    answered(make_episode(1, seed=3, images=2), "red"),
    answered(make_episode(3, seed=4, images=0), "three dogs on the table"),
]
"""Of unequal lengths, with two, one and no pictures each; answers of one token and of several."""


@cache
def model() -> Model:
    processor = make_processor()
    return load(make_module(processor), processor=processor)


@cache
def eager() -> Model:
    """The same weights, with the attention that can be written out."""
    processor = make_processor()
    return load(make_module(processor, attn="eager"), processor=processor)


def drawn(method: Any, seed: int = 0) -> dict[str, torch.nn.Parameter]:
    """Large enough for every part of a gradient to count."""
    generator = torch.Generator().manual_seed(seed)
    spread = {"v": 0.2, "w": 0.1, "b": 1.0, "alpha": 0.3}
    return {
        name: torch.nn.Parameter(
            value + spread[name.split("_")[0]] * torch.randn(value.shape, generator=generator) + 2.0 * (name == "b")
        )
        for name, value in method.start(model(), generator).items()
    }


def hooked(batch: Any, keep: int, part: Any) -> tuple[Tensor, dict[int, Tensor]]:
    """The plain model's last logits for one episode, and what a part of every layer gave."""
    seen: dict[int, Tensor] = {}
    handles = [
        part(layer).register_forward_hook(
            lambda _m, _a, o, i=i: seen.__setitem__(i, (o[0] if isinstance(o, tuple) else o)[0])
        )
        for i, layer in enumerate(model().layers)
    ]
    logits = model().logits(batch, logits_to_keep=keep)[0]
    for handle in handles:
        handle.remove()
    return logits, seen


# -------------------------------------------------------------------------------------------------- a step done by hand


class ByHand:
    """A step with plain transformers and torch hooks, one episode at a time, without padding."""

    def __init__(self, method: Any, parameters: dict[str, Any]) -> None:
        self.method, self.parameters, self.objective = method, parameters, method.objective
        self.module: Any = eager().module
        self.layers = self.module.model.language_model.layers
        self.states: dict[tuple[int, str], Tensor] = {}

    def forward(self, encoding: Any, steered: bool) -> Tensor:
        """All logits, ``[position, vocabulary]``; leaves what the modules wrote behind."""
        batch = eager().batch([encoding])
        handles = []
        if steered:
            handles += self.hooks()
        for i, layer in enumerate(self.layers):
            parts = {"attention_output": layer.self_attn.o_proj, "mlp_output": layer.mlp, "layer_output": layer}
            for name, part in parts.items():
                handles.append(
                    part.register_forward_hook(
                        lambda _m, _a, o, at=(i, name): self.states.__setitem__(
                            at, (o[0] if isinstance(o, tuple) else o)[0]
                        )
                    )
                )
        home = sys.modules[type(self.layers[0].self_attn).__module__]
        original = home.eager_attention_forward
        if steered and isinstance(self.method, Mimic):
            home.eager_attention_forward = self.attention(original)
        try:
            return self.module(**batch.inputs, use_cache=False).logits[0]
        finally:
            home.eager_attention_forward = original
            for handle in handles:
                handle.remove()

    def hooks(self) -> list[Any]:
        p = self.parameters
        if isinstance(self.method, Live):

            def turn(_m: Any, _a: Any, o: Any, i: int) -> Any:
                h = o[0] if isinstance(o, tuple) else o
                s = h + p["alpha"][i] * p["v"][i]
                turned = s / (s**2).sum(-1, keepdim=True).sqrt() * (h**2).sum(-1, keepdim=True).sqrt()
                return (turned, *o[1:]) if isinstance(o, tuple) else turned

            return [layer.register_forward_hook(lambda *x, i=i: turn(*x, i=i)) for i, layer in enumerate(self.layers)]
        if isinstance(self.method, M2iv):
            found = []
            for i, layer in enumerate(self.layers):
                for part, name in ((layer.self_attn.o_proj, "attention"), (layer.mlp, "mlp")):
                    found.append(
                        part.register_forward_hook(
                            lambda _m, _a, o, i=i, name=name: o + p[f"alpha_{name}"][i] * p[f"v_{name}"][i]
                        )
                    )
            return found
        return []

    def attention(self, original: Any) -> Any:
        p = self.parameters
        owner = {layer.self_attn: i for i, layer in enumerate(self.layers)}

        def run(
            part: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, scaling: float, **options: Any
        ) -> Any:
            output, weights = original(part, query, key, value, *rest, scaling=scaling, **options)
            if part not in owner:
                return output, weights
            i, n = owner[part], query.shape[2]
            if self.method.size == "constant":
                return output + p["v"][i], weights
            log_z1, log_z2 = [], []
            for h in range(query.shape[1]):
                scores = scaling * query[0, h] @ key[0, h // (query.shape[1] // key.shape[1])].T
                if not self.method.released:
                    scores = scores.masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf)
                log_z2.append(scores.exp().sum(-1).log())
                log_z1.append(query[0, h] @ p["w"][i, h])
            z1, z2 = torch.stack(log_z1), torch.stack(log_z2)
            if self.method.size == "shared":
                z1, z2 = z1.sum(0, keepdim=True), z2.mean(0, keepdim=True)
            z1 = (z1 + p["b"][i].reshape(-1, 1)).exp()
            mu = z1 / (z1 + z2.exp())
            return output + (mu[..., None] * p["v"][i][:, None]).transpose(0, 1)[None], weights

        return run

    def terms(self, episodes: list[Episode]) -> dict[str, Tensor]:
        o = self.objective
        encoded = [(eager().encode(e), eager().encode(alone(e))) for e in episodes]
        end = eager().tokenizer.convert_tokens_to_ids("<|im_end|>")
        begin = eager().tokenizer.convert_tokens_to_ids("<|im_start|>")
        kl, ce, align, branches = [], [], [], []
        for teacher, student in encoded:
            # The query's turn begins at the last but one of the marks, the answer's at the last.
            first_of = [int((x.ids == begin).nonzero()[-2]) for x in (teacher, student)]
            with torch.no_grad():
                wanted = self.forward(teacher, False)
            thought = {at: value[first_of[0] :] for at, value in self.states.items()}
            said = self.forward(student, True)
            own = {at: value[first_of[1] :] for at, value in self.states.items()}
            n = len(student) - student.n_prompt  # tokens of the answer
            for back in range(n + 1, 0, -1):  # who predicts its first token, …, its last, and the end
                if o.released and back == n + 1:
                    continue
                p, q = (x[-back].softmax(-1) for x in (wanted, said))
                floor = 1e-6 if o.released else 0.0
                kl.append((p * ((p + floor).log() - (q + floor).log())).sum())
            gold = [*student.ids[student.n_prompt :].tolist(), end]
            log_p = said.log_softmax(-1)
            if o.released:
                pairs = [(i, int(student.ids[i + 1])) for i in range(len(student) - 1)]
            else:
                pairs = [(student.n_prompt - 1 + i, token) for i, token in enumerate(gold)]
            ce.append(-torch.stack([log_p[i, token] for i, token in pairs]).mean())
            apart = [own[i, o.align_site] - thought[i, o.align_site] for i in range(len(self.layers))]
            by_layer = [(x**2).mean() if o.reduction == "mean" else (x**2).sum() for x in apart]
            align.append(torch.stack(by_layer).mean())
            branches.append(own)
        found = {"kl": torch.stack(kl).mean(), "ce": torch.stack(ce).mean(), "align": torch.stack(align).mean()}
        layers = []
        for i in range(len(self.layers)):
            a, m = (torch.cat([own[i, f"{name}_output"] for own in branches]) for name in ("attention", "mlp"))
            both = torch.corrcoef(torch.cat([a, m], 1).T)[: a.shape[1], a.shape[1] :]
            weight = torch.where(torch.eye(len(both), dtype=torch.bool), 1.0, o.off_diagonal)
            layers.append((weight * (torch.eye(len(both)) - both) ** 2).sum() / len(both))
        found["synergy"] = torch.stack(layers).mean()
        wanted_terms = {name: value for name, value in found.items() if getattr(o, name)}
        return {**wanted_terms, "loss": sum(getattr(o, name) * value for name, value in wanted_terms.items())}  # type: ignore[dict-item]


STEPS: dict[str, Any] = {
    "live": Live(),
    "live as released": Live(released=True),
    "mimic": Mimic(),
    "mimic with the paper's sum": Mimic(reduction="sum", align_site="layer_output"),
    "mimic with KL": Mimic(kl=0.7, align_site="attention_output", ce=0.0),
    "mimic with one size a layer": Mimic(size="shared"),
    "mimic of constant size": Mimic(size="constant"),
    "mimic as released": Mimic(released=True),
    "m2iv": M2iv(off_diagonal=0.05),
}


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_equals_the_same_by_torch_hooks(kind):
    """Every term of the loss and the gradient of every parameter, of a padded batch, to 1e-5."""
    method = STEPS[kind]
    # As released, it sums over padding too: alone, there is none.
    episodes = EPISODES[:1] if kind == "mimic as released" else EPISODES
    ours, theirs = drawn(method), drawn(method)
    teacher = Teacher(model())
    site = method.objective.align_site if method.objective.align else None
    terms = losses_of(method.student(model(), ours)(), teacher.lessons(episodes, site), teacher, method.objective)
    by_hand = ByHand(method, theirs).terms(episodes)
    assert set(terms) == set(by_hand)
    for name, value in terms.items():
        assert float(value.detach()) == pytest.approx(float(by_hand[name].detach()), rel=1e-5), name
        assert float(value.detach()) > 0.01
    found = torch.autograd.grad(terms["loss"], list(ours.values()))
    wanted = torch.autograd.grad(by_hand["loss"], list(theirs.values()))
    for name, one, other in zip(ours, found, wanted, strict=True):
        assert float((one - other).abs().max()) < 1e-5 * float(other.abs().max()) + 1e-6, name
        assert float(other.abs().max()) > 1e-5, name


def test_the_released_cross_entropy_is_that_of_transformers():
    """With labels for all that the student reads."""
    method = Live(released=True, kl=0.0, ce=1.0)
    parameters = {name: torch.zeros_like(value) for name, value in drawn(method).items()}
    teacher = Teacher(model())
    lessons = teacher.lessons(EPISODES)
    found = losses_of(method.student(model(), parameters)(), lessons, teacher, method.objective, gradients=False)["ce"]
    wanted = []
    for episode in EPISODES:
        batch = model().batch([model().encode(alone(episode))])
        with torch.no_grad():
            wanted.append(float(model().module(**batch.inputs, labels=batch.inputs["input_ids"]).loss))
    assert float(found) == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)


@pytest.mark.parametrize("method", [Mimic(kl=1.0), Live(), M2iv()])
def test_a_student_that_is_its_own_teacher_has_nothing_to_learn_from_it(method):
    """Without demonstrations and with a vector of nothing: KL and distance are 0."""
    method = dataclasses.replace(method, ce=0.5)
    objective = dataclasses.replace(method.objective, kl=1.0, align=1.0)
    parameters = {name: torch.zeros_like(value) for name, value in drawn(method).items()}
    ours, made = model(), []
    for episode in EPISODES:
        student = ours.encode(alone(episode))
        batch = ours.batch([student])
        logits, seen = hooked(batch, len(student) - student.n_prompt + 1, lambda layer: layer.mlp)
        rows = np.flatnonzero(student.token_map.demonstration == QUERY)
        states = torch.stack([seen[i][rows] for i in range(ours.n_layers)])
        made.append(Lesson(episode, student, 0, logits, {"mlp_output": states}))
    for batch_of in (made[:1], made):
        terms = losses_of(method.student(ours, parameters)(), batch_of, Teacher(ours), objective)
        alone_ = len(batch_of) == 1
        bound = 0 if alone_ and not isinstance(method, Live) else 1e-6
        assert terms["kl"].abs() <= bound
        assert terms["align"] <= bound
        assert terms["ce"] > 1


# --------------------------------------------------------------------------------------------------------------- losses


def test_distillation_is_forward_and_a_mean_over_rows():
    """Against a loop; the other direction is another number; at half the temperature too."""
    generator = torch.Generator().manual_seed(0)
    s, t = (3 * torch.randn(5, 11, generator=generator) for _ in range(2))
    for temperature in (1.0, 2.5):
        for floor in (0.0, 1e-2):
            total = 0.0
            for row_s, row_t in zip((s / temperature).tolist(), (t / temperature).tolist(), strict=True):
                p = np.exp(row_t) / np.exp(row_t).sum()
                q = np.exp(row_s) / np.exp(row_s).sum()
                total += sum(float(a * (np.log(a + floor) - np.log(b + floor))) for a, b in zip(p, q, strict=True))
            found = float(losses.distillation(s, t, temperature, floor=floor))
            assert found == pytest.approx(temperature**2 * total / 5, rel=1e-4)
            assert found != pytest.approx(float(losses.distillation(t, s, temperature, floor=floor)), rel=1e-2)
    assert float(losses.distillation(s, s + 3.0, 1.0)) == pytest.approx(0, abs=1e-6)
    sure = torch.tensor([[0.0, -200.0]])
    assert torch.isfinite(losses.distillation(sure, -sure, 1.0))


def test_cross_entropy_counts_every_episode_the_same():
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(n, 7, generator=generator) for n in (1, 4)]
    ids = [torch.tensor([3]), torch.tensor([0, 1, 2, 6])]
    each = [
        np.mean([-float(row.log_softmax(-1)[i]) for row, i in zip(x, y, strict=True)])
        for x, y in zip(logits, ids, strict=True)
    ]
    assert float(losses.cross_entropy(logits, ids)) == pytest.approx(np.mean(each), rel=1e-6)


def test_distance_is_a_mean_over_episodes_whatever_their_length():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 6, 4, generator=generator) for _ in range(2))
    square = ((a - b) ** 2).numpy()
    parts = [square[:, :1], square[:, 1:]]
    mean, total = losses.distance(a, b, [1, 5], "mean"), losses.distance(a, b, [1, 5], "sum")
    assert float(mean) == pytest.approx(np.mean([part.mean() for part in parts]), rel=1e-6)
    assert float(total) == pytest.approx(np.mean([part.sum((1, 2)).mean() for part in parts]), rel=1e-6)


def test_synergy_is_of_correlations():
    """Against numpy, layer by layer; 0 for equal branches that are uncorrelated among themselves."""
    generator = torch.Generator().manual_seed(0)
    a, m = (torch.randn(2, 9, 4, generator=generator) * torch.tensor([1.0, 5.0, 0.1, 2.0]) + 3 for _ in range(2))
    wanted = 0.0
    for layer in range(2):
        for i in range(4):
            for j in range(4):
                r = np.corrcoef(a[layer, :, i], m[layer, :, j])[0, 1]
                wanted += ((1 - r) ** 2 if i == j else 0.3 * r**2) / 4 / 2
    assert float(losses.synergy(a, m, 0.3)) == pytest.approx(wanted, rel=1e-5)
    signs = torch.tensor([[[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]])
    assert float(losses.synergy(signs, 7 * signs + 1, 0.3)) == pytest.approx(0, abs=1e-6)
    assert float(losses.synergy(signs, -signs, 0.3)) == pytest.approx(4, rel=1e-6)
    still = torch.zeros(1, 4, 2, requires_grad=True)  # features that do not vary
    losses.synergy(still, signs, 0.3).backward()
    assert torch.isfinite(still.grad).all()


def test_objectives_that_make_no_sense_are_refused():
    for options, match in (
        ({}, "nothing to learn from"),
        ({"kl": -1.0}, "0 or more"),
        ({"kl": 1.0, "temperature": 0.0}, "temperature"),
        ({"align": 1.0, "align_site": "heads"}, "There is no site 'heads'"),
        ({"align": 1.0, "reduction": "max"}, "There is no reduction 'max'"),
    ):
        with pytest.raises(UsageError, match=match):
            Objective(**options)
    with pytest.raises(UsageError, match="nothing to learn from"):
        Live(kl=0.0, ce=0.0).fit(model(), EPISODES)


# -------------------------------------------------------------------------------------------------------------- teacher


def test_a_teacher_says_what_the_plain_model_says():
    """Logits of the answer and of what follows it, states of the query's and the answer's positions; no graph."""
    teacher = Teacher(model())
    lessons = teacher.lessons(EPISODES, "layer_output", batch_size=2)
    for episode, lesson in zip(EPISODES, lessons, strict=True):
        encoding = model().encode(episode)
        n = len(encoding) - encoding.n_prompt
        logits, seen = hooked(model().batch([encoding]), n + 1, lambda layer: layer)
        torch.testing.assert_close(lesson.logits, logits, rtol=0, atol=2e-5)
        rows = np.flatnonzero(encoding.token_map.demonstration == QUERY)
        assert rows[-1] == len(encoding) - 1
        wanted = torch.stack([seen[i][rows] for i in range(3)])
        [states] = teacher.states([lesson], "layer_output")
        torch.testing.assert_close(states, wanted, rtol=0, atol=2e-5)
        for kept in (lesson.logits, states):
            assert not kept.requires_grad
            assert kept.untyped_storage().nbytes() == kept.nbytes
        assert torch.equal(lesson.student.ids, model().encode(alone(episode)).ids)
        assert lesson.end == model().tokenizer.eos_token_id


def test_a_teacher_reads_once_for_all_methods():
    """States of another site are read once more; an episode that is equal, not the same object, is known."""
    teacher = Teacher(model())
    first = teacher.lessons(EPISODES)
    assert teacher.n_read == 3
    assert teacher.used == 0
    assert [a is b for a, b in zip(first, teacher.lessons(EPISODES), strict=True)] == [True] * 3
    copies = [dataclasses.replace(episode, id="another") for episode in EPISODES]
    assert [a is b for a, b in zip(first, teacher.lessons(copies), strict=True)] == [True] * 3
    assert teacher.n_read == 3
    teacher.lessons(EPISODES, "mlp_output", batch_size=2)
    assert teacher.n_read == 6
    teacher.lessons(list(reversed(EPISODES)), "mlp_output")
    teacher.states(first, "mlp_output")
    assert teacher.n_read == 6
    assert teacher.used == sum(lesson.states["mlp_output"].nbytes for lesson in first)
    assert "3 episodes" in str(teacher)
    twice = teacher.lessons([EPISODES[1], EPISODES[0], EPISODES[1]])
    assert [lesson is first[i] for lesson, i in zip(twice, (1, 0, 1), strict=True)] == [True] * 3


def test_a_shared_teacher_serves_shots_and_methods():
    teacher, options = Teacher(model()), Training(epochs=1, batch_size=2, validation=0.4)
    learn, validate = split(EPISODES, options)
    for method in (Live(), M2iv()):
        train(method, model(), EPISODES, training=options, teacher=teacher)
    assert teacher.n_read == len(learn) + len(validate) == 3
    fewer = [dataclasses.replace(e, demonstrations=e.demonstrations[:1]) for e in EPISODES]
    teacher.lessons(fewer)
    assert teacher.n_read == 5  # one of them has one demonstration as it is


def test_what_is_remembered_is_named_by_what_was_read():
    """One pixel, one token, or another model make another lesson; the id of an episode does not."""
    teacher = Teacher(model())
    episode = EPISODES[0]
    pair = encode_pair(model(), episode)
    from probe.vectors.teacher import _key

    own = _key(model(), pair.teacher)
    picture = episode.demonstrations[0].images[0].copy()
    picture.putpixel((40, 30), tuple(255 - value for value in picture.getpixel((40, 30))))
    other = dataclasses.replace(episode.demonstrations[0], images=(picture,))
    pixel = dataclasses.replace(episode, demonstrations=(other, *episode.demonstrations[1:]))
    token = answered(episode, "a small brown dog")
    revised = dataclasses.replace(model(), fingerprint="other")
    keys = [_key(model(), encode_pair(model(), each).teacher) for each in (pixel, token)]
    assert len({own, *keys, _key(revised, pair.teacher)}) == 4
    assert _key(model(), encode_pair(model(), dataclasses.replace(episode, id="x")).teacher) == own
    lessons = teacher.lessons([episode, pixel, token])
    assert len({id(lesson) for lesson in lessons}) == 3
    assert not torch.equal(lessons[0].logits, lessons[1].logits)


@pytest.mark.parametrize("budget", ["nothing", "one and a half"])
def test_beyond_its_budget_a_teacher_reads_again_and_says_the_same(budget):
    """What did not fit is not read in vain when it is asked for again, and never counted."""
    whole = Teacher(model())
    wanted = whole.states(whole.lessons(EPISODES, "mlp_output"), "mlp_output")
    size = 0 if budget == "nothing" else wanted[0].nbytes + wanted[1].nbytes // 2
    teacher = Teacher(model(), size)
    lessons = teacher.lessons(EPISODES, "mlp_output")
    assert teacher.n_read == 3
    assert teacher.used == (wanted[0].nbytes if size else 0) <= size
    assert [bool(lesson.states) for lesson in lessons] == [size > 0, False, False]
    teacher.lessons(EPISODES, "mlp_output")
    assert teacher.n_read == 3
    for _ in range(2):
        for one, other in zip(teacher.states(lessons, "mlp_output"), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    assert teacher.n_read == 3 + 2 * (2 if size else 3)
    assert teacher.used == (wanted[0].nbytes if size else 0)
    method = Mimic()
    parameters = drawn(method)
    ours, theirs = (
        losses_of(method.student(model(), parameters)(), each.lessons(EPISODES, "mlp_output"), each, method.objective)[
            "align"
        ]
        for each in (teacher, whole)
    )
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)


def test_a_teacher_of_another_model_is_refused():
    processor = make_processor()
    other = load(make_module(processor, seed=1), processor=processor)
    with pytest.raises(UsageError, match="another model or template"):
        train(Live(), model(), EPISODES, teacher=Teacher(other))


# ------------------------------------------------------------------------------------------------------------- training

QUICK = Training(epochs=3, batch_size=2, validation=0.34, speed=3.0, seed=1)
WORDS = ("red", "brown", "small", "long", "three", "a tail")
TEXTS = [
    answered(dataclasses.replace(e, query=dataclasses.replace(e.query, question=f"Is the cat {word}?")), "a cat")
    for e, word in zip((make_episode(1, seed=seed, images=0) for seed in range(5, 11)), WORDS, strict=True)
]
"""Without pictures they are read faster."""


def test_episodes_that_validate_are_not_learned_from(monkeypatch):
    learned, checked = [], []
    original = module.losses_of

    def spy(student, lessons, *rest, gradients=True):
        (learned if gradients else checked).extend(lesson.episode.id for lesson in lessons)
        return original(student, lessons, *rest, gradients=gradients)

    monkeypatch.setattr(module, "losses_of", spy)
    train(Live(), model(), TEXTS, training=QUICK)
    assert set(learned) | set(checked) == {episode.id for episode in TEXTS}
    assert not set(learned) & set(checked)
    assert len(set(checked)) == 2
    assert [learned.count(each) for each in set(learned)] == [3] * 4
    assert learned[:4] != learned[4:8]  # each epoch in an order of its own


def test_a_query_is_on_one_side_whatever_its_demonstrations():
    """The same query with several shots or seeds: its answer must not be learned where another copy validates."""
    episodes = [
        dataclasses.replace(
            make_episode(2, seed=seed), id=f"{seed} {shots}", demonstrations=make_episode(shots, seed=99).demonstrations
        )
        for shots in (1, 2)
        for seed in range(20)
    ]
    for seed in range(5):
        learn, validate = split(episodes, Training(seed=seed))
        assert len(learn) + len(validate) == 40
        assert len(validate) == 8
        assert not {e.query.id for e in learn} & {e.query.id for e in validate}
    assert split(episodes, Training(seed=1))[1] != split(episodes, Training(seed=2))[1]
    assert split(episodes[:20], Training(validation=0))[1] == []
    for wrong, share in (([], 0.2), (episodes[:2], 0.9)):
        with pytest.raises(UsageError, match="no episodes to learn from"):
            split(wrong, Training(validation=share))


def test_the_best_epoch_is_kept_and_patience_ends_it(monkeypatch):
    """By what validation says, which is planted here; without validation the last epoch counts."""
    seen: list[dict[str, Tensor]] = []
    planted = iter([3.0, 1.0, 2.0, 1.5, 1.2, 0.1])

    trained: dict[str, Tensor] = {}
    student = Live.student

    def watched(method, model, parameters):
        trained.update(parameters)
        return student(method, model, parameters)

    def validate(*_):
        seen.append({name: value.detach().clone() for name, value in trained.items()})
        return next(planted)

    monkeypatch.setattr(Live, "student", watched)
    monkeypatch.setattr(module, "_validate", validate)
    options = dataclasses.replace(QUICK, epochs=6, patience=3)
    found = train(Live(), model(), TEXTS, training=options)
    assert found.card["best_epoch"] == 2
    assert [point["validation"] for point in found.card["curve"]] == [3.0, 1.0, 2.0, 1.5, 1.2]
    assert [point["epoch"] for point in found.card["curve"]] == [1, 2, 3, 4, 5]
    for name, value in found.parameters.items():
        assert torch.equal(value, seen[1][name])
        assert not torch.equal(value, seen[4][name])
        assert not value.requires_grad
    monkeypatch.undo()
    last = train(Live(), model(), TEXTS, training=dataclasses.replace(QUICK, validation=0.0))
    assert last.card["best_epoch"] == 3
    assert set(last.card["curve"][0]) == {"epoch", "kl", "ce", "loss"}


def test_validation_is_the_mean_over_its_episodes():
    """Whatever the size of the batches that it is read in."""
    teacher = Teacher(model())
    lessons = teacher.lessons(TEXTS[:3])
    method, parameters = Live(), drawn(Live())
    student = method.student(model(), parameters)
    found = [
        module._validate(
            student,
            dict(enumerate(lessons)),
            3,
            teacher,
            method.objective,
            Training(batch_size=size),
            module.Processes(),
        )
        for size in (1, 3)
    ]
    each = [
        float(losses_of(student(), [lesson], teacher, method.objective, gradients=False)["loss"]) for lesson in lessons
    ]
    # An answer is two tokens and its end in all three, so that a mean over rows is one over episodes.
    assert found[0] == pytest.approx(sum(each) / 3, rel=1e-6)
    assert found[1] == pytest.approx(found[0], rel=1e-5)


class KilledError(Exception):
    """As if the process had ended."""


@pytest.mark.parametrize("at", [1, 3, 5])
@pytest.mark.parametrize("method", [Mimic(), Live(), Hificl(), Lora(rank=2)])
def test_a_training_that_was_killed_goes_on_to_the_same_bits(tmp_path, method, at):
    """In the first epoch, in the second, in the third, each time with a teacher of its own; a finished one is done."""
    whole = train(method, model(), TEXTS, training=QUICK)
    steps = 3 * 2

    def kill(done: int, of: int) -> None:
        assert of == steps
        if done == at:
            raise KilledError

    with pytest.raises(KilledError):
        train(method, model(), TEXTS, training=QUICK, directory=tmp_path, progress=kill)
    assert (tmp_path / STATE).exists() == (at > 2)
    done: list[int] = []
    again = train(
        method,
        model(),
        TEXTS,
        training=QUICK,
        directory=tmp_path,
        progress=lambda n, _: done.append(n),
    )
    assert done == list(range((at - 1) // 2 * 2 + 1, steps + 1))
    done.clear()
    third = train(
        method,
        model(),
        TEXTS,
        training=QUICK,
        directory=tmp_path,
        progress=lambda n, _: done.append(n),
    )
    assert done == []
    for found in (again, third):
        assert found.card == whole.card
        assert all(torch.equal(found.parameters[name], value) for name, value in whole.parameters.items())


def test_states_that_are_not_this_trainings_are_sentences(tmp_path):
    train(Live(), model(), TEXTS, training=dataclasses.replace(QUICK, epochs=1), directory=tmp_path)
    file = tmp_path / STATE
    for method, options, episodes in (
        (Live(), QUICK, TEXTS),
        (Live(), dataclasses.replace(QUICK, epochs=1, seed=2), TEXTS),
        (Live(ce=0.7), dataclasses.replace(QUICK, epochs=1), TEXTS),
        (Mimic(), dataclasses.replace(QUICK, epochs=1), TEXTS),
        (Live(), dataclasses.replace(QUICK, epochs=1), TEXTS[1:]),
    ):
        with pytest.raises(ProbeError, match="is the state of another training; choose another directory"):
            train(method, model(), episodes, training=options, directory=tmp_path)
    data = file.read_bytes()
    from safetensors.torch import save

    for broken in (
        b"",
        data[:-8],
        data[:200],
        b"\x80\x04pickle",
        save({"x": torch.ones(1)}),
        save({}, {"state": "{}"}),
    ):
        file.write_bytes(broken)
        with pytest.raises(ProbeError, match=r"is not the state of a training .*delete it to begin anew"):
            train(Live(), model(), TEXTS, training=dataclasses.replace(QUICK, epochs=1), directory=tmp_path)


def test_seeds_differ_and_one_seed_does_not():
    teacher = Teacher(model())
    runs = [
        train(Mimic(), model(), TEXTS, training=dataclasses.replace(QUICK, epochs=1, seed=seed), teacher=teacher)
        for seed in (1, 1, 2)
    ]
    assert all(torch.equal(runs[0].parameters[name], value) for name, value in runs[1].parameters.items())
    assert all(not torch.equal(runs[0].parameters[name], value) for name, value in runs[2].parameters.items())
    assert runs[0].card == runs[1].card


def test_the_first_steps_are_those_of_adamw_with_a_warm_up(monkeypatch):
    """By hand: no decay of biases, clipped gradients, step sizes of the method times the speed, a cosine to zero."""
    method, options = (
        Mimic(),
        Training(epochs=2, batch_size=3, validation=0.0, speed=2.0, seed=4, warm_up=0.25, clip=0.05),
    )
    teacher = Teacher(model())
    found = train(method, model(), TEXTS, training=options, teacher=teacher)
    start = method.start(model(), torch.Generator().manual_seed(4))
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    by_hand = torch.optim.AdamW(
        [
            {"params": [parameters["v"], parameters["w"]], "weight_decay": 1e-3},
            {"params": [parameters["b"]], "weight_decay": 0.0},
        ],
        lr=0.0,
    )
    lessons = teacher.lessons(TEXTS, "mlp_output")
    for step in range(4):
        epoch, part = divmod(step, 2)
        order = np.random.default_rng((4, epoch)).permutation(6)[3 * part : 3 * part + 3]
        loss = losses_of(method.student(model(), parameters)(), [lessons[i] for i in order], teacher, method.objective)[
            "loss"
        ]
        by_hand.zero_grad()
        loss.backward()
        size = torch.stack([value.grad.norm() for value in parameters.values()]).norm()
        assert size > 0.05
        for value in parameters.values():
            value.grad *= 0.05 / size
        for group in by_hand.param_groups:
            group["lr"] = 0.01 * (1.0 if step == 0 else 0.5 * (1 + np.cos(np.pi * (step - 1) / 3)))
        by_hand.step()
    for name, value in found.parameters.items():
        torch.testing.assert_close(value, parameters[name].detach(), rtol=0, atol=1e-5)
        assert float((value - start[name]).abs().max()) > 5e-3


def test_nothing_of_the_model_changes_even_on_an_error():
    processor = make_processor()
    own: Any = make_module(processor)
    own.lm_head.weight.requires_grad_(False)
    asked = {name: parameter.requires_grad for name, parameter in own.named_parameters()}
    before = copy.deepcopy(own.state_dict())
    ours = load(own, processor=processor)
    batch = ours.batch([ours.encode(TEXTS[0])])
    logits = ours.logits(batch)

    def fail(done: int, of: int) -> None:
        assert not any(parameter.requires_grad for parameter in own.parameters())
        raise KilledError

    train(Mimic(), ours, TEXTS[:3], training=dataclasses.replace(QUICK, epochs=1))
    for run in (fail,):
        with pytest.raises(KilledError):
            train(Mimic(), ours, TEXTS[:3], training=QUICK, progress=run)
    assert {name: parameter.requires_grad for name, parameter in own.named_parameters()} == asked
    assert any(asked.values())
    assert not all(asked.values())
    assert all(parameter.grad is None for parameter in own.parameters())
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    assert not own.training
    assert torch.equal(ours.logits(batch), logits)


class Broken(Live):
    """Its parameters begin where a number is no number."""

    def start(self, model, generator):
        return {name: value + self.alpha * float("nan") for name, value in super().start(model, generator).items()}


def test_a_loss_that_is_not_finite_is_a_sentence(monkeypatch):
    with pytest.raises(ProbeError, match=r"loss is not finite in step 1; lower the step size \(--speed\)"):
        train(Broken(), model(), TEXTS, training=QUICK)
    monkeypatch.setattr(module, "_validate", lambda *_: float("nan"))
    with pytest.raises(ProbeError, match="loss of the episodes that validate is not finite after epoch 1"):
        train(Live(), model(), TEXTS, training=QUICK)
    monkeypatch.undo()
    original = module._shared

    def steep(*arguments, **options):
        terms = original(*arguments, **options)
        return {**terms, "loss": terms["loss"] + 0 * (terms["loss"] - terms["loss"].detach()).sqrt()}

    monkeypatch.setattr(module, "_shared", steep)
    with pytest.raises(ProbeError, match="gradient is not finite in step 1"):
        train(Live(), model(), TEXTS, training=QUICK)


def test_parameters_are_float32_whatever_the_models_type():
    processor = make_processor()
    coarse = load(make_module(processor).bfloat16(), processor=processor)
    for method in (Mimic(), Live(), M2iv()):
        found = train(method, coarse, TEXTS[:3], training=dataclasses.replace(QUICK, epochs=1))
        assert {value.dtype for value in found.parameters.values()} == {torch.float32}
        start = method.start(coarse, torch.Generator().manual_seed(1))
        for name, value in found.parameters.items():
            assert float((value - start[name]).abs().max()) > 1e-4, name
        assert found.card["model"]["dtype"] == "bfloat16"
        batch = coarse.batch([coarse.encode(TEXTS[0])])
        assert inject(coarse, found).logits(batch).dtype == torch.bfloat16
    exact = load(make_module(processor).double(), processor=processor)
    found = train(Mimic(), exact, TEXTS[:3], training=dataclasses.replace(QUICK, epochs=1))
    assert {value.dtype for value in found.parameters.values()} == {torch.float32}


def test_models_that_cannot_be_trained_on_are_refused():
    processor = make_processor()
    half = load(make_module(processor).half(), processor=processor)
    for method in (Live(), Mimic(), M2iv()):
        with pytest.raises(UsageError, match=r"are float16.*use float32 or bfloat16"):
            train(method, half, TEXTS, training=QUICK)
    parameters = {name: value.detach() for name, value in drawn(Live()).items()}
    steered = inject(model(), probe.vectors.vector.InContextVector(Live(), parameters))
    with pytest.raises(UsageError, match="was steered; give the model as it is"):
        train(Live(), steered, TEXTS, training=QUICK)
    checkpointed: Any = make_module(processor)
    checkpointed.model.language_model.gradient_checkpointing = True
    with pytest.raises(UsageError, match="gradient checkpointing"):
        train(Live(), load(checkpointed, processor=processor), TEXTS, training=QUICK)


def test_numbers_out_of_range_are_refused():
    for options in (
        {"epochs": 0},
        {"batch_size": 0},
        {"patience": -1},
        {"seed": -1},
        {"speed": 0.0},
        {"clip": 0.0},
        {"weight_decay": -1.0},
        {"validation": 1.0},
        {"warm_up": 1.0},
    ):
        with pytest.raises(UsageError):
            Training(**options)


def test_the_card_says_what_it_is_from():
    options = dataclasses.replace(QUICK, epochs=1)
    card = train(Live(), model(), TEXTS, training=options).card
    assert card["data"]["episodes"] == 6
    assert card["data"]["shots"] == [1]
    assert card["training"] == dataclasses.asdict(options)
    assert card["model"]["fingerprint"] == model().fingerprint
    assert card["model"]["dtype"] == "float32"


# ------------------------------------------------------------------------------------------------- what was planted


def test_a_vector_does_what_the_demonstrations_did():
    """The bundled model guesses a hidden operator without demonstrations, and knows it with a vector of MimIC."""
    toy = probe.load("toy")
    episodes = probe.synthetic_episodes("operator:3", shots=6, n=96, seed=1)
    queries = [alone(episode) for episode in probe.synthetic_episodes("operator:3", shots=0, n=48, seed=2)]

    def accuracy(each: Model) -> float:
        return float(answering(each, queries)["correct"].mean())

    assert accuracy(toy) < 0.4
    found = Mimic().fit(toy, episodes, training=Training(epochs=6, batch_size=8, speed=6.0))
    assert accuracy(inject(toy, found)) > 0.9
    assert found.card["curve"][-1]["validation"] < 0.5 * found.card["curve"][0]["validation"]
