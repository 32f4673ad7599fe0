"""How Sphinx builds the pages of this folder and the API reference: `make docs`, result in build/docs."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

from docutils.nodes import TextElement, document, paragraph
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.environment import BuildEnvironment
from sphinx.ext import apidoc

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

project = html_title = "DN-DETR"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["images", "templates"]
html_theme = "furo"
html_copy_source = False
html_show_copyright = False
# Anchors of headings as Git hosting pages make them.
myst_heading_anchors = 3

# `name` in a docstring links to the object of that name and is code where there is none.
default_role = "py:obj"
add_module_names = False
python_maximum_signature_line_length = 76
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # signatures show the types
toc_object_entries_show_parents = "hide"

WITHOUT_PAGE = ("build", "configs", "docs", "tests", "models/ops/setup.py", "models/ops/test.py")


def write_api_pages(app: Sphinx) -> None:
    """Write a page for each package and module into docs/api, which git ignores."""
    options = ["-q", "--separate", "--force", "--templatedir", str(DOCS / "templates")]
    excluded = [str(ROOT / path) for path in WITHOUT_PAGE]
    apidoc.main([*options, "--tocfile", "index", "--output-dir", str(DOCS / "api"), str(ROOT), *excluded])


def link_readme(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    """Make relative links of the README, which lies one folder above, relative to this folder."""
    content[0] = re.sub(r"(?<=\]\()(?!\w+:|#)", "../", content[0]).replace("](../docs/", "](")


def prepare_page(app: Sphinx, name: str, content: list[str]) -> None:
    """Lead links to the README to the page that shows it; drop patterns of index.md that fit no page."""
    content[0] = content[0].replace("](../README.md", "](start.md")
    for line in re.findall(r"^\w+\*$", content[0], flags=re.MULTILINE) if name == "index" else ():
        if not any(DOCS.glob(f"{line}.md")):
            content[0] = content[0].replace(f"{line}\n", "")


def keep_folders_as_text(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: TextElement
) -> TextElement | None:
    """Show a link to a folder of the repository as text; files become downloads by themselves."""
    return content if node["reftype"] == "myst" and (DOCS / node["reftarget"]).is_dir() else None


def split_entries(app: Sphinx, what: str, name: str, thing: Any, options: object, lines: list[str]) -> None:
    """Give entries that share a line of a docstring ("logits: (B, Q, K); boxes, anchors: (B, Q, 4)") a line each."""
    if what not in ("class", "function", "method") or not name.startswith(thing.__module__):
        return
    entry = "(?:{0})(?:, (?:{0}))*: ".format("|".join((*inspect.signature(thing).parameters, r"[A-Z]\w*Error")))
    for i, line in reversed(list(enumerate(lines))):
        found = re.match(f"( +)(?={entry})", line)
        if not found:
            continue
        end = next((j for j in range(i + 1, len(lines)) if not lines[j].startswith(found[1] + " ")), len(lines))
        *shared, last = re.split(f"[;.] (?={entry})", line.strip())
        split = []
        for text, more in (*((text, []) for text in shared), (last, lines[i + 1 : end])):
            names, _, rest = text.partition(": ")
            rest = rest if more or rest.endswith(":") else rest.rstrip(";.") + "."
            # A letter and a period would start a list.
            rest = re.sub(r"^(?=[A-Z]\.$)", r"\\", rest)
            split += [part for each in names.split(", ") for part in (f"{found[1]}{each}: {rest}", *more)]
        lines[i:end] = split


def skip_named_tuple_fields(app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: object) -> bool | None:
    """Leave the fields to the docstring of the class, which says more than "Alias for field number 0"."""
    return True if (inspect.getdoc(thing) or "").startswith("Alias for field number") else None


def drop_base_object(app: Sphinx, page: document) -> None:
    """Drop the line that says that a class is an object."""
    for line in [node for node in page.findall(paragraph) if node.astext() == "Bases: object"]:
        line.parent.remove(line)


def setup(app: Sphinx) -> None:
    """Connect the functions above."""
    app.connect("builder-inited", write_api_pages)
    app.connect("include-read", link_readme)
    app.connect("source-read", prepare_page)
    app.connect("missing-reference", keep_folders_as_text)
    app.connect("autodoc-process-docstring", split_entries, priority=400)  # before napoleon reads the docstring
    app.connect("autodoc-skip-member", skip_named_tuple_fields)
    app.connect("doctree-read", drop_base_object)
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
