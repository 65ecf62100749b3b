"""Write the cards of the bundled models from their evaluations: ``python -m probe.toy.card``.

The evaluation of a model is ``evaluations/<name>.json`` beside this file; those of other training seeds,
``evaluations/<name>-seed*.json``, stand in the card apart, never pooled. ``weights/<name>/README.md`` is written anew.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from probe.store.atomic import write_text
from probe.toy import tables
from probe.toy.bars import bars, control_bars
from probe.toy.evaluate import EVALUATIONS, WEIGHTS

HEADER = """\
---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: transformers
---
"""

OPENING = {
    "toy": """\
# The bundled model of probe

A `Qwen2_5_VLForConditionalGeneration` with {parameters} parameters, trained from scratch on synthetic pictures so that a
toolkit for multimodal in-context learning can be tried and tested offline. It learns tasks from demonstrations. Part of its
circuits were seeded in training: it proves tools, and nothing about vision-language models at large.
""",
    "toy-no-binding": """\
# The control: the bundled model of probe without binding

Trained by the same script, with the same vision tower and as long, as the bundled model ({parameters} parameters, stored in half
precision). Three things were left out: guidance, flipped labels, and bindings. The binding tasks are in its training, but their
made-up words belong to nothing there: each item's is drawn anew. It recognises tasks from demonstrations and does not bind new
labels: what a tool reports about binding should be absent here. Nor do wrong demonstrations lead it astray.
""",
}

BEGIN = "<!-- what docs/toy.md shows begins here -->"

RECIPE = """
## What was done

`recipe.json` holds every choice of the training run. What was dialled in on purpose:

