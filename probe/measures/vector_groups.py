"""Ways that differ in the seed of their training alone, taken together.

A group is what has the same kind, method with its options, training (all but the seed), size of the training set, scale
and place, and is or is not shown the demonstrations. Random ways belong together if what they stand beside does. Where
two ways of such a group have the same seed, or none is known, they differ in something that the result does not tell:
then each stands by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping

import numpy as np
import xarray as xr
from numpy.typing import NDArray

ALIKE = (
    "kind",
    "method",
    "training",
    "training_data",
    "training_episodes",
    "training_shots",
    "shown",
    "scale",
    "where",
)

Facts = Mapping[str, object]
"""What is known of a way, by the names of :data:`ALIKE`."""


def group_names(result: xr.Dataset) -> list[str]:
    """The name of each way's group: of a way by itself its own label, else what its ways have in common.

    Parameters
    ----------
    result
        Of ``probe.experiments.compare.compare``.
    """
    labels = result["way"].values.tolist()
    rows = zip(*(result[name].values.tolist() for name in ALIKE), strict=True)
    about: dict[str, Facts] = {
        label: dict(zip(ALIKE, row, strict=True)) for label, row in zip(labels, rows, strict=True)
    }
    like = dict(zip(labels, result["like"].values.tolist(), strict=True))
    keys = _keys(about, dict(zip(labels, result["training_seed"].values.tolist(), strict=True)), like)
    sizes = Counter(keys.values())
    names: dict[Hashable, str] = {}
    # Vectors before the random ones, which are called after them.
    for label in sorted(labels, key=lambda label: about[label]["kind"] == "random"):
        key = keys[label]
        if sizes[key] == 1:
            names[key] = label
        elif key not in names:
            found = f"random like {names[keys[like[label]]]}" if like[label] in keys else _words(about[label], about)
            taken = found in names.values() or keys.get(found, key) != key
            names[key] = f"{found} ({label}, …)" if taken else found
    return [names[keys[label]] for label in labels]


def _keys(about: Mapping[str, Facts], seeds: Mapping[str, int], like: Mapping[str, str]) -> dict[str, Hashable]:
    """The same for two ways where they belong together."""
    vectors = [label for label, facts in about.items() if facts["kind"] != "random"]
    own = {label: tuple(about[label].values()) for label in vectors}
    counts = Counter((own[label], seeds[label]) for label in vectors)
    unclear = {key for (key, seed), number in counts.items() if number > 1 or seed < 0}
    keys: dict[str, Hashable] = {label: label if own[label] in unclear else own[label] for label in vectors}
    beside = {label: ("random", keys[like[label]]) if like[label] in keys else label for label in about}
    return {label: keys.get(label, beside[label]) for label in about}


def _words(facts: Facts, about: Mapping[str, Facts]) -> str:
    """What tells a group from the others: sizes and training only where they are not all alike."""
    vectors = [x for x in about.values() if x["kind"] == "vector"]
    of_method = [x for x in vectors if x["method"] == facts["method"]]
    words = [str(facts["method"])]
    if len({x["training_episodes"] for x in vectors}) > 1:
        words.append(f"{facts['training_episodes']} episodes")
    if len({x["training_shots"] for x in vectors}) > 1:
        words.append(f"{facts['training_shots']} shot{'s' if facts['training_shots'] != 1 else ''}")
    common = set.intersection(*(set(str(x["training"]).split()) for x in [facts, *of_method]))
    words += [option for option in str(facts["training"]).split() if option not in common]
    if facts["where"]:
        words.append(str(facts["where"]))
    if facts["scale"] != 1:
        words.append(f"× {facts['scale']}")
    return ", ".join(words) + (" + demonstrations" if facts["shown"] else "")


def over_seeds(summary: xr.Dataset) -> xr.Dataset:
    """A summary with one way for each group: the mean over its ways, of estimates and of the ends of intervals.

    The ends hold for the mean of these very seeds. They are as far apart as those of one seed, for all seeds answer the
    same queries, and more seeds are not more queries.

    Parameters
    ----------
    summary
        Of :func:`~probe.measures.vector_summary.summarise_vectors`.

    Returns
    -------
    xarray.Dataset
        Over ``way``, the groups' names, with the coordinates of each group's first way; ``like`` names a group.
    """
    names = summary["group_of"].values
    members = [np.flatnonzero(names == group) for group in summary["group"].values]
    first = summary.isel(way=[places[0] for places in members])
    values = {
        name: (variable.dims, np.array([variable.values[places].mean(0) for places in members]))
        for name, variable in summary.data_vars.items()
        if "way" in variable.dims
    }
    belongs = dict(zip(summary["way"].values.tolist(), names.tolist(), strict=True))
    like = [belongs.get(label, "") for label in first["like"].values.tolist()]
    return first.assign(values).assign_coords(way=summary["group"].values, like=("way", like))


def alone(ways: xr.Dataset) -> NDArray[np.bool_]:
    """Which ways are vectors in the place of demonstrations; of a result or of a summary."""
    return np.asarray(np.isin(ways["kind"].values, ("vector", "oracle")) & ~ways["shown"].values)


def is_part(ways: xr.Dataset) -> NDArray[np.bool_]:
    """Which ways use a vector in some places only, while another uses it wherever it acts."""
    where, vector = ways["where"].values, ways["vector"].values
    return np.array([bool(place) and "" in where[vector == of] for place, of in zip(where, vector, strict=True)])


def put_back(ways: xr.Dataset, way: xr.Dataset) -> NDArray[np.bool_]:
    """Which ways use a vector as ``way`` does, with the demonstrations shown too."""
    alike = [ways[name].values == way[name].values for name in ("vector", "where", "scale")]
    return np.asarray(np.logical_and.reduce([ways["shown"].values, ways["kind"].values == "vector", *alike]))
