"""Python and the packages: are they there, are they the tested ones, do they belong together?"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from .finding import ERROR, OK, WARNING, Finding

ROOT = Path(__file__).resolve().parents[2]
OLDEST_PYTHON = (3, 10)
# Without these some part works that not everybody uses.
OPTIONAL = {"timm": "--backbone timm:NAME", "submitit": "run_with_submitit.py"}


def examine() -> list[Finding]:
    """Look at Python, at every requirement, and at torch beside torchvision."""
    return [_python(), *map(_installed, read_requirements(ROOT / "requirements.txt")), *_torch_pair()]


def read_requirements(path: Path) -> list[Requirement]:
    """Return the requirements of a file that apply to this Python."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    requirements = [Requirement(line) for line in lines if line]
    return [each for each in requirements if each.marker is None or each.marker.evaluate()]


def version_of(name: str) -> str | None:
    """Return the installed version of a package, None where it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    text = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info >= OLDEST_PYTHON:
        return Finding(OK, "python", text)
    return Finding(ERROR, "python", text, "use Python 3.10 or newer")


def _installed(requirement: Requirement) -> Finding:
    name, found = requirement.name, version_of(requirement.name)
    remedy = f"pip install '{name}{requirement.specifier}'"
    if found is None:
        if name in OPTIONAL:
            return Finding(WARNING, name, f"missing; needed for {OPTIONAL[name]}", remedy)
        return Finding(ERROR, name, "missing", remedy)
    # A build for one kind of GPU has a local version, such as 2.11.0+cu130.
    if requirement.specifier.contains(Version(found).public, prereleases=True):
        return Finding(OK, name, found)
    return Finding(WARNING, name, f"{found} is installed, tested is {requirement.specifier}", remedy)


def _torch_pair() -> list[Finding]:
    """Check that torchvision was built for this torch, by what it says and by running one of its operators."""
    name, torch_version, own = "torch + torchvision", version_of("torch"), version_of("torchvision")
    if torch_version is None or own is None:
        return []  # said above
    pins = [Requirement(line) for line in importlib.metadata.requires("torchvision") or []]
    wanted = next((pin.specifier for pin in pins if pin.name == "torch"), None)
    tested = " ".join(str(each) for each in read_requirements(ROOT / "requirements.txt")[:2])
    remedy = f"install the two together: pip install {tested}"
    if wanted is not None and not wanted.contains(Version(torch_version).public, prereleases=True):
        text = f"torchvision {own} was built for torch{wanted}, installed is torch {torch_version}"
        return [Finding(ERROR, name, text, remedy)]
    try:
        torch = importlib.import_module("torch")
        ops = importlib.import_module("torchvision.ops")
        kept = ops.nms(torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2]]), torch.tensor([0.9, 0.8]), 0.5)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return [Finding(ERROR, name, f"torchvision does not work with this torch: {error}", remedy)]
    if kept.tolist() != [0]:
        return [Finding(ERROR, name, f"torchvision's operator keeps the boxes {kept.tolist()} instead of [0]", remedy)]
    return [Finding(OK, name, f"{torch_version} and {own} belong together, an operator ran")]
