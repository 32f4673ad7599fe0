"""The report page of real small runs: what it shows, what it says is missing, and how a browser takes it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runs import REPOSITORY, command, write_pictures
from tools import report
from tools.reporting.charts import Series, line_chart, thinned
from tools.reporting.runs import read_runs

SECTIONS = ("summary", "curves", "classes", "precision", "errors", "images", "options", "environment")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Train with denoising for two epochs and without for one; return both output folders."""
    root = tmp_path_factory.mktemp("runs")
    data = write_pictures(root / "data")
    lines = [
        command(data, root / "denoising", "--epochs", 2, "--num_select", 8),
        command(data, root / "matching", "--epochs", 1, "--num_select", 8, "--lr", 2e-4),
    ]
    lines[1].remove("--use_dn")
    # A process of its own: the program sets up logging for the whole process.
    program = f"import main, sys; sys.exit(max(main.run_command_line(line) for line in {lines!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return root / "denoising", root / "matching"


@pytest.fixture(scope="module")
def page(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the page that compares both runs; every detection counts."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert report.main([*map(str, runs), "--output", str(path), "--min_score", "0"]) == 0
    return path


def section(text: str, name: str) -> str:
    """Return the HTML of one section."""
    found = re.search(rf'<section id="{name}".*?</section>', text, flags=re.DOTALL)
    assert found is not None, name
    return found.group()


def write(folder: Path, path: Path, *more: str) -> str:
    """Write the page of one folder and return it."""
    assert report.main([str(folder), "--output", str(path), *more]) == 0
    return path.read_text(encoding="utf-8")


def test_training_records_what_the_report_reads(runs: tuple[Path, Path]) -> None:
    record = json.loads((runs[0] / "log.txt").read_text().splitlines()[-1])
    assert record["train_images_per_second"] * record["train_seconds"] == pytest.approx(12)
    assert record["train_peak_memory_mib"] > 50
    detections = json.loads((runs[0] / "eval" / "detections.json").read_text())
    assert len(detections) == 3 * 8 and {entry["image_id"] for entry in detections} == {101, 102, 103}
    environment = json.loads((runs[0] / "environment.jsonl").read_text())
    assert environment["device"] == "cpu" and environment["processes"] == 1


def test_comparison_has_every_section(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in SECTIONS:
        assert 'class="missing"' not in section(text, name), name
    assert "denoising losses in training" in section(text, "curves") and text.count("<polyline") > 40
    assert "leaf" in section(text, "classes") and "brick" in section(text, "precision")
    assert all(kind in section(text, "errors") for kind in ("localisation", "duplicate", "missed"))
    assert section(text, "images").count("data:image/jpeg;base64,") == 3 * 3
    differing = re.findall(r'<tr class="marked"><th scope="row">(\w+)', section(text, "options"))
    assert set(differing) == {"use_dn", "lr", "epochs", "output_dir"}


def test_page_asks_for_nothing_outside_itself(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    addresses = re.findall(r'(?:src|href|srcset|action|poster)\s*=\s*"([^"]*)"', text)
    assert addresses and all(address.startswith(("#", "data:")) for address in addresses)
    assert not re.search(r"url\(|@import|https?://|//cdn", text)
    assert "default-src 'none'" in html.unescape(text)


def test_best_epoch_and_figures_are_those_of_the_log(runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    lines[0]["test_coco_eval_bbox"] = [0.4321, *[0.5] * 11]
    lines[1]["test_coco_eval_bbox"] = [0.1, -1.0, *[0.2] * 10]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = section(write(folder, tmp_path / "page.html"), "summary")
    assert "<b>43.2</b> AP" in summary
    assert re.search(r"best epoch[^<]*</th><td>0</td>", summary)
    assert re.search(r"AP in the last epoch[^<]*</th><td>10.0</td>", summary)


def test_folder_with_a_log_alone_says_what_is_missing(runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    shutil.copy(runs[0] / "log.txt", folder)
    text = write(folder, tmp_path / "page.html")
    for name in SECTIONS:
        assert ('class="missing"' in section(text, name)) == (name not in ("summary", "curves")), name
    assert "old has no eval/detections.json: pass --evaluate" in text and "old has no config.py" in text
    assert "<polyline" in section(text, "curves")


def test_folder_of_an_evaluation_shows_its_figures(runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "evaluated"
    folder.mkdir()
    for name in ("latest.pth", "detections.json"):
        shutil.copy(runs[0] / "eval" / name, folder / name.replace("latest", "eval"))
    shutil.copy(runs[0] / "config.py", folder)
    (folder / "log.txt").write_text(json.dumps({"test_coco_eval_bbox": [0.25] * 12}) + "\n")
    text = write(folder, tmp_path / "page.html")
    assert "<b>25.0</b> AP" in text and "no line of a training epoch" in section(text, "curves")
    assert 'class="missing"' not in section(text, "errors")


@pytest.mark.slow  # another start of the program
def test_checkpoint_is_evaluated_when_asked(runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder, ignore=shutil.ignore_patterns("eval"))
    moved = tmp_path / "moved"
    shutil.copytree(runs[0].parent / "data", moved)
    program = f"from tools import report; report.main([{str(folder)!r}, '--output', {str(tmp_path / 'p.html')!r}"
    program += f", '--evaluate', '--coco_path', {str(moved)!r}])"
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True, capture_output=True)
    first, again = read_runs([runs[0], folder])
    assert first.detections is not None and again.detections is not None
    assert first.detections.keys() == again.detections.keys()
    for image_id, rows in first.detections.items():
        # The same weights in another process; written to hundredths of a pixel.
        np.testing.assert_allclose(rows, again.detections[image_id], atol=0.011)


def test_missing_data_is_said_and_the_rest_shown(runs: tuple[Path, Path], tmp_path: Path) -> None:
    text = write(runs[0], tmp_path / "page.html", "--coco_path", str(tmp_path / "nowhere"))
    assert "The data of denoising cannot be read" in section(text, "errors")
    assert "<polyline" in section(text, "precision") and "<table" in section(text, "options")


def test_names_of_classes_files_and_runs_are_escaped(runs: tuple[Path, Path], tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    data = tmp_path / "data"
    shutil.copytree(runs[0].parent / "data", data)
    for path in (data / "annotations").iterdir():
        path.write_text(path.read_text().replace('"leaf"', json.dumps(evil)))
    path = data / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace("101.png", "<b>101&.png"))
    (data / "val2017" / "101.png").rename(data / "val2017" / "<b>101&.png")
    folder = tmp_path / "<i>run"
    shutil.copytree(runs[0], folder)
    text = write(folder, tmp_path / "page.html", "--coco_path", str(data), "--min_score", "0")
    assert evil not in text and "&lt;script&gt;alert(1)" in section(text, "classes")
    assert "<b>101" not in text and "&lt;b&gt;101&amp;.png" in section(text, "images")
    assert "<i>" not in text and "&lt;i&gt;run" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "no log.txt in nowhere"),
        (["{run}", "{run}"], "named twice"),
        (["{run}", "--images", "0"], "--images"),
        (["{run}", "--min_score", "3"], "--min_score"),
        (["{run}", "--evaluate", "--coco_path", "nowhere"], "no folder nowhere"),
    ],
)
def test_wrong_arguments_end_in_one_sentence(
    runs: tuple[Path, Path], tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [argument.format(run=runs[0]) for argument in arguments]
    with pytest.raises(SystemExit) as stop:
        report.main([*arguments, "--output", str(tmp_path / "page.html")])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_chart_places_points_and_tells_them() -> None:
    chart = line_chart("c", "loss", [Series("train", "train", 0, "-", [(0, 4.0), (1, 2.0), (2, 0.0)])], from_zero=True)
    assert chart is not None
    # The ends of the data are the ends of the plotting area, y grows upwards.
    middle = ((chart.left + chart.right) / 2, (chart.top + chart.bottom) / 2)
    assert chart.curves[0].line == (
        f"{chart.left:.1f},{chart.top:.1f} {middle[0]:.1f},{middle[1]:.1f} {chart.right:.1f},{chart.bottom:.1f}"
    )
    assert chart.summary == "loss over epoch: train from 4 to 0."
    assert chart.rows[1] == ["1", "2"] and [tick.text for tick in chart.x_ticks] == ["0", "1", "2"]
    assert line_chart("c", "loss", [Series("train", "train", 0, "-", [])]) is None
    assert line_chart("c", "rate", [Series("", "", 0, "-", [(3, 1e-4)])]) is not None  # one point has no extent
    assert len(thinned([(i, 0.0) for i in range(1000)])) <= 121


def browse(page: Path, profile: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Open a page in Chromium without a window and return what it wrote."""
    assert CHROMIUM is not None
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr"
    )
    line = [CHROMIUM, *options.split(), f"--user-data-dir={profile}", *more, page.as_uri()]
    return subprocess.run(line, capture_output=True, text=True, check=True, timeout=300)


@needs_chromium
def test_browser_finds_no_error_no_request_and_no_overflow(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    shutil.copy(page, tmp_path / "report.html")
    # The policy would refuse the probe.
    text, removed = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert removed == 1
    probe = """<script>addEventListener("load", () => {
      const at = () => document.documentElement.scrollWidth;
      const closed = at();
      document.querySelectorAll("details").forEach((one) => { one.open = true; });
      document.querySelector("#only-marked").click();
      document.querySelector("#theme").click();
      parent.postMessage(JSON.stringify({
        inner: innerWidth, closed, open: at(), theme: document.documentElement.dataset.theme,
        background: getComputedStyle(document.body).backgroundColor,
        requests: performance.getEntriesByType("resource").map((e) => e.name).filter((n) => !n.startsWith("data:")),
      }), "*");
    });</script>"""
    (tmp_path / "probed.html").write_text(text.replace("</body>", probe + "</body>"), encoding="utf-8")
    # A window of Chromium is at least 500 pixels wide, a frame may be narrower.
    (tmp_path / "host.html").write_text(
        "<!doctype html><title>none</title><script>addEventListener('message', (e) => { document.title = e.data; });"
        "</script><iframe width=360 height=800 style='border:0' src='probed.html'></iframe>"
    )
    plain = browse(tmp_path / "report.html", tmp_path / "profile", "--dump-dom")
    assert "CONSOLE" not in plain.stderr and 'data-theme="system"' in plain.stdout
    done = browse(tmp_path / "host.html", tmp_path / "profile", "--virtual-time-budget=10000", "--dump-dom")
    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title is not None, done.stdout[:500]
    assert json.loads(title.group(1)) == {
        "inner": 360, "closed": 360, "open": 360, "theme": "light", "background": "rgb(255, 255, 255)", "requests": []
    }  # fmt: skip


@pytest.mark.slow  # two starts of the browser
@needs_chromium
def test_browser_draws_light_and_dark(page: Path, tmp_path: Path) -> None:
    means = []
    for scheme in (1, 0):  # Chromium's numbers of light and dark
        picture = tmp_path / f"{scheme}.png"
        browse(
            page,
            tmp_path / "profile",
            f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=900,1200",
            f"--screenshot={picture}",
        )
        with Image.open(picture) as image:
            means.append(np.asarray(image.convert("L"), dtype=float).mean())
    assert means[0] > 200 and means[1] < 60
