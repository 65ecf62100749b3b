"""Changing what demonstrations say: named, seeded transformations of episodes, which compose and are written down.

An episode goes in, another comes out, with the transformation's name and seed at the end of ``perturbations``. What an
episode becomes depends on its query, its strategy and seed, on the transformation's name and seed, and on the pool: not
on the number of shots (only ``planted-answer`` does), or on what else was done to it. The pool that is taken by
default, all examples of the episodes, does depend on which episodes there are.

======================= ===============================================================================================
name                    what happens
======================= ===============================================================================================
``mismatched-image``    every demonstration shows the image(s) of another example
``mismatched-question`` every demonstration asks the question of another example
``mismatched-answer``   every demonstration gives the answer of another example, unlike its own
``mismatched-pair``     every demonstration has question and answer of another example
``wrong-answers``       every demonstration gives a wrong answer of the type of its own: no for yes, else another answer
                        to the same question, else another of the same type
``wrong-target``        so does the one that alone gives the query's answer (strategy ``sole``)
``planted-answer``      so does one, drawn among those of which this can be: an answer that nobody in the episode gives
``permuted-images``     the demonstrations exchange their images, none keeps its own
``permuted-answers``    the demonstrations exchange their answers, none keeps its own (others may be the same)
``blurred-images``      the demonstrations' images are blurred (Gaussian, 15 pixels)
``blurred-query``       the query's image is blurred so
``blank-images``        the demonstrations' images become one colour, their mean
``blank-query``         so does the query's
``random-labels``       every demonstration gives a label drawn from the label set (the query keeps its answer)
``flipped-labels``      all labels, the query's included, are exchanged for others: the same for the whole episode
``abstract-labels``     all labels, the query's included, become symbols: a bijection for each episode
``stated-labels``       the same, and the query's question begins with the bijection in words
``other-question``      the query asks another question, whose answer is of the same type
``instruction``         the query's question begins with an instruction to follow the demonstrations
``declarative``         questions become declarative sentences with a blank, from a table that is given
======================= ===============================================================================================

The settings follow "How to Configure Good In-Context Sequence for Visual Question Answering" (Li et al., CVPR 2024)
and, for labels, Pan et al. (Findings of ACL 2023). Unlike the first one's code, a replacement always differs from what
it replaces, and nothing is changed in place.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from probe.data.changes import PERTURBATIONS, SYMBOLS, Material
from probe.data.example import Episode, Example
from probe.errors import UsageError, did_you_mean


def perturb(
    episodes: Sequence[Episode],
    names: str | Sequence[str],
    *,
    seed: int = 0,
    pool: Sequence[Example] | None = None,
    labels: Sequence[str] | None = None,
    sentences: Mapping[str, str] | None = None,
    symbols: Sequence[str] = SYMBOLS,
    leave_out: bool = False,
) -> list[Episode]:
    """Transform every episode.

    Parameters
    ----------
    episodes
        They are left as they are; new ones are returned.
    names
        One or several of :data:`PERTURBATIONS`, applied in order.
    seed
        Of all draws.
    pool
        Examples from which others are taken (``mismatched-…``, ``wrong-answers``); default: all examples of the
        episodes. Neither the episode's own query is taken, nor what shows its image.
    labels
        The label set of all that exchange labels; default: that of the episode (``info["label_set"]``, as
        :func:`~probe.data.groups.labelled_episodes` makes them), else the answers that its demonstrations and query
        show.
    sentences
        For ``declarative``: the sentence for each question.
    symbols
        For ``abstract-labels``: single tokens of the model, if it does not know the default's.

    leave_out
        Leave out episodes that cannot be changed, instead of raising an error: where both yes and no are given, no
        other answer is free to plant.

    Returns
    -------
    list of Episode
        With the names and the seed added to ``perturbations``. Where the query's answers were exchanged,
        ``info["gold"]`` keeps the true ones, ``info["label_set"]`` is the new one, and of symbols
        ``info["mapping"]`` tells which label each stands for.

    Raises
    ------
    UsageError
        If there is no such transformation, or an episode does not have what it needs.
    """
    chosen = [names] if isinstance(names, str) else list(names)
    for name in chosen:
        if name not in PERTURBATIONS:
            raise UsageError(f"There is no perturbation {name!r}; {did_you_mean(name, tuple(PERTURBATIONS))}")
    everything = {id(example): example for episode in episodes for example in episode.examples}
    material = Material(list(everything.values()) if pool is None else pool, labels, sentences or {}, symbols)
    done = []
    for episode in episodes:
        try:
            done.append(_apply(chosen, episode, material, seed))
        except UsageError:
            if not leave_out:
                raise
    return done


def _apply(names: Sequence[str], episode: Episode, material: Material, seed: int) -> Episode:
    import numpy as np

    # Not the episode's id, which may tell the number of shots.
    whose = f"{episode.strategy} {episode.seed} {episode.query.id}"
    for name in names:
        rng = np.random.default_rng((seed, *(zlib.crc32(text.encode()) for text in (name, whose))))
        changed = PERTURBATIONS[name](episode, material, rng)
        episode = replace(changed, perturbations=(*episode.perturbations, f"{name} (seed {seed})"))
    return episode
