"""How the command line chooses demonstrations: its options, what they choose from, and the episodes that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from probe.cli.running import RUNS
from probe.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from probe.cli.options import Source
    from probe.data.example import Episode, Example
    from probe.models.encoders import Encoder
    from probe.models.model import Model
    from probe.store import Run

VECTORS = RUNS / "vectors.sqlite"
"""Where the vectors of images and texts are kept, for all runs."""

POOL = 512
"""Examples in the pool of a synthetic task."""

PAPER = ("RS", "SI", "SQ", "SQA", "sole", "sole-wrong")
"""The rows of the published table."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Choice:
    """How demonstrations are chosen.

    Parameters
    ----------
    choose
        Strategies, with commas: RS, SI, SQ, SQA, SQPA, SI-Q, SQ-I, SI-1, SI-2, SI+SQ, SI/SQ, sole, sole-wrong. The
        default is the rows of the published table.
    order
        Where the most similar demonstration stands: similar-last (next to the query), similar-first or random.
    distinct_images
        Let no two demonstrations of an episode share an image.
    image_encoder
        What compares images: own (the analysed model's vision tower), or a CLIP-like checkpoint: a directory or
        owner/name.
    text_encoder
        What compares texts: own (the analysed model's token embeddings), tfidf, or a checkpoint that embeds texts.
    first_round
        The strategy that gives the pseudo answers of SQPA.
    perturb
        Changes to every episode, with commas, such as blurred-query.
    """

    choose: str | None = None
    order: Literal["similar-last", "similar-first", "random"] = "similar-last"
    distinct_images: Annotated[bool, Parameter(negative=())] = False
    image_encoder: str = "own"
    text_encoder: str = "own"
    first_round: str = "SI"
    perturb: str | None = None

    @property
    def strategies(self) -> list[str]:
        """Names of strategies, checked."""
        from probe.data.strategies import STRATEGIES

        names = list(PAPER) if self.choose is None else [name.strip() for name in self.choose.split(",")]
        for name in [*names, self.first_round]:
            if name not in STRATEGIES:
                raise UsageError(f"There is no strategy {name!r}; {did_you_mean(name, tuple(STRATEGIES))}")
        if "question+answer" in STRATEGIES[self.first_round].keys:
            raise UsageError(f"--first-round {self.first_round} would look at the true answers; choose SI, SQ or RS.")
        return list(dict.fromkeys(names))

    @property
    def perturbations(self) -> list[str]:
        """Names of perturbations, checked."""
        from probe.data.changes import PERTURBATIONS

        names = [name.strip() for name in (self.perturb or "").split(",") if name.strip()]
        for name in names:
            if name not in PERTURBATIONS:
                raise UsageError(f"There is no perturbation {name!r}; {did_you_mean(name, tuple(PERTURBATIONS))}")
        return names


@dataclass(frozen=True)
class Candidates:
    """From what episodes are made: a pool with queries, or whole episodes."""

    pool: list[Example]
    queries: list[Example] | None
    episodes: list[Episode] | None = None

    def describe(self) -> dict[str, object]:
        """Content, for a run's settings."""
        from probe.data.manifest import episodes_key, examples_key

        if self.episodes is not None:
            return {"episodes_key": episodes_key(self.episodes)}
        queries = None if self.queries is None else examples_key(self.queries)
        return {"pool_key": examples_key(self.pool), "queries_key": queries}


def read_material(source: Source, choice: Choice) -> Candidates:
    """Read or draw what the options ask for."""
    if source.data is not None:
        return Candidates(*source.read_data())
    from probe.data.tasks import SELF_CONTAINED, TEXT_SUFFIX, synthetic_examples

    task = source.task or source.default_task
    if task.removesuffix(TEXT_SUFFIX) in SELF_CONTAINED:
        examples = synthetic_examples(task, n=POOL + source.episodes, seed=source.seed)
        return Candidates(examples[:POOL], examples[POOL:])
    if choice.choose is not None:
        raise UsageError(
            f"The examples of {task} belong to their episodes, so demonstrations cannot be chosen; leave out --choose, "
            f"or take --task {' or '.join(SELF_CONTAINED)}."
        )
    return Candidates([], None, replace(source, task=task).read_episodes())


def identify(encoder: str) -> str | None:
    """The fingerprint of an encoder's checkpoint; ``None`` where something else of the settings decides it."""
    if encoder in ("own", "tfidf"):
        return None
    from probe.models.fingerprint import of_directory
    from probe.models.names import find

    return of_directory(find(encoder)[0])


def choose_episodes(
    source: Source, choice: Choice, material: Candidates, model: Model, run: Run, batch_size: int
) -> list[Episode]:
    """One list for all strategies; ``sole`` and ``sole-wrong`` in both readings."""
    from probe.data.choose import choose
    from probe.data.perturb import perturb
    from probe.data.strategies import STRATEGIES
    from probe.experiments.answering import answering
    from probe.models.spaces import embed

    if material.episodes is not None:
        return perturb(material.episodes, choice.perturbations, seed=source.seed)
    pool, queries, names = material.pool, material.queries, choice.strategies
    wanted = [*names, *((choice.first_round,) if "SQPA" in names else ())]
    images, texts = encoders_for(choice, pool, wanted, model, batch_size)
    spaces = embed(pool, queries, strategies=[n for n in wanted if n != "SQPA"], images=images, texts=texts)
    options: Any = {"n": source.episodes, "seed": source.seed, "order": choice.order}
    options |= {"distinct_images": choice.distinct_images}
    episodes = []
    for name in names:
        if name == "SQPA":
            first = choose(pool, queries, strategy=choice.first_round, shots=source.shots, spaces=spaces, **options)
            said = answering(model, first, batch_size=batch_size, keep=run.part, name="first-round-")
            pseudo = dict(zip(said["query"].values.tolist(), said["prediction"].values.tolist(), strict=True))
            asked = [episode.query for episode in first]  # in the order that all strategies ask in
            near = embed(pool, asked, strategies=["SQPA"], texts=texts, pseudo_answers=pseudo)
            episodes += choose(pool, asked, strategy=name, shots=source.shots, spaces=near, shuffle=False, **options)
            continue
        for shots in dict.fromkeys((source.shots, 1) if STRATEGIES[name].alone else (source.shots,)):
            episodes += choose(pool, queries, strategy=name, shots=shots, spaces=spaces, **options)
    return perturb(episodes, choice.perturbations, seed=source.seed, pool=pool)


def encoders_for(
    choice: Choice, pool: Sequence[Example], strategies: Sequence[str], model: Model, batch_size: int
) -> tuple[Encoder | None, Encoder | None]:
    """Encoders of images and of texts, as far as the strategies need them."""
    from probe.data.strategies import STRATEGIES
    from probe.models.encoders import checkpoint_encoder, own_encoder, tfidf_encoder
    from probe.models.vector_cache import cached

    keys = {key for name in strategies for key in STRATEGIES[name].keys}

    def make(name: str) -> Encoder:
        if name == "own":
            return own_encoder(model, batch_size=batch_size)
        if name == "tfidf":
            return tfidf_encoder([f"{example.question} {example.answer}" for example in pool])
        return checkpoint_encoder(name, device=model.device)

    images = cached(make(choice.image_encoder), VECTORS) if "image" in keys else None
    texts = cached(make(choice.text_encoder), VECTORS) if keys - {"image"} else None
    return images, texts
