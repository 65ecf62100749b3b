"""From an answer to a score: pure functions of text, without a model."""

from probe.scoring.cut import cut_answer
from probe.scoring.exact import answer_key, exact_match
from probe.scoring.vqa import majority_answer, normalise_vqa, vqa_accuracy

__all__ = ["answer_key", "cut_answer", "exact_match", "majority_answer", "normalise_vqa", "vqa_accuracy"]
