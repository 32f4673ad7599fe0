"""Docstrings and types that the API reference shows, pages that the index names, links that lead somewhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("models", "datasets", "util")
SOURCES = [ROOT / "main.py", ROOT / "engine.py", *(p for name in PACKAGES for p in sorted((ROOT / name).rglob("*.py")))]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def _public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body)


def _untyped(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    missing = [a.arg for a in named if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
    return missing if function.returns else [*missing, "return"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_names_have_a_summary_and_types(path):
    module = ast.parse(path.read_text(encoding="utf-8"))
    for node in (module, *_public(module.body)):
        where = f"{path.relative_to(ROOT)}: {getattr(node, 'name', 'the module')}"
        summary = (ast.get_docstring(node) or "").partition("\n")[0]
        assert summary.endswith("."), f"{where} needs a docstring whose first line is a sentence, has '{summary}'"
        if isinstance(node, ast.FunctionDef):
            assert not _untyped(node), f"{where} needs types for {', '.join(_untyped(node))}"


@pytest.mark.parametrize("package", [*PACKAGES, "tools"])
def test_package_is_marked_as_typed(package):
    assert (ROOT / package / "py.typed").is_file()


def test_index_names_every_page():
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```", (ROOT / "docs/index.md").read_text(), flags=re.DOTALL | re.M)
    patterns = re.findall(r"^(?:.*<)?([^:\s>]+)>?$", "".join(trees), flags=re.MULTILINE)
    unnamed = [p.stem for p in PAGES if p.stem != "index" and not any(fnmatch(p.stem, name) for name in patterns)]
    assert not unnamed, f"docs/index.md should name {unnamed} in one of its toctrees"


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def _anchors(page: Path) -> set[str]:
    # As Git hosting pages make them from headings.
    headings = re.findall(r"^#+ (.+)$", _prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)", _prose(page)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}, which is not there"
        assert not anchor or anchor in _anchors(target), f"{page.name} links to {link}: there is no such heading"
