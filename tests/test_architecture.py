"""The plan of the house: a file imports only from lower floors, options are read only where they belong."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    # Longest prefix wins. Floor 2 of datasets stands beside models: neither sees the other.
    ("main", 7), ("run_with_submitit", 7), ("tools", 7), ("engine", 6),
    ("models", 5), ("models.build", 5), ("models.detectors", 5),
    ("models.transformers", 4), ("models.criterion", 4), ("models.segmentation", 4),
    ("models.layers", 3), ("models.backbones", 3), ("models.dn_components", 3), ("models.matcher", 3),
    ("models.losses", 3), ("models.postprocess", 3), ("models.registry", 3),
    ("models.ops", 2), ("datasets", 2), ("util", 1),
)  # fmt: skip
READS_ARGS = ("main", "run_with_submitit", "engine", "tools", "models.build", "models.detectors", "datasets", "util")


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _sources() -> list[Path]:
    files = [ROOT / "main.py", ROOT / "engine.py", ROOT / "run_with_submitit.py"]
    for folder in ("models", "datasets", "util", "tools"):
        files += [p for p in sorted((ROOT / folder).rglob("*.py")) if "build" not in p.parts]
    return [path for path in files if path.exists()]


def _floor(module: str) -> int | None:
    fitting = [(len(name), floor) for name, floor in FLOORS if module == name or module.startswith(name + ".")]
    return max(fitting)[1] if fitting else None


def _imports(path: Path) -> list[str]:
    module, found = _module(path), []
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{stem}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", _sources(), ids=_module)
def test_imports_go_down(path):
    module = _module(path)
    floor = _floor(module)
    assert floor is not None, f"{module} stands on no floor"
    for imported in _imports(path):
        below = _floor(imported)
        if below is None or _same_room(module, imported):
            continue
        assert below <= floor, f"{module} (floor {floor}) imports {imported} (floor {below})"
        assert not (module.startswith("datasets") and imported.startswith("models")), f"{module} sees {imported}"
        assert not (module.startswith("models") and imported.startswith("datasets")), f"{module} sees {imported}"


def _same_room(module: str, imported: str) -> bool:
    return module.split(".")[0] == imported.split(".")[0] and _floor(module) == _floor(imported)


@pytest.mark.parametrize("path", _sources(), ids=_module)
def test_options_are_read_only_at_the_entrance(path):
    module = _module(path)
    if module == "models" or module.startswith(READS_ARGS):
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        read = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
        assert not read, f"{module} reads args.{node.attr}: pass plain values"


def test_imports_form_no_circle():
    graph = {_module(path): set() for path in _sources()}
    for path in _sources():
        for imported in _imports(path):
            target = imported if imported in graph else imported.rpartition(".")[0]
            # A package imports its members to register or re-export them; members reach each other directly.
            if target in graph and target != _module(path) and path.name != "__init__.py":
                graph[_module(path)].add(target)
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module in done:
            return
        for target in graph[module]:
            visit(target, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())
