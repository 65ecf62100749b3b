"""How Sphinx builds these pages; nothing here touches the network."""

from importlib import metadata

project = "probe"
author = "The probe authors"
copyright = "The probe authors, Apache-2.0"
version = release = metadata.version("probe")

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
exclude_patterns = ["_build", "families_table.md", "model_matrix.md"]  # the last two are included by families.md
templates_path = ["_templates"]

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100  # a longer signature has one parameter a line
numpydoc_show_class_members = False  # _templates/autosummary/class.rst shows them

html_theme = "furo"
html_title = "probe"
