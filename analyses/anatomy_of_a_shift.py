# %% [markdown]
# # The anatomy of a shift
#
# Demonstrations change what every head gives: SA = SA_Q + μ (SA_D − SA_Q). In-context vectors assume that this shift
# can be had without them. Here it is measured, put back, replaced by less and less, and then learned.
#
# It runs offline on the bundled model, so it shows how the tools are used and nothing about large models. Replace
# `"toy"` by another model and the episodes by your own, and the rest stays as it is. The documentation explains *The
# shift of each head* and *In-context vectors*.

# %%
import numpy as np
import pandas as pd
import plotly.io as pio

import probe
from probe.experiments.compare import compare
from probe.experiments.ways import ORACLES, Way, ways_for
from probe.measures.shift_summary import summarise_shift
from probe.measures.vector_summary import summarise_vectors
from probe.plots.vector_distance import plot_vector_distance
from probe.plots.vectors import plot_vectors
from probe.vectors.live import Live
from probe.vectors.mimic import Mimic
from probe.vectors.teacher import Teacher
from probe.vectors.training import Training

pio.renderers.default = "plotly_mimetype"

toy = probe.load("toy")
TASKS = ("operator:3", "binding-uncued:kind-0")
queries = {task: probe.synthetic_episodes(task, shots=8, n=64, seed=2) for task in TASKS}
for example in queries["operator:3"][0].examples[-3:]:
    print(example.info["count"], "things ->", example.answer)

# %% [markdown]
# ## What is shifted, and how constantly
#
# `operator:3` answers with the number of things plus three; the demonstrations have to tell that it is plus, and three.
# The picture shows each head's shift at the position that answers.

# %%
shifts = probe.shift_map(toy, queries["operator:3"])
probe.plot_shift_map(shifts)

# %%
summary = summarise_shift(shifts)
columns = ("mu", "shift", "logit_effect", "agreement", "explained")
heads = [(layer, head) for layer in range(toy.n_layers) for head in range(toy.n_heads)]
table = pd.DataFrame(
    {name: [float(summary[name].sel(layer=a, head=b, end="estimate")) for a, b in heads] for name in columns},
    index=[f"{a}.{b}" for a, b in heads],
)
table.sort_values("shift", ascending=False).head(8).round(2)

# %% [markdown]
# Some of the largest shifts point the same way in every episode: a constant vector could be all that they are. Others
# turn with the query.
#
# ## Put back, whole and in parts
#
# The oracle feeds every head, at every position, its own μ and SA_D. Read where the query stands behind its
# demonstrations (*in context*), the query alone then gives what it gives with them, state by state: nothing that
# demonstrations do goes another way. Where the query stands by itself, as it does for a vector, the answers are the
# same. What is left when the size, the direction or the kind of token is no longer the query's own says what a vector
# would have to carry.

# %%
bare = [Way("zero-shot", kind="zero-shot"), Way("few-shot", shown=True, kind="few-shot")]
oracles = {task: compare(toy, episodes, bare, oracle=True, distances=32) for task, episodes in queries.items()}
pd.DataFrame({task: result["correct"].mean("episode").to_series() for task, result in oracles.items()}).round(2)

# %%
last = {task: result["distance"].isel(layer=-1).mean("episode").to_series() for task, result in oracles.items()}
pd.DataFrame(last).loc[["zero-shot", *ORACLES]].round(5)

# %% [markdown]
# In context the oracle is exact to rounding. One size for all queries costs the operator two fifths of its answers and
# the binding hardly any; one direction costs the operator hardly any and the binding all of them, for there the answer
# *is* the direction. And the rule of `operator:3` can be had from the demonstrations' *structure* alone (what stands
# between their words and pictures), since the model has gathered it there.
#
# ## Learned
#
# A trained vector is not the mean shift: it is whatever makes the answers right. MimIC learns one vector and one size
# for each head, LIVE one vector for each layer, both from a teacher that reads the demonstrations.

# %%
compared, found = {}, {}
for task in TASKS:
    episodes = probe.synthetic_episodes(task, shots=8, n=160, seed=1)
    teacher = Teacher(toy)
    found[task] = {
        name: method.fit(toy, episodes, training=Training(epochs=14, batch_size=32, speed=speed), teacher=teacher)
        for name, method, speed in (("LIVE", Live(), 20.0), ("MimIC", Mimic(), 6.0))
    }
    compared[task] = compare(toy, queries[task], ways_for(found[task], random=1), distances=32)
plot_vectors(compared["binding-uncued:kind-0"])

# %%
pd.DataFrame(
    {
        task: summarise_vectors(result)["recovered"].sel(end="estimate").to_series().round(2)
        for task, result in compared.items()
    }
)

# %% [markdown]
# And the states? A vector that answers like the demonstrations need not think like them.

# %%
plot_vector_distance(compared["operator:3"])

# %% [markdown]
# ## Is the learned direction that of the shift?
#
# The cosine between MimIC's vector and the constant that explains most of the head's shift at the row that answers,
# for the heads that are shifted most.

# %%
v = found["operator:3"]["MimIC"].parameters["v"].numpy()
row = shifts.sel(row="answer")
mu, difference = row["mu"].values, row["difference_vector"].values
best = np.nansum(mu[..., None] ** 2 * difference, axis=0) / np.nansum(mu[..., None] ** 2, axis=0)
cosine = (v * best).sum(-1) / np.linalg.norm(v, axis=-1) / np.linalg.norm(best, axis=-1)
strongest = table["shift"].nlargest(8).index
pd.DataFrame({"cosine": {name: cosine[tuple(map(int, name.split(".")))] for name in strongest}}).round(2)

# %% [markdown]
# With `probe.inject` a vector goes into any experiment: here, what the model answers at half its strength, and in two
# layers only.

# %%
alone = [probe.Episode(e.id, (), e.query) for e in queries["operator:3"]]
for options in ({"scale": 0.0}, {"scale": 0.5}, {}, {"layers": [0, 1, 2]}, {"layers": [3, 4, 5]}):
    with probe.inject(toy, found["operator:3"]["MimIC"], **options) as steered:
        print(f"{options!s:24} accuracy {float(probe.answering(steered, alone).correct.mean()):.2f}")
