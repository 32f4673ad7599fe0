"""Train the same small detector with and without denoising, several seeds each, and draw AP and loss.

Finished runs are kept, interrupted ones go on. Example::

    python -m tools.denoising_study --bccd data/bccd --output outputs/study
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from util.curves import read_log
from util.plots import COLORS

REPOSITORY = Path(__file__).resolve().parents[1]
# Name of a run's kind -> what it is called, options on top of the configuration, colour.
KINDS = {
    "dn": ("with denoising", [], COLORS[4]),
    "match": ("without", ["--options", "use_dn=False"], COLORS[0]),
}
Records = Sequence[Mapping[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not trained yet, draw the picture, print the table; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.denoising_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/study"), help="folder of the runs")
    parser.add_argument("--bccd", type=Path, help="BCCD in COCO layout; left out, only the generated set is used")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    parser.add_argument("--epochs", type=int, help="instead of those of the configurations, to try things out")
    parser.add_argument("--picture", type=Path, help="where the picture goes (default: study.png in the output folder)")
    options = parser.parse_args(argv)
    extra = [] if options.epochs is None else ["--epochs", str(options.epochs), "--lr_drop", str(options.epochs)]
    sets: dict[str, list[str]] = {"generated": []}
    if options.bccd is not None:
        sets["bccd"] = ["--coco_path", str(options.bccd)]
    for name, place in sets.items():
        for seed in options.seeds:
            for kind in KINDS:
                train(name, kind, seed, options.output, [*place, *extra])
    runs = {
        (name, kind): [read_log(run_folder(options.output, name, kind, seed)) for seed in options.seeds]
        for name in sets
        for kind in KINDS
    }
    picture = options.picture or options.output / "study.png"
    draw(runs, picture)
    print(table(runs))
    print(f"wrote {picture}")
    return 0


def run_folder(output: Path, name: str, kind: str, seed: int) -> Path:
    """Return the output folder of one run."""
    return output / name / f"{kind}-{seed}"


def train(name: str, kind: str, seed: int, output: Path, extra: Sequence[str]) -> None:
    """Train one run to its end; a finished one costs a start of the program.

    Raises:
        subprocess.CalledProcessError: the run failed; what it printed says why.
    """
    command = [
        sys.executable,
        str(REPOSITORY / "main.py"),
        "--config_file",
        str(REPOSITORY / f"configs/study_{name}.py"),
    ]
    command += [*KINDS[kind][1], *extra, "--seed", str(seed), "--resume", "auto"]
    subprocess.run([*command, "--output_dir", str(run_folder(output, name, kind, seed))], check=True)


def draw(runs: Mapping[tuple[str, str], Sequence[Records]], picture: Path) -> None:
    """Draw AP and matching loss over epochs, a row for each data set: means thick, seeds thin.

    Args:
        runs: (data set, kind) -> log records of each seed.
        picture: file to write, PNG or SVG by its suffix.
    """
    names = list(dict.fromkeys(name for name, _ in runs))
    figure = Figure(figsize=(11, 3.6 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(names), 3, squeeze=False)
    for (name, kind), records in runs.items():
        label, _, color = KINDS[kind]
        for axis, title, values in zip(axes[names.index(name)], TITLES, curves(records), strict=True):
            epochs = range(1, len(values[0]) + 1)
            for single in values:
                axis.plot(epochs, single, color=color, linewidth=0.8, alpha=0.5)
            mean = [sum(column) / len(column) for column in zip(*values, strict=True)]
            axis.plot(epochs, mean, color=color, linewidth=2, label=f"{label}, mean of {len(values)} seeds")
            axis.set_title(f"{name}: {title}")
            axis.set_xlabel("epochs")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")
    figure.savefig(picture, dpi=100)


TITLES = ("AP", "AP50", "matching loss on val")


def curves(records: Sequence[Records]) -> list[list[list[float]]]:
    """Return AP and AP50 (in percent) and the matching loss on the validation set: figure x seed x epoch."""
    return [
        [[100 * epoch["test_coco_eval_bbox"][0] for epoch in seed] for seed in records],
        [[100 * epoch["test_coco_eval_bbox"][1] for epoch in seed] for seed in records],
        [[epoch["test_loss"] for epoch in seed] for seed in records],
    ]


def table(runs: Mapping[tuple[str, str], Sequence[Records]]) -> str:
    """Return a Markdown table: AP, AP50 and loss of every seed at half time and at the end."""
    lines = [
        "| data | training | after epoch | AP of each seed | AP50 | matching loss on val |",
        "|---|---|---|---|---|---|",
    ]
    for (name, kind), records in runs.items():
        figures = curves(records)
        epochs = len(figures[0][0])
        for epoch in sorted({max(epochs // 2, 1), epochs}):
            cells = [
                ", ".join(f"{seed[epoch - 1]:.{places}f}" for seed in figure)
                for figure, places in zip(figures, (1, 1, 2), strict=True)
            ]
            lines.append(f"| {name} | {KINDS[kind][0]} | {epoch} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
