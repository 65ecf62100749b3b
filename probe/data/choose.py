"""Choosing demonstrations for queries: at random, or because they are like the query.

============== ========================================================================================================
strategy       demonstrations
============== ========================================================================================================
``RS``         drawn at random
``SI``         the images nearest to the query's
``SQ``         the questions nearest to the query's
``SQA``        question and answer nearest to the query's with its *true* answer: an oracle
``SQPA``       the same with a pseudo answer for the query, such as the model's own in a first round
``SI-Q``       of the nearest by image (``candidates``, 32), the nearest by question
``SQ-I``       of the nearest by question, the nearest by image
``SI-1``       of all questions about the nearest images, the nearest questions
``SI-2``       the nearest images, with the nearest question about each: no image twice
``SI+SQ``      nearest by the mean of both similarities
``SI/SQ``      in turn the nearest by image and the nearest by question
``sole``       as SQA, but one demonstration alone gives the query's answer
``sole-wrong`` the same, and this demonstration gives a wrong answer instead
============== ========================================================================================================

Similarity is the cosine of vectors that are given (:class:`Space`); :mod:`probe.models.encoders` makes such vectors.
The names are those of "How to Configure Good In-Context Sequence for Visual Question Answering" (Li et al., CVPR 2024);
its code is ported in idea only: it ranks mixed similarities upside down, takes questions for images and lets a query
meet its own image where splits overlap. Its table's "sole" can be read in two ways, both are here: ``sole`` with one
shot is a context of one demonstration, with more shots it is a context in which one alone has the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from probe.data.example import Episode, Example, check_request
from probe.data.perturb import perturb
from probe.data.strategies import STRATEGIES, Key, Shown, Strategy, View, pick, pick_alone
from probe.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Order = Literal["similar-last", "similar-first", "random"]
"""Where the most similar demonstration stands: last is next to the query."""

CANDIDATES = 32
"""How many the first of two criteria leaves to the second (Li et al.'s code)."""


@dataclass(frozen=True)
class Space:
    """Vectors in which nearness means likeness.

    Attributes
    ----------
    pool
        ``[examples of the pool, width]``, dense or sparse; need not be normalised.
    queries
        ``[queries, width]``.
    encoder
        What made them; written down in every episode.
    pseudo_answers
        Of ``question+answer``: the answers that stand for the queries' true ones, if they do; written down too.
    """

    pool: Any
    queries: Any
    encoder: str
    pseudo_answers: Sequence[str] | None = None

    def cosine(self, index: int) -> NDArray[np.float64]:
        """Cosine of one query's vector with all of the pool's, where all have length 1; 0 for a vector of zeros.

        Rounded, so that equal texts and images are equally near however the product was summed up.
        """
        import numpy as np

        product = self.pool @ self.queries[index : index + 1].T
        dense = product.toarray() if hasattr(product, "toarray") else product
        return np.asarray(dense, dtype=np.float64)[:, 0].round(6)


def choose(
    pool: Sequence[Example],
    queries: Sequence[Example] | None = None,
    *,
    strategy: str = "RS",
    shots: int,
    n: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    order: Order = "similar-last",
    distinct_images: bool = False,
    candidates: int = CANDIDATES,
    spaces: Mapping[Key, Space] | None = None,
) -> list[Episode]:
    """Make one episode for each query, with demonstrations from the pool.

    The demonstrations are never the query itself nor share an image with it: an identical image would leak the answer,
    since a model could look the picture up among the demonstrations and copy what stands there. The same image is the
    same file, or the same pixels in memory; copies under two names are not noticed.

    Parameters
    ----------
    pool
        From which demonstrations come.
    queries
        What is asked; default: the pool itself.
    strategy
        One of :data:`STRATEGIES`.
    shots
        Demonstrations in each episode.
    n
        Number of episodes at most, default all queries. Each query is taken at most once, in an order drawn from
        ``seed``: the same for all strategies.
    shuffle
        Draw that order; else queries are taken as they are given, as after a first round that has drawn it.
    seed
        Episode i of a seed is always the same, whatever ``n``. With more shots, ``RS`` begins with the same
        demonstrations.
    order
        Of the demonstrations. OpenFlamingo puts the most similar last, Li et al. first. Those of ``RS`` stand as drawn.
    distinct_images
        Let no two demonstrations of an episode share an image.
    candidates
        Of ``SI-Q``, ``SQ-I``: how many examples, of ``SI-1``: how many images the first criterion leaves.
    spaces
        Vectors by what they show, as far as the strategy compares it (``STRATEGIES[strategy].keys``). ``SQPA`` needs
        those of pseudo answers, and all others those of the true ones.

    Returns
    -------
    list of Episode
        ``info`` has ``order``, and by what was compared the ``encoders`` and the ``similarity`` of each demonstration,
        in their order. Equally similar examples are taken in an order drawn from the seed. For ``sole`` and
        ``sole-wrong``, queries whose answer nobody in the pool gives are left out (for ``sole-wrong`` also those for
        which no wrong answer is left), and ``info["target"]`` is the demonstration that gives it (or gave it).

    Raises
    ------
    UsageError
        If a number is out of range, there is no such strategy, vectors are missing or of the wrong number, or the pool
        has too few examples that may stand before a query.
    """
    own = queries is None
    asked = pool if queries is None else queries
    if not asked:
        raise UsageError("There is no example to ask about; give at least one.")
    n = len(asked) if n is None else n
    method = _check(strategy, order, shots, n, seed, candidates, len(pool) - own)
    unit = _unit(spaces or {}, method.keys, strategy, len(pool), len(asked))
    import numpy as np

    shown = Shown(pool)
    episodes = []
    drawn = np.random.default_rng((seed, 0)).permutation(len(asked)) if shuffle else np.arange(len(asked))
    for number, index in enumerate(drawn[:n].tolist()):
        query = asked[index]
        view = View(
            query=query,
            pool=pool,
            shown=shown,
            taken=shown.with_images_of(query) | ({index} if own else shown.same_as(query)),
            similarity={key: space.cosine(index) for key, space in unit.items()},
            rng=np.random.default_rng((seed, 1, number)),
            distinct=distinct_images or method.distinct,
            candidates=candidates,
        )
        picked = (pick_alone if method.alone else pick)(method.rank, view, shots)
        if picked is None:
            continue
        if len(picked.places) < shots:
            raise UsageError(
                f"The query {query.id!r} needs {shots} demonstrations, but only {len(picked.places)} other examples "
                f"{'with images of their own ' if view.distinct else ''}do not show its image; add examples or ask for "
                "fewer shots."
            )
        places = _arrange(picked.places, order if method.keys else "similar-first", view.rng)
        info: dict[str, Any] = {"order": order if method.keys else "random"}
        if method.keys:
            info["encoders"] = {key: space.encoder for key, space in unit.items()}
            info["similarity"] = {key: near[places].round(6).tolist() for key, near in view.similarity.items()}
            said = [space.pseudo_answers[index] for space in unit.values() if space.pseudo_answers is not None]
            info |= {"pseudo_answer": said[0]} if said else {}
        if picked.target is not None:
            info["target"] = places.index(picked.target)
        demonstrations = tuple(pool[place] for place in places)
        episodes.append(
            Episode(f"{strategy}-{shots}shot-{seed}-{number}", demonstrations, query, strategy, seed, info=info)
        )
    return perturb(episodes, "wrong-target", seed=seed, pool=pool, leave_out=True) if method.wrong else episodes


def _check(strategy: str, order: str, shots: int, n: int, seed: int, candidates: int, n_others: int) -> Strategy:
    """Refuse what cannot be done; give the strategy of the name."""
    check_request(shots, n, seed)
    if strategy not in STRATEGIES:
        raise UsageError(f"There is no strategy {strategy!r}; {did_you_mean(strategy, tuple(STRATEGIES))}")
    if order not in get_args(Order):
        raise UsageError(f"There is no order {order!r}; {did_you_mean(order, get_args(Order))}")
    if n_others < shots:
        raise UsageError(
            f"{shots} shots need {shots} examples besides the query, but there are {n_others}; add examples or "
            "ask for fewer shots."
        )
    if candidates < shots and strategy in ("SI-Q", "SQ-I"):
        raise UsageError(f"{shots} shots cannot be chosen among {candidates} candidates; ask for more candidates.")
    method = STRATEGIES[strategy]
    if method.alone and shots < 1:
        raise UsageError(f"{strategy} needs a demonstration; ask for one shot or more.")
    return method


def _unit(
    spaces: Mapping[Key, Space], keys: tuple[Key, ...], strategy: str, n_pool: int, n_queries: int
) -> dict[Key, Space]:
    """The spaces that a strategy needs, their vectors at unit length."""
    unit = {}
    for key in keys:
        if key not in spaces:
            raise UsageError(
                f"{strategy} compares by {key}; give vectors for it, such as spaces={{{key!r}: Space(…)}}."
            )
        space = spaces[key]
        given = space.pool.shape[0], space.queries.shape[0]
        if given != (n_pool, n_queries):
            raise UsageError(
                f"The vectors for {key} are of {given[0]} pool examples and {given[1]} queries, but there are {n_pool} "
                f"and {n_queries}; give one for each."
            )
        if key == "question+answer" and (space.pseudo_answers is not None) != (strategy == "SQPA"):
            raise UsageError(
                f"{strategy} compares the queries' {'pseudo' if strategy == 'SQPA' else 'true'} answers, but the "
                "vectors are of the others; make them with embed(strategies=[…]) for it alone."
            )
        unit[key] = unit_space(space)
    return unit


def unit_space(space: Space) -> Space:
    """The same with vectors of length 1; those of zeros stay."""
    from sklearn.preprocessing import normalize

    return replace(space, pool=normalize(space.pool), queries=normalize(space.queries))


def _arrange(places: list[int], order: Order, rng: np.random.Generator) -> list[int]:
    """From most similar first to the order that is asked for."""
    if order == "random":
        return [places[rank] for rank in rng.permutation(len(places))]
    return places if order == "similar-first" else places[::-1]
