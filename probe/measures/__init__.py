"""Tensors to tensors, no model inside: exact measures of attention."""
