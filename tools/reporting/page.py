"""The report as one HTML page: puts together what the sections show and fills the template."""

from __future__ import annotations

import base64
import datetime
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from util.plots import COLORS

from .charts import HEIGHT, WIDTH
from .pictures import RIGHT_COLOR, WRONG_COLOR
from .runs import RunFiles
from .sections import (
    class_section,
    curve_section,
    environment_section,
    error_section,
    image_section,
    option_section,
    precision_section,
    summary_section,
)

_TEMPLATES = Path(__file__).resolve().parent / "templates"
# Colours of the runs: place in COLORS, percent of black in the light theme, percent of white in the dark one. Lines
# then differ from the ground by 3 to 1 at least.
_SHADES = ((4, 0, 25), (5, 0, 0), (2, 5, 0), (6, 20, 0), (0, 30, 0), (1, 35, 0), (3, 50, 0))


def write_report(runs: Sequence[RunFiles], path: Path, *, count: int, min_score: float) -> None:
    """Write the report of one or several runs.

    Args:
        runs: what their folders hold.
        path: of the page.
        count: images shown.
        min_score: detections below do not count when images are chosen, and are not drawn.
    """
    path.write_text(render(runs, count=count, min_score=min_score), encoding="utf-8")


def render(runs: Sequence[RunFiles], *, count: int, min_score: float) -> str:
    """Return the page; it asks for nothing outside itself, and its policy forbids it."""
    sections = [
        ("summary", "Summary", summary_section(runs)),
        ("curves", "Curves", curve_section(runs)),
        ("classes", "Classes", class_section(runs)),
        ("precision", "Precision and recall", precision_section(runs)),
        ("errors", "Errors", error_section(runs)),
        ("images", "Worst images", image_section(runs, count=count, min_score=min_score)),
        ("options", "Options", option_section(runs)),
        ("environment", "Environment", environment_section(runs)),
    ]
    # Markup-safe by type: everything else in the templates is escaped.
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals.update(chart_width=WIDTH, chart_height=HEIGHT, markers=("circle", "square", "diamond", "cross"))
    shades = [(COLORS[place], black, white) for place, black, white in _SHADES]
    style = environment.get_template("style.css").render(shades=shades, right=RIGHT_COLOR, wrong=WRONG_COLOR)
    script = (_TEMPLATES / "script.js").read_text(encoding="utf-8")
    return environment.get_template("report.html").render(
        title=" · ".join(run.name for run in runs),
        run_names=[run.name for run in runs],
        sections=sections,
        made=datetime.datetime.now().isoformat(sep=" ", timespec="minutes"),
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
    )


def _policy(style: str, script: str) -> str:
    """Return a Content-Security-Policy that allows this style, this script and embedded pictures, nothing else."""
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)
    )
    return f"default-src 'none'; img-src data:; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'"
