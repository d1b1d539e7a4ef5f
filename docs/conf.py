"""Sphinx's settings for the site that launch/docs.sh builds of these pages."""

import manic

project = "manic"
author = "the manic developers"
project_copyright = f"2026, {author}"
version = release = manic.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["images"]

myst_heading_anchors = 3  # anchors as GitHub makes them, so that links work in both
default_role = "literal"  # single backticks in docstrings
napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"manic {release}"
html_copy_source = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_favicon = "images/icon.svg"
