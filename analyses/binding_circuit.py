# %% [markdown]
# # The anatomy of a binding circuit
#
# The bundled model can bind a made-up word to what it sees: *these* pictures are "blick", so this one is too. Which
# heads do that, and by which way does it go? Here the circuit is found from outside, with no look at how the model was
# trained: by scores of attention and weights, by ablating heads, and by hiding tokens from tokens. Then it is held
# against the model's card, which lists what zeroing each head does, measured by plain hooks.
#
# It runs offline. Part of the circuit was seeded in training, so it proves the tools and nothing about large models.
# Replace `"toy"` by another model and the episodes by your own, and the rest stays as it is. The documentation explains
# *Heads* and *Knockouts*.

# %%
import json
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.io as pio
from scipy.stats import spearmanr

import probe
from probe.measures.effects import effects
from probe.measures.head_summary import of_found, select_heads, summarise_heads

pio.renderers.default = "plotly_mimetype"

toy, control = probe.load("toy"), probe.load("toy-no-binding")
episodes = probe.synthetic_episodes("binding-uncued", shots=8, n=32, seed=1)
for example in episodes[0].examples:
    print(example.question, "->", example.answer)

# %% [markdown]
# ## What each head could do, and what it does
#
# Every score has a null, and half of the episodes selects what the other half reports. Attention and weights say what a
# head could do; *ablation* says what is lost without it.

# %%
table = probe.heads(toy, episodes, sequences=16, controls=2)
probe.plot_heads(table)

# %%
for kind, heads in select_heads(table, 3).items():
    agreement = float(summarise_heads(table)["reliability"].sel(kind=kind))
    print(f"{kind:22s} {', '.join(f'{layer}.{head}' for layer, head in heads):15s} agreement of halves {agreement:.2f}")

# %% [markdown]
# Heads 0.1 and 2.0 look one token back, 4.0 and 3.0 look at demonstrations with the right answer. But what costs most
# to lose is 2.2, which looks at the same token before, and 3.2. Kinds whose halves do not agree, image induction and
# function vector, have found nothing: labels that are made up anew in each episode have no vector of their own. The
# heads of a kind together, beside random heads of the same layers, in the episodes that did not select them:

# %%
probe.plot_knockout(of_found(table))

# %% [markdown]
# ## By which way does it go?
#
# Hide one kind of token from another, in one layer at a time, and see what it costs. A label is made where its picture
# is read: at the demonstration's answer. So the rows are not only those that answer.

# %%
WAYS = {
    "a demonstration's answer reads images": ("demos/image", "demos/answer"),
    "a demonstration's answer reads earlier answers": ("demos/answer", "demos/answer"),
    "the cue reads the query's image": ("query/image", "answer"),
    "the cue reads the demonstrations' images": ("demos/image", "answer"),
    "the cue reads the demonstrations' answers": ("demos/answer", "answer"),
}


def cost(interventions: list[probe.Intervention]) -> np.ndarray:
    """Loss of log p of the answer, in nats, of each intervention."""
    result = probe.knockout(toy, episodes, interventions, controls=0, answers=False)
    return -effects(result)["effect"].sel(measure="log_probability", end="estimate").values


by_layer = {
    way: cost([probe.Intervention(keys=keys, rows=rows, layers=(layer,)) for layer in range(toy.n_layers)])
    for way, (keys, rows) in WAYS.items()
}
pd.DataFrame(by_layer, index=[f"layer {layer}" for layer in range(toy.n_layers)]).T.round(2)

# %% [markdown]
# Each way runs through one or two layers: pictures are read in layer 1, by the demonstrations' answers and by the cue;
# in layer 2 a demonstration's answer looks at earlier answers, which is where it can be seen what pictures of the same
# label have in common; the cue reads the answers in layers 3 and 4. Never does it read the demonstrations' images,
# whatever attention it pays to them. Which heads go these ways?

# %%
FOUND = {
    "a demonstration's answer reads images": 1,
    "a demonstration's answer reads earlier answers": 2,
    "the cue reads the query's image": 1,
    "the cue reads the demonstrations' answers": (3, 4),
}
rows = {}
for way, layers in FOUND.items():
    keys, at = WAYS[way]
    heads = [(layer, head) for layer in np.atleast_1d(layers).tolist() for head in range(toy.n_heads)]
    costs = cost([probe.Intervention(keys=keys, rows=at, heads=(head,)) for head in heads])
    first = np.argsort(-costs)[:2]
    rows[way] = ", ".join(f"{heads[i][0]}.{heads[i][1]} ({costs[i]:.2f})" for i in first)
pd.Series(rows, name="heads that cost most (nats)").to_frame()

# %% [markdown]
# So this is the circuit, as far as single heads carry it:
#
# 1. heads 1.0 and 1.1 bring the query's picture to the cue; several heads of layer 1, any of which may be missing,
#    bring each picture to its own answer;
# 2. head 2.2 compares a demonstration's answer with earlier answers: which attribute do they share?
# 3. heads 3.2 and 4.0 look from the cue at the answers and bring the right one.
#
# ## Against the card
#
# The card of the model lists the loss of accuracy when each head is set to zero, on other episodes, by plain hooks.

# %%
card = json.loads((Path(probe.__file__).parent / "toy" / "evaluations" / "toy.json").read_text())
cell = next(cell for cell in card["heads"] if cell["task"] == "binding-uncued")
places = [f"{layer}.{head}" for layer in range(toy.n_layers) for head in range(toy.n_heads)]
truth = np.array([(cell["effects"][place]["lost"] - cell["effects"][place]["gained"]) / cell["n"] for place in places])
ours = table["ablation"].mean("episode").values.ravel()
compared = pd.DataFrame({"card: points lost": 100 * truth, "found: nats lost": ours}, index=places)
print(f"Spearman's correlation over {len(places)} heads: {spearmanr(truth, ours).statistic:.2f}")
compared.sort_values("card: points lost", ascending=False).head(8).round(2)

# %% [markdown]
# The heads that carry uncued binding by the card, 0.1 and 3.2 and 2.2, are among the first that are found. Heads 3.0
# and 4.0, which were guided in training to look at answers of the same class, look there as told; alone they are not
# needed: others stand in for them. That a head looks at the right answer is a hypothesis, and ablation is its test.
#
# ## The control has no such circuit
#
# It was trained on the same pictures with labels that belong to nothing.

# %%
without = probe.heads(control, episodes, causal=False, sequences=16)
for name, scores in (("toy", table), ("toy-no-binding", without)):
    first = summarise_heads(scores)["beyond"].sel(kind="label matching")
    best = first.sel(end="estimate").max()
    print(f"{name:15s} largest label matching of a head, beyond its share: {float(best):.2f}")
