"""What do the demonstrations do to a vision-language model?

>>> import probe
>>> model = probe.load("toy")
>>> episodes = probe.synthetic_episodes("recognition", shots=4, n=8)
>>> result = probe.attention_map(model, episodes)
>>> result["mass"].dims
('episode', 'row', 'layer', 'head', 'segment')
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probe.data.choose import choose
    from probe.data.example import Episode, Example
    from probe.data.manifest import read_manifest, write_manifest
    from probe.data.perturb import perturb
    from probe.data.readers import read_examples
    from probe.data.tasks import synthetic_episodes
    from probe.errors import ProbeError, UsageError
    from probe.experiments.answering import answering
    from probe.experiments.attention_map import attention_map
    from probe.experiments.certification import certify
    from probe.experiments.compare import compare
    from probe.experiments.copy_rate import copy_rate
    from probe.experiments.copy_sweep import copy_sweep
    from probe.experiments.heads import heads
    from probe.experiments.interventions import Intervention
    from probe.experiments.knockout import knockout
    from probe.experiments.linear_probe import linear_probe
    from probe.experiments.ranking import rank_heads
    from probe.experiments.reliance import modality_reliance
    from probe.experiments.saliency import saliency
    from probe.experiments.shift_map import shift_map
    from probe.experiments.task_split import task_split
    from probe.experiments.ways import Way, ways_for
    from probe.models.load import load
    from probe.models.model import Model
    from probe.models.token_map import TokenMap
    from probe.plots.attention_map import plot_attention_map
    from probe.plots.copy_rate import plot_copy_rate
    from probe.plots.copy_sweep import plot_copy_sweep
    from probe.plots.demonstration_position import plot_mass_by_demonstration
    from probe.plots.heads import plot_head_likeness, plot_heads
    from probe.plots.knockout import plot_knockout
    from probe.plots.linear_probe import plot_linear_probe
    from probe.plots.overlay import plot_overlay
    from probe.plots.saliency import plot_saliency
    from probe.plots.shift_map import plot_shift_map
    from probe.plots.task_split import plot_task_split
    from probe.plots.text_or_image import plot_text_or_image
    from probe.plots.vector_curves import plot_vector_curves
    from probe.plots.vector_distance import plot_vector_distance
    from probe.plots.vector_parts import plot_vector_parts
    from probe.plots.vector_times import plot_vector_times
    from probe.plots.vectors import plot_vectors
    from probe.trace.ablate import zero_head
    from probe.trace.edit import Edit
    from probe.trace.read import read
    from probe.trace.steer import Steered, inject
    from probe.vectors.vector import InContextVector

# Loaded at first use, so that `probe --help` loads no torch.
_HOMES = {
    "choose": "probe.data.choose",
    "Episode": "probe.data.example",
    "Example": "probe.data.example",
    "read_manifest": "probe.data.manifest",
    "write_manifest": "probe.data.manifest",
    "perturb": "probe.data.perturb",
    "read_examples": "probe.data.readers",
    "synthetic_episodes": "probe.data.tasks",
    "ProbeError": "probe.errors",
    "UsageError": "probe.errors",
    "answering": "probe.experiments.answering",
    "attention_map": "probe.experiments.attention_map",
    "certify": "probe.experiments.certification",
    "compare": "probe.experiments.compare",
    "copy_rate": "probe.experiments.copy_rate",
    "copy_sweep": "probe.experiments.copy_sweep",
    "heads": "probe.experiments.heads",
    "Intervention": "probe.experiments.interventions",
    "knockout": "probe.experiments.knockout",
    "linear_probe": "probe.experiments.linear_probe",
    "rank_heads": "probe.experiments.ranking",
    "modality_reliance": "probe.experiments.reliance",
    "saliency": "probe.experiments.saliency",
    "shift_map": "probe.experiments.shift_map",
    "task_split": "probe.experiments.task_split",
    "Way": "probe.experiments.ways",
    "ways_for": "probe.experiments.ways",
    "load": "probe.models.load",
    "Model": "probe.models.model",
    "TokenMap": "probe.models.token_map",
    "plot_attention_map": "probe.plots.attention_map",
    "plot_copy_rate": "probe.plots.copy_rate",
    "plot_copy_sweep": "probe.plots.copy_sweep",
    "plot_head_likeness": "probe.plots.heads",
    "plot_heads": "probe.plots.heads",
    "plot_knockout": "probe.plots.knockout",
    "plot_linear_probe": "probe.plots.linear_probe",
    "plot_mass_by_demonstration": "probe.plots.demonstration_position",
    "plot_overlay": "probe.plots.overlay",
    "plot_saliency": "probe.plots.saliency",
    "plot_shift_map": "probe.plots.shift_map",
    "plot_task_split": "probe.plots.task_split",
    "plot_text_or_image": "probe.plots.text_or_image",
    "plot_vector_curves": "probe.plots.vector_curves",
    "plot_vector_distance": "probe.plots.vector_distance",
    "plot_vector_parts": "probe.plots.vector_parts",
    "plot_vector_times": "probe.plots.vector_times",
    "plot_vectors": "probe.plots.vectors",
    "Edit": "probe.trace.edit",
    "zero_head": "probe.trace.ablate",
    "read": "probe.trace.read",
    "Steered": "probe.trace.steer",
    "inject": "probe.trace.steer",
    "InContextVector": "probe.vectors.vector",
}

__all__ = [
    "Edit",
    "Episode",
    "Example",
    "InContextVector",
    "Intervention",
    "Model",
    "ProbeError",
    "Steered",
    "TokenMap",
    "UsageError",
    "Way",
    "answering",
    "attention_map",
    "certify",
    "choose",
    "compare",
    "copy_rate",
    "copy_sweep",
    "heads",
    "inject",
    "knockout",
    "linear_probe",
    "load",
    "modality_reliance",
    "perturb",
    "plot_attention_map",
    "plot_copy_rate",
    "plot_copy_sweep",
    "plot_head_likeness",
    "plot_heads",
    "plot_knockout",
    "plot_linear_probe",
    "plot_mass_by_demonstration",
    "plot_overlay",
    "plot_saliency",
    "plot_shift_map",
    "plot_task_split",
    "plot_text_or_image",
    "plot_vector_curves",
    "plot_vector_distance",
    "plot_vector_parts",
    "plot_vector_times",
    "plot_vectors",
    "rank_heads",
    "read",
    "read_examples",
    "read_manifest",
    "saliency",
    "shift_map",
    "synthetic_episodes",
    "task_split",
    "ways_for",
    "write_manifest",
    "zero_head",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'probe' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
