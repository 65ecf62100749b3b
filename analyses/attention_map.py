# %% [markdown]
# # How much attention do the demonstrations get?
#
# A vision-language model reads a few demonstrations (image, question, answer) and then a query. At the position that
# predicts the answer, every attention head divides its attention among everything before it. This notebook asks how
# much of it goes to the demonstrations' **images** and how much to their **text**, head by head, and what it carries.
#
# It runs offline on the bundled toy model. Replace `"toy"` by another model (`probe models list`) and the
# episodes by your own (`probe.read_examples`, `probe.choose`) and the rest stays as it is.

# %%
import plotly.io as pio

import probe
from probe.segments import group_lift, group_mass
from probe.stats import wilson

pio.renderers.default = "plotly_mimetype"

# %% [markdown]
# ## Episodes
#
# The task *recognition* asks `?` and nothing else. Which attribute is meant, and in which of two languages to answer,
# only the demonstrations can tell.

# %%
model = probe.load("toy")
episodes = probe.synthetic_episodes("recognition", shots=4, n=64)

for example in episodes[1].examples:
    print(example.question, "->", example.answer)
episodes[1].query.images[0]

# %% [markdown]
# Every position of the rendered episode has exactly one role. The map knows where each image token stands in its image.

# %%
encoding = model.encode(episodes[1])
token_map = encoding.token_map
print(model.tokenizer.decode(encoding.ids[token_map.where("question", 0)]), "| question of demonstration 0")
print(model.tokenizer.decode(encoding.ids[token_map.answer]), "| answer of the query")
first = token_map.where("image", 0)
list(zip(token_map.row[first].tolist(), token_map.column[first].tolist(), strict=True))

# %% [markdown]
# ## Measure
#
# One forward for each batch. Mass and contribution are computed from the model's own queries, keys and values; that
# they give back the heads' own outputs is checked, and the largest difference is kept.

# %%
result = probe.attention_map(model, episodes)
print("right answers:", wilson(int(result["correct"].sum()), result.sizes["episode"]))
print("largest residual:", float(result["residual"].max()), "bound:", result.attrs["residual_bound"])
result

# %% [markdown]
# ## Look
#
# The five columns partition what the position can see. The upper row is mass; the lower row is mass per token relative
# to uniform attention, because images have many more tokens than answers.

# %%
probe.plot_attention_map(result)

# %% [markdown]
# ## Which heads?
#
# The heads are ranked on one half of the episodes and reported on the other: the largest of many noisy numbers would
# otherwise flatter itself.

# %%
ranked = probe.rank_heads(result, n=3)
for head in ranked:
    print(f"{head.modality:8} layer {head.layer} head {head.head}: mass {head.mass}, lift {head.lift:.2f}")

# %%
report = result.sel(episode=result["half"] == "report")
probe.plot_mass_by_demonstration(report, heads=[(head.layer, head.head) for head in ranked if head.rank == 1])

# %% [markdown]
# One head's attention on the images of one episode. The menu chooses the head.

# %%
probe.plot_overlay(result, heads=[(head.layer, head.head) for head in ranked])

# %% [markdown]
# ## Visual against textual
#
# Raw mass and mass per token can tell opposite stories. Both are a line of xarray.

# %%
for name, values in (("mass", group_mass(result)), ("lift", group_lift(result))):
    visual, textual = (values.sel(group=group).mean(("episode", "head")) for group in ("visual", "textual"))
    print(name, "visual ", visual.values.round(3).tolist())
    print(name, "textual", textual.values.round(3).tolist(), "(by layer)")

# %% [markdown]
# ## Does it matter?
#
# Attention is a correlate. Whether a head is *used* shows when it is taken away. Here each head of the layer that holds
# the head with the most mass on the demonstrations' text is removed in turn; what changes is how often the first token
# of the right answer comes out on top. The head that looks most need not be the head that matters most.

# %%
batch = model.batch([model.encode(episode) for episode in episodes], with_answer=False)
gold = model.tokenizer([episode.query.answer for episode in episodes], add_special_tokens=False)["input_ids"]


def right(edits):
    best = probe.read(model, batch, edits=edits).logits[:, -1].argmax(-1).tolist()
    return wilson(sum(token == answer[0] for token, answer in zip(best, gold, strict=True)), len(gold))


top = next(head for head in ranked if head.modality == "textual")
mass = group_mass(result).sel(group="textual", layer=top.layer).mean("episode")
print("intact           right", right([]))
for head in range(model.n_heads):
    print(
        f"without {top.layer}.{head}      right",
        right([probe.zero_head(top.layer, head)]),
        f"mass {float(mass[head]):.2f}",
    )
