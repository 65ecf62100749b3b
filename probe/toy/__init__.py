"""The bundled model: a small Qwen2.5-VL that learns in context, and the script that trains it.

It proves the tool, never the science: part of its circuits were seeded (see ``recipe.json`` beside the weights).
"""
