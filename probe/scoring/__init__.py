"""From an answer to a score: pure functions of text (and, later, of log-probabilities), without a model."""

from probe.scoring.exact import exact_match, normalise

__all__ = ["exact_match", "normalise"]