- *look-back*: query and key biases of heads {look_back} (layer.head) start such that the head looks a fixed distance back
  (heads 0 and 1 share keys, and so do heads 2 and 3: the bias of one is also in the other's keys);
- *guidance*: {guidance};
- *flipped labels*: {flipped_labels};
- *degraded pictures*: {degraded:.0%} of the pictures that the decoder is trained on are blurred and noisy;
- *repeated scenes*: {repeated:.0%} of the items show the scene of an earlier item, rendered anew;
- *text-only*: {text_only:.0%} of the episodes, but for describe, show words in the place of pictures;
- *held-out pairs*: 27 of 144 pairs of colour and kind are never drawn in training. The vision tower was trained through
  linear read-outs of the four attributes, with the channels of {recoloured:.0%} of the pictures mixed and their colour not
  asked, so it may have seen such pixels, never under their colour's name;
- *bindings*: {bindings}.
"""

GUIDANCE = """\
for the first {end:.0%} of the decoder's training (weights {weights}), on binding episodes only. Heads {classes} are
  told to look from the answer cue at earlier answers of the same class, head {labels} from an answer to earlier ones with the
  same label; a linear read-out of the residual stream behind layer {agreement} at an answer has to tell, for each attribute, which
  share of the earlier items with that label agree with this one, and one behind layer {attribute} at the cue which attribute is
  in question"""

FLIPPED = """\
from {flipped_from:.0%} of the decoder's training on, {flipped:.0%} of the vqa and recognition episodes exchange the
  labels of two to four classes of one attribute throughout. They are there so that the model trusts demonstrations, and
  so copies: the control, which was trained without them (and without guidance and bindings), does not. {narrow:.0%} of these
  episodes are right and ask one question throughout, half of them about a few classes, so that neither is a sign of flipped
  labels; in {mislabelled:.0%} of those with right labels one label is wrong, so that a single wrong label proves no rule"""

NOT_FLIPPED = """\
none. {narrow:.0%} of the vqa and recognition episodes ask one question throughout, half of them about a few classes; in
  {mislabelled:.0%} of all vqa and recognition episodes one label is wrong"""

BOUND = """\
drawn afresh in each episode. No pair of value and word is held out: that would tell which attribute is asked"""

UNBOUND = """\
none. In binding episodes each item's word is drawn from the two to five made-up ones of the episode, whatever the item
  shows. In tests they are bound, as for the bundled model"""

ACCURACY = """\
## What it can do

Greedy answers on new renders and unseen scans of digits; {n:,} episodes a cell{more}, those of
seed {seed}, {choices}; 95 % Wilson intervals.
Where labels are made up, the query's class is drawn among the demonstrations' (a class that stands there twice is twice as
likely), so that the answer can be known; with one demonstration it is the only label there is. The baselines of who does not
look are means over the same episodes.
"""

CHOICES = {
    "toy": "which no choice was made on",
    "toy-no-binding": "on which what had been tried as a control before was found to bind; no other choice was made on them",
}

COPYING = """\
### Copying

Eight shots; three of the demonstrations are replaced by near-duplicates of the query (the same scene, rendered anew, and the
same question) with one wrong answer. Beside the errors that some demonstration gives stand those that a demonstration of
another episode gives, which asks for the same attribute in the same language.
"""

ONE_QUESTION = """\
{flipped}Where all eight demonstrations ask what the query asks and are right,
accuracy is {shown} if the query's answer is among theirs and {hidden} if it is not
(most of these ask for the kind, which has 18 values).
"""

HEADS = """\
## What its heads do

Accuracy at eight shots, and its change in points when the output of one head (layer.head) is set to zero at every position by
a plain torch hook; {n} episodes a task. **Bold**: exact sign test over the episodes that changed, Bonferroni over the table,
p < 0.05; in one cell alone the test notices a loss of {least:.1f} points and more. Heads that stand in for each other can
look idle here; so the last row removes together the two that guidance told the same{bundled}.
"""

COMMANDS = """\
## Commands

```sh
python -m probe.toy.train --out DIR {options}
python -m probe.toy.evaluate --model DIR/model --out evaluation.json --episodes {n} --head-episodes {heads} --seed {seed}
```
"""

OPTIONS = {"toy": "--seed {seed}", "toy-no-binding": "--seed {seed} --sibling no-binding --half --vision-of TOY_DIR"}
"""``TOY_DIR`` is the directory that the bundled model was trained in; without it the vision tower is trained again."""


def recipe_words(recipe: dict[str, Any]) -> str:
    """What was dialled in."""
    guidance, words = recipe["guidance"], "none"
    if guidance is not None:
        words = GUIDANCE.format(
            end=max(start for start, _ in guidance["weights"]),
            weights=", ".join(f"{weight:g} from {start:.0%}" for start, weight in guidance["weights"]),
            classes=_names(guidance["classes"]),
            labels=_names(guidance["labels"]),
            agreement=guidance["agreement_after"],
            attribute=guidance["attribute_after"],
        )
    shares = {**recipe, **tables.mixture_of(recipe)}
    return RECIPE.format(
        **{
            **shares,
            "guidance": words,
            "flipped_labels": (FLIPPED if shares["flipped"] else NOT_FLIPPED).format(**shares),
            "bindings": UNBOUND if shares["unbound"] else BOUND,
            "look_back": _names(head[:2] for head in recipe["look_back"]),
        }
    )


def one_question_words(result: dict[str, Any]) -> str:
    """What accuracy is where all demonstrations ask the same, as in training flipped ones do."""
    question, mixture = result["one_question"][0], tables.mixture_of(result["recipe"])
    share = mixture["flipped"] / (mixture["flipped"] + mixture["narrow"])
    return ONE_QUESTION.format(
        flipped=f"In training, {share:.0%} of the vqa episodes that ask the same throughout are flipped.\n"
        if share
        else "",
        shown=tables.share(question["answer_shown"]),
        hidden=tables.share(question["answer_not_shown"]),
    )


def _names(heads: Any) -> str:
    return ", ".join(f"{layer}.{head}" for layer, head in heads)


def write_card(directory: Path) -> str:
    """The card of the model in ``directory``."""
    name = directory.name
    main, *others = (
        json.loads(path.read_text())
        for path in (EVALUATIONS / f"{name}.json", *sorted(EVALUATIONS.glob(f"{name}-seed*.json")))
    )
    with safe_open(directory / "model.safetensors", "np") as file:
        sizes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118 - it is no dictionary
    seed, n = main["seed"], main["accuracy"][0]["n"]
    most = max(cell["n"] for cell in main["accuracy"])
    seeds = [f"training seed {result['recipe']['seed']}" for result in (main, *others)]
    parts = [
        HEADER,
        OPENING[name].format(parameters=f"{sum(math.prod(size) for size in sizes):,}"),
        BEGIN,
        recipe_words(main["recipe"]),
        ACCURACY.format(
            n=n,
            seed=seed,
            more=f" ({most:,} for `describe` with 8 and 16 shots)" if most > n else "",
            choices=CHOICES[name],
        ),
    ]
    for title, result in zip(seeds, (main, *others), strict=True):
        if (result["seed"], result["accuracy"][0]["n"]) != (seed, n):
            raise SystemExit(f"The evaluations of {name} are not of the same episodes; evaluate all of them alike.")
        parts += [f"{title.capitalize()}:\n", tables.accuracy_table(result)]
    parts += [
        f"By attribute, and on pairs of colour and kind that were held out (eight shots, {seeds[0]}):\n",
        tables.novel_table(main),
        tables.attribute_table(main),
        COPYING,
        tables.copying_table(main),
        one_question_words(main),
        HEADS.format(
            n=main["heads"][0]["n"],
            least=tables.least_change(main),
            bundled="" if main["recipe"]["guidance"] else " in the bundled model",
        ),
    ]
    for title, result in zip(seeds, (main, *others), strict=True):
        if "heads" in result:
            parts += [f"{title.capitalize()}:\n", tables.heads_table(result)]
    parts += [
        "## Demands\n",
        "A share should reach its bar with the lower end of its interval; from 2,000 episodes on the lower end may fall short "
        "by 0.02 if the share itself does not. What should stay below a bar does so with the upper end; at “+ interval”, which asks for "
        "no more than guessing, the lower end is not above the bar.\n",
        tables.bars_table([bars(result) for result in (main, *others)], seeds)
        if name == "toy"
        else _control_table(main),
        COMMANDS.format(
            options=OPTIONS[name].format(seed=main["recipe"]["seed"]), n=n, heads=main["heads"][0]["n"], seed=seed
        ),
    ]
    return "\n".join(parts)


def _control_table(main: dict[str, Any]) -> str:
    bundled = json.loads((EVALUATIONS / "toy.json").read_text())
    return tables.bars_table([control_bars(main, bundled)], ["figure"])


def main() -> None:
    """Write the card of each bundled model."""
    for name in OPENING:
        write_text(WEIGHTS / name / "README.md", write_card(WEIGHTS / name))


if __name__ == "__main__":
    main()
