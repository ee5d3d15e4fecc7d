"""Sphinx's settings; ``make docs`` builds the site with warnings as errors."""

import dataclasses
import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import kilotune
import kilotune.train

project = "kilotune"
author = "The kilotune developers"
release = version = kilotune.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}

html_theme = "furo"
html_title = f"kilotune {release}"
html_show_copyright = False
html_copy_source = False

myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autoclass_content = "class"
napoleon_numpy_docstring = False


# Pages of the site that are files of the repository's root, with their links turned to the site's pages.
ROOT_PAGES = {name.lower(): f"{name}.md" for name in ("README", "ARCHITECTURE", "CONTRIBUTING", "CHANGELOG")}


def root_page(app: Sphinx, page: str, source: list[str]) -> None:
    """Fill a page of ``ROOT_PAGES``; a link to a file that the site does not have becomes plain text."""
    if page not in ROOT_PAGES:
        return

    def turned(link: re.Match[str]) -> str:
        text, target = link.groups()
        if "://" in target:
            return link.group(0)
        if target in ROOT_PAGES.values():
            return f"[{text}]({target.lower()})"
        return f"[{text}]({target.removeprefix('docs/')})" if target.startswith("docs/") else text

    text = (Path(app.srcdir).parent / ROOT_PAGES[page]).read_text(encoding="utf-8")
    source[0] = re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", turned, text)


class Options(SphinxDirective):
    """``.. kilotune-options:: VeraConfig``: the options of a configuration, from its fields' own help texts.

    Of the settings of a fine-tuning, too.
    """

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        config = getattr(kilotune if name in kilotune.__all__ else kilotune.train, name)
        found = nodes.bullet_list()
        for field in dataclasses.fields(config):
            if "help" not in field.metadata:  # a section of the settings
                continue
            made = config.__dataclass_fields__[field.name]
            default = made.default if made.default is not dataclasses.MISSING else made.default_factory()
            line = nodes.paragraph()
            line += nodes.literal(text=f"{field.name} = {default!r}")
            line += nodes.Text(f" {config.help_of(field.name)}")
            found += nodes.list_item("", line)
        return [found]


def setup(app: Sphinx) -> None:
    app.add_directive("kilotune-options", Options)
    app.connect("source-read", root_page)
