"""Sphinx: `make docs` builds the site into docs/_build/html. Warnings are errors."""

import sys
from pathlib import Path

import nextflow_hf


sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "NextFlow for Hugging Face"
author = "The NextFlow-HF authors"
release = version = nextflow_hf.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_design", "huggingface_docstrings"]
exclude_patterns = ["_build", "_ext", "figures/*.py"]
html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["figures.css"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # transformers' own are documented there
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
