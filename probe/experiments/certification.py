"""Prove on a loaded model that what is recorded is what it computes: ``probe models check``.

Every check compares two ways that share as little as possible: the token map with the prompt's ids, recorded mass with
the attention matrix of :mod:`probe.models.oracle`, an edit with a plain torch hook, a padded batch with its episodes
alone. The same checks run in the tests, for every family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from probe.data.example import Episode, Example
from probe.data.scenes import Scene, render
from probe.errors import UsageError
from probe.experiments.attention_dataset import Plan
from probe.experiments.attention_reducer import BatchRows, Keys, make_reducer
from probe.measures.mass import RESIDUAL_BOUND
from probe.models.encoding import Batch, Encoding
from probe.models.model import Model
from probe.models.oracle import naive_attention, observed
from probe.models.sites import AttentionSite
from probe.models.token_map import ROLES, segments_for
from probe.trace.ablate import zero_head
from probe.trace.edit import Context, Edit
from probe.trace.read import LayerValues, Reading, read

MASS_BOUND = 2e-5
"""Largest accepted difference between recorded mass and the oracle's: both in fp32 or better, from the same q and k."""

ROUNDINGS = 20
"""The mass of an episode in a padded batch may differ from that of the episode alone by this many times what one
rounding error in the first layer makes of it: kernels round differently for other shapes, and layers amplify that."""

DECIDABLE = 0.05
"""Where that bound is above this, rounding hides whatever padding might do."""


@dataclass(frozen=True)
class Check:
    """What was checked, what was found, and whether it is as it should be."""

    name: str
    found: str
    passed: bool


@dataclass(frozen=True)
class Case:
    """A model with episodes of different length, shape and number of images, read in one padded batch."""

    model: Model
    episodes: list[Episode]
    encodings: list[Encoding]
    batch: Batch
    plan: Plan
    reading: Reading

    def places(self) -> dict[AttentionSite, dict[str, Tensor]]:
        """What was recorded at every site."""
        by_axis = {"text": self.reading.layers, "vision": self.reading.cross}
        return {site: by_axis[site.axis][site.layer] for site in self.model.sites}


def largest(values: Iterable[Tensor]) -> float:
    """The largest absolute value; NaN if any is."""
    return float(torch.stack([value.detach().float().abs().max().cpu() for value in values]).max())


def check_episodes() -> list[Episode]:
    """Three shots; none, with a picture of another shape; and one with two pictures in each example."""
    sizes = ((336, 224), (224, 336), (280, 280))

    def example(number: int, pictures: int = 1) -> Example:
        scene = Scene(colour=number % 4, kind=number % 8, count=number % 4, size=number % 2)
        images = tuple(
            render(scene, 10 * number + i).resize(sizes[(number + i) % 3], Image.Resampling.NEAREST)
            for i in range(pictures)
        )
        colours = ("red", "green", "blue", "orange")
        return Example(f"check{number}", images, "What colour is it?", (colours[number % 4],))

    made = [[example(i) for i in range(4)], [example(4)], [example(5, 2), example(6, 2)]]
    return [Episode(f"check-{n}", tuple(row[:-1]), row[-1]) for n, row in enumerate(made)]


def prepare(model: Model, episodes: Sequence[Episode] | None = None) -> Case:
    """Read the episodes once, with everything recorded."""
    chosen = list(episodes or check_episodes())
    bare = [episode.id for episode in chosen if not any(example.images for example in episode.examples)]
    if bare:
        raise UsageError(f"Certification looks at images; {', '.join(bare)} show none.")
    if model.family.like_images:
        first = sum(len(example.images) for example in chosen[0].examples)
        chosen = [e for e in chosen if sum(len(example.images) for example in e.examples) == first]
    encodings = [model.encode(episode) for episode in chosen]
    batch = model.batch(encodings)
    segments = segments_for(max(episode.shots for episode in chosen))
    plan = Plan("answer", model.choose_layers(None), segments, cross_layers=model.choose_layers(None, "vision"))
    return Case(model, chosen, encodings, batch, plan, _record(model, batch, plan))


def _record(model: Model, batch: Batch, plan: Plan, edits: Sequence[Edit] = ()) -> Reading:
    """Mass and all that goes with it, and the shapes of what it was made from."""
    reducer = make_reducer(model, BatchRows.of(batch, plan), Keys.of_text(batch, plan), Keys.of_vision(batch, plan))

    def reduce(values: LayerValues) -> dict[str, Tensor]:
        at, heads = values.attention, values.heads
        assert at is not None and heads is not None  # both sites are asked for
        shapes = {name: torch.tensor(part.shape) for name, part in zip("qkvo", (at.q, at.k, at.v, heads), strict=True)}
        return {**reducer(values), **shapes}

    return read(model, batch, ("attention", "heads"), reduce, edits)


