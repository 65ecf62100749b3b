"""An episode with its demonstrations and without: what the teacher reads, and what the student reads.

The student reads the query alone. Its tokens have to be the teacher's but for those of the demonstrations, one by one;
this is checked for every pair, since a template may write a turn otherwise when it stands first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from probe.data.example import Episode
from probe.data.images import open_images
from probe.errors import ProbeError, UsageError
from probe.models.encoding import Encoding
from probe.models.model import Model
from probe.segments import QUERY


@dataclass(frozen=True)
class Pair:
    """One episode, encoded twice, answers included.

    Attributes
    ----------
    teacher
        With demonstrations.
    student
        Without.
    """

    teacher: Encoding
    student: Encoding

    @property
    def kept(self) -> NDArray[np.intp]:
        """``[n of the student]``, where each of the student's positions stands in the teacher's.

        Where a template writes nothing before the first turn, the teacher's sink is the first token of a demonstration,
        and the student's that of the query: the former is left out too.
        """
        found = np.flatnonzero(self.teacher.token_map.demonstration < 0)
        alike = int(self.teacher.ids[0]) == int(self.student.ids[0])
        return found[1:] if alike and len(found) == len(self.student) + 1 else found

    @property
    def end(self) -> int:
        """The token behind the last demonstration's answer: what ends an answer in this layout."""
        last = int(self.teacher.token_map.where("answer", self.teacher.token_map.shots - 1)[-1])
        return int(self.teacher.ids[last + 1])

    @property
    def query(self) -> NDArray[np.intp]:
        """The student's positions of the query and its answer."""
        return np.flatnonzero(self.student.token_map.demonstration == QUERY)


def alone(episode: Episode) -> Episode:
    """The episode without its demonstrations."""
    return replace(episode, demonstrations=(), perturbations=())


def encode_pair(model: Model, episode: Episode) -> Pair:
    """Encode an episode with and without its demonstrations.

    Raises
    ------
    UsageError
        If it has no demonstrations.
    ProbeError
        If the two do not have the same tokens but for the demonstrations'.
    """
    if not episode.demonstrations:
        raise UsageError(
            f"Episode {episode.id} has no demonstrations: there is nothing that a vector could stand for. Give each "
            "episode one shot or more."
        )
    images = open_images(episode)
    n_own = len(episode.query.images)
    pair = Pair(model.encode(episode, images), model.encode(alone(episode), images[len(images) - n_own :]))
    if not torch.equal(pair.teacher.ids[torch.from_numpy(pair.kept)], pair.student.ids):
        raise ProbeError(
            f"Episode {episode.id}: without its demonstrations the prompt of {model.name} has other tokens, not just "
            f"fewer ({len(pair.student)} in place of {len(pair.kept)}, or not the same): states could not be compared. "
            "Choose another layout (--prompt)."
        )
    return pair
