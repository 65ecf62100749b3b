# %% [markdown]
# # Do the demonstrations teach, or are they copied?
#
# Two questions about the same thing. *Copying*: does the model answer what a demonstration answers, and because the
# demonstration says so? *Recognition against learning*: do demonstrations teach which label belongs to which input, or
# do they only tell which known task it is?
#
# It runs offline on the bundled model and on its control, which was trained without what makes binding possible.
# Replace `"toy"` by another model and the pool by your own (`probe.read_examples`, `probe.data.published`), and the
# rest stays as it is. Both are explained in the documentation: *Copying*, and *Recognition and learning*.

# %%
import plotly.io as pio

import probe
from probe.data.groups import labelled_episodes
from probe.data.tasks import synthetic_examples
from probe.data.words import NONCE
from probe.measures.copy_summary import summarise_copying
from probe.measures.split_summary import summarise_split
from probe.models.encoders import own_encoder
from probe.models.spaces import embed

pio.renderers.default = "plotly_mimetype"

toy, control = probe.load("toy"), probe.load("toy-no-binding")

# %% [markdown]
# ## Choosing demonstrations
#
# A pool of synthetic questions about pictures. What is alike, the model itself says: its image tokens for pictures, its
# embeddings for texts. No example ever demonstrates for itself.

# %%
pool = synthetic_examples("vqa", n=400, seed=0)
encoder = own_encoder(toy)
spaces = embed(pool, strategies=["SI", "SQ", "SQA"], images=encoder, texts=encoder)
episodes = [
    episode
    for strategy in ("RS", "SI", "SQ", "SQA", "sole", "sole-wrong")
    for episode in probe.choose(pool, strategy=strategy, shots=4, n=40, spaces=spaces)
]
for example in episodes[40].examples:  # the first that was chosen by its image
    print(example.question, "->", example.answer)

# %% [markdown]
# ## Copying
#
# A model that is right looks like a copier wherever the right answer is shown. So the copy rate never stands alone:
# read it beside how often the right answer was there, beside copying that was wrong, and beside copying that was caused
# by planting an answer.

# %%
copies = probe.copy_rate(toy, episodes, pool=pool)
probe.plot_copy_rate(copies)

# %% [markdown]
# The toy is right, so it "copies" whenever the answer is there. But give it the one nearest demonstration with a wrong
# answer (`sole-wrong`), and it believes the demonstration more than its eyes:

# %%
rate = summarise_copying(copies)["rate"].sel(end="estimate")
rate.sel(measure=["copy_rate", "gold_shown", "accuracy", "harmful", "counterfactual"]).to_pandas().round(2)

# %% [markdown]
# ## Likeness and repetition
#
# The same wrong answer, planted in 0 to 4 of four demonstrations that are the nearest, the farthest, or in between.

# %%
sweep = probe.copy_sweep(toy, pool, space=spaces["image"], n=40)
probe.plot_copy_sweep(sweep)

# %% [markdown]
# ## Recognition and learning
#
# With symbols in place of labels (here: words that mean nothing), only learning helps. With random labels, only
# recognition does.

# %%
labelled = labelled_episodes(synthetic_examples("recognition", n=1000, seed=0), shots=8, n=40)
options = {"symbols": NONCE, "shots": (0, 1, 2, 4, 8), "batch_size": 20}
split = {model.name: probe.task_split(model, labelled, **options) for model in (toy, control)}
probe.plot_task_split(split["toy"])

# %% [markdown]
# And the control:

# %%
probe.plot_task_split(split["toy-no-binding"])

# %% [markdown]
# The control names the task as well as the toy does, but symbols it can only copy, and what it copies is right as often
# as a guess.

# %%
for name, result in split.items():
    summary = summarise_split(result).sel(end="estimate", shot=8)
    print(
        f"{name}: right labels {float(summary['generated'].sel(setting='gold')):.2f}, "
        f"TL {float(summary['corrected'].sel(setting='abstract')):.2f}, "
        f"wrong answers copied {float(summary['wrong_copied'].sel(setting='abstract')):.2f}"
    )