def certify(
    model: Model, episodes: Sequence[Episode] | None = None, *, progress: Callable[[int], None] | None = None
) -> list[Check]:
    """Run every check.

    Parameters
    ----------
    model
        From :func:`probe.load`.
    episodes
        What to read; default :func:`check_episodes`. All need images.
    progress
        Called with the number of checks done after each.

    Returns
    -------
    list of Check

    Raises
    ------
    UsageError
        If an episode shows no image.
    """
    case = prepare(model, episodes)
    found = []
    for check in CHECKS:
        found.append(check(case))
        if progress:
            progress(len(found))
    return found


# -------------------------------------------------------------------------------------------------------- the checks


def check_token_map(case: Case) -> Check:
    """Every position has one role; the image tokens of the prompt are the images' positions, image by image."""
    wrong, n_images = [], 0
    image_role, image_token = ROLES.index("image"), case.model.image_token
    for encoding, episode in zip(case.encodings, case.episodes, strict=True):
        in_text = encoding.token_map.role == image_role
        right = bool((encoding.token_map.segment_index(case.plan.segments) >= 0).all())
        token_map = encoding.token_map if image_token is not None else encoding.vision_map
        assert token_map is not None  # one of the two axes shows images
        owners = [token_map.demonstration[token_map.image == i] for i in range(len(encoding.images))]
        expected = [n for n, e in zip([*range(episode.shots), -1], episode.examples, strict=True) for _ in e.images]
        whole = [len(i) - (0 if i.structural is None else int(i.structural.sum())) for i in encoding.images]
        structural = sum(len(i) for i in encoding.images) - sum(whole)
        if image_token is None:
            right &= not in_text.any()
        else:
            is_token = encoding.ids.numpy() == image_token
            right &= bool((in_text <= is_token).all())
            if is_token[0]:  # the first position is the sink, whatever its token
                whole[0] -= 1
                is_token[0] = False
            right &= int(is_token.sum()) == sum(whole) + structural
        is_image = token_map.role == image_role
        shown = [int((is_image & (token_map.image == i)).sum()) for i in range(len(encoding.images))]
        right &= shown == whole and all((owner == n).all() for owner, n in zip(owners, expected, strict=True))
        if not right:
            wrong.append(episode.id)
        n_images += len(encoding.images)
    found = f"{n_images} images in {len(case.encodings)} episodes"
    return Check("token map is a partition; images are whole", found if not wrong else f"wrong in {wrong}", not wrong)


def check_sites(case: Case) -> Check:
    """q, k, v and the heads' outputs are recorded at every site, with the shapes that they should have."""
    model, n = case.model, case.batch.length
    wrong = []
    for site, kept in case.places().items():
        q, k, v, o = (kept[name].tolist() for name in "qkvo")
        heads = [len(case.batch), model.n_heads, n]
        good = q[:3] == heads and o[:3] == [heads[0], n, heads[1]] and k[:3] == v[:3] and model.n_heads % k[1] == 0
        good &= site.axis == "vision" or k[2] == n
        if not good:
            wrong.append(f"{site.axis} {site.layer}")
    kinds = [sum(site.axis == axis for site in model.sites) for axis in ("text", "vision")]
    found = f"{kinds[0]} self-attention" + (f", {kinds[1]} cross-attention" if kinds[1] else "")
    return Check("q, k, v, o at every site", found if not wrong else f"wrong at {', '.join(wrong)}", not wrong)


def check_logits(case: Case) -> Check:
    """Recording changes no bit of the logits."""
    difference = (plain_logits(case) - case.reading.logits).abs().max().item()
    return Check("logits bit-equal with recording", f"difference {difference:.2g}", difference == 0)


def check_mass(case: Case) -> Check:
    """Recorded mass is that of the attention matrix, as seen through another door."""
    rows = BatchRows.of(case.batch, case.plan)
    keys = {"text": Keys.of_text(case.batch, case.plan), "vision": Keys.of_vision(case.batch, case.plan)}
    recorded = case.places()
    differences: dict[AttentionSite, Tensor] = {}

    def compare(site: AttentionSite, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> None:
        module = case.model.module.get_submodule(site.attention)
        causal = bool(getattr(module, "is_causal", True)) and q.shape[2] > 1
        on_axis = keys[site.axis]
        assert on_axis is not None  # the site ran, so there are images
        attention = naive_attention(q, k, mask, scale, rows.positions, causal=causal)
        mass = rows.average((attention @ on_axis.segments[:, None].to(attention)).float())
        differences[site] = mass.cpu() - recorded[site]["mass"]

    with observed(case.model, compare):
        plain_logits(case)
    worst, all_seen = largest(differences.values()), set(differences) == set(recorded)
    found = f"difference {worst:.2g}, bound {MASS_BOUND:g}" + ("" if all_seen else "; some sites were not seen")
    return Check("mass equals the oracle's", found, all_seen and worst <= MASS_BOUND)


def check_sums(case: Case) -> Check:
    """What was recorded sums to 1 over the segments."""
    rows = BatchRows.of(case.batch, case.plan)
    there = (rows.weights.sum(-1) > 0).cpu()[:, :, None]
    worst = largest((kept["mass"].sum(-1) - 1).masked_fill(~there, 0) for kept in case.places().values())
    return Check("rows sum to 1", f"difference {worst:.2g}, bound {MASS_BOUND:g}", worst <= MASS_BOUND)


def check_residual(case: Case) -> Check:
    """The heads' outputs follow from what was recorded."""
    worst = largest(kept["residual"] for kept in case.places().values())
    bound = RESIDUAL_BOUND[case.model.dtype]
    return Check("heads' outputs are rebuilt", f"off by {worst:.2g} of their size, bound {bound:g}", worst <= bound)


def check_randomised(case: Case) -> Check:
    """Other outputs of any one site change the logits, so that no site is idle."""

    def shuffle(value: Tensor, context: Context) -> Tensor:
        return value.flip(2) + value.flip(1)

    idle = []
    for site in case.model.sites:
        edited = read(case.model, case.batch, edits=[Edit("heads", site.layer, shuffle, site.axis)]).logits
        if torch.equal(edited, case.reading.logits):
            idle.append(f"{site.axis} {site.layer}")
    found = f"changed at all {len(case.model.sites)} sites" if not idle else f"unchanged at {', '.join(idle)}"
    return Check("other attention, other logits", found, not idle)


def check_edit(case: Case) -> Check:
    """Removing a head is what a plain torch hook makes of it."""
    differences = []
    for site in case.model.sites:
        head = site.layer % case.model.n_heads

        def hook(module: Any, arguments: tuple[Tensor, ...], head: int = head) -> tuple[Tensor, ...]:
            heads = arguments[0].unflatten(-1, (case.model.n_heads, -1)).clone()
            heads[..., head, :] = 0
            return (heads.flatten(-2),)

        attention: Any = case.model.module.get_submodule(site.attention)
        handle = attention.o_proj.register_forward_pre_hook(hook)
        try:
            theirs = plain_logits(case)
        finally:
            handle.remove()
        ours = read(case.model, case.batch, edits=[zero_head(site.layer, head, site.axis)]).logits
        differences.append(theirs - ours)
    worst = largest(differences)
    return Check("head edit equals a torch hook", f"difference {worst:.2g}", worst == 0)


def check_alone(case: Case) -> Check:
    """An episode alone has the mass that it has in a padded batch, up to rounding."""
    first, eps = case.model.sites[0], torch.finfo(case.model.dtype).eps
    nudge = Edit("heads", first.layer, lambda value, context: value * (1 + eps), first.axis)
    nudged = replace(case, reading=_record(case.model, case.batch, case.plan, [nudge])).places()
    rounding = largest(nudged[site]["mass"] - kept["mass"] for site, kept in case.places().items())
    bound, differences = max(ROUNDINGS * rounding, MASS_BOUND), []
    for number, encoding in enumerate(case.encodings):
        alone = replace_case(case, [number], case.model.batch([encoding]))
        for site, kept in alone.places().items():
            differences.append(case.places()[site]["mass"][number] - kept["mass"][0])
    worst, name = largest(differences), "alone as in a padded batch"
    if bound > DECIDABLE:
        number_type = str(case.model.dtype).removeprefix("torch.")
        found = (
            f"difference {worst:.2g}; not decidable in {number_type}, where rounding makes {rounding:.2g}: use float32"
        )
        return Check(name, found, math.isfinite(worst))
    return Check(name, f"difference {worst:.2g}, bound {bound:.2g}: {ROUNDINGS} x one rounding error", worst <= bound)


def plain_logits(case: Case) -> Tensor:
    """Logits of the last position by the bare module, as nobody traced it."""
    module: Any = case.model.module
    with torch.no_grad():
        logits: Tensor = module(**case.model.inputs(case.batch), logits_to_keep=1, use_cache=False).logits
    return logits


def replace_case(case: Case, which: list[int], batch: Batch) -> Case:
    """The same model with some of the episodes, read again."""
    return replace(
        case,
        episodes=[case.episodes[i] for i in which],
        encodings=[case.encodings[i] for i in which],
        batch=batch,
        reading=_record(case.model, batch, case.plan),
    )


CHECKS: tuple[Callable[[Case], Check], ...] = (
    check_token_map,
    check_sites,
    check_logits,
    check_mass,
    check_sums,
    check_residual,
    check_randomised,
    check_edit,
    check_alone,
)
