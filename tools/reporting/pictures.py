"""The images a detector does worst on: chosen by their errors, drawn beside ground truth, as data addresses."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from datasets import CocoDetection, DatasetError
from util.plots import COLORS, draw_boxes

from .errors import Found, Judged, Truth, judge

# Places in COLORS that people with any colour vision tell apart.
RIGHT, CROWD, WRONG = 1, 3, 5
RIGHT_COLOR, WRONG_COLOR = COLORS[RIGHT], COLORS[WRONG]
PICTURE_WIDTH = 440
_MOST_TEXTS = 14


@dataclass(frozen=True)
class Panel:
    """One picture: data address of a JPEG, its size in pixels, a caption."""

    address: str
    width: int
    height: int
    caption: str


@dataclass(frozen=True)
class WorstImage:
    """An image: file name, id, ground truth and the detections of every run; or the reason why it cannot be shown."""

    file_name: str
    image_id: int
    panels: list[Panel]
    problem: str = ""


def worst_images(
    data: CocoDetection,
    runs: Mapping[str, Mapping[int, tuple[Truth, Found]]],
    *,
    count: int,
    min_score: float,
) -> list[WorstImage]:
    """Choose and draw the images with the lowest F1, averaged over the runs; among equals those with most errors.

    F1 is 2 c / (2 c + w + m) with c correct and w wrong detections of at least `min_score` and m objects that none of
    them matches, at IoU 0.5. Images without errors are left out.

    Args:
        data: the validation data of all these runs.
        runs: name -> image id -> (objects, detections).
        count: images drawn.
        min_score: detections below are left out.
    """
    judged = {
        name: {i: (truth, judge(truth, found.rows(found.scores >= min_score))) for i, (truth, found) in images.items()}
        for name, images in runs.items()
    }
    common = set.intersection(*(set(images) for images in judged.values()))
    ranks = {i: _badness([images[i] for images in judged.values()]) for i in common}
    worst = sorted((i for i in common if ranks[i][1]), key=lambda i: (*ranks[i], i))[:count]
    return [_draw(data, i, {name: images[i] for name, images in judged.items()}) for i in worst]


def _badness(outcomes: Sequence[tuple[Truth, Judged]]) -> tuple[float, int]:
    """Return (mean F1, errors of all runs, negative)."""
    figures, errors = [], 0
    for truth, judged in outcomes:
        correct = int(judged.is_matched.sum())
        wrong = len(judged.kinds) - correct
        missed = int((~judged.is_matched & ~truth.iscrowd).sum())
        figures.append(2 * correct / max(2 * correct + wrong + missed, 1))
        errors -= wrong + missed
    return float(np.mean(figures)), errors


def _draw(data: CocoDetection, image_id: int, runs: Mapping[str, tuple[Truth, Judged]]) -> WorstImage:
    index = data.ids.index(image_id)
    file_name = data.folder.names[index]
    try:
        picture = data.read_image(index)
    except DatasetError as error:
        return WorstImage(file_name, image_id, [], str(error))
    names = {category_id: category["name"] for category_id, category in data.coco.cats.items()}
    first_truth, first = next(iter(runs.values()))
    panels = [_draw_truth(picture, first_truth, first if len(runs) == 1 else None, names)]
    panels += [_draw_found(picture, truth, judged, names, name) for name, (truth, judged) in runs.items()]
    return WorstImage(file_name, image_id, panels)


def _draw_truth(picture: Image.Image, truth: Truth, judged: Judged | None, names: Mapping[int, str]) -> Panel:
    """Draw the objects; those one run has missed in another colour."""
    missed = ~truth.iscrowd & (~judged.is_matched if judged is not None else False)
    colors = np.where(truth.iscrowd, CROWD, np.where(missed, WRONG, RIGHT))
    texts = [
        names[category] + (" (crowd)" if crowd else "")
        for category, crowd in zip(truth.categories.tolist(), truth.iscrowd.tolist(), strict=True)
    ]
    count = int((~truth.iscrowd).sum())
    caption = f"ground truth: {count} object" + ("" if count == 1 else "s")
    return _panel(picture, truth.boxes_xywh, texts, colors, important=missed, caption=caption)


def _draw_found(picture: Image.Image, truth: Truth, judged: Judged, names: Mapping[int, str], run: str) -> Panel:
    wrong = judged.kinds != "correct"
    scores = judged.found.scores.tolist()
    texts = [
        f"{names.get(category, category)} {score:.2f}"
        for category, score in zip(judged.found.categories.tolist(), scores, strict=True)
    ]
    kinds = Counter(judged.kinds[wrong].tolist())
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    missing = int((~judged.is_matched & ~truth.iscrowd).sum())
    caption = f"{run}: {int((~wrong).sum())} correct, {missing} not found, {int(wrong.sum())} wrong"
    caption += f" ({listed})" if listed else ""
    return _panel(
        picture, judged.found.boxes_xywh, texts, np.where(wrong, WRONG, RIGHT), important=wrong, caption=caption
    )


def _panel(
    picture: Image.Image,
    boxes_xywh: np.ndarray,
    texts: Sequence[str],
    colors: np.ndarray,
    *,
    important: np.ndarray,
    caption: str,
) -> Panel:
    # What is wrong is drawn last, on top, the best of it at the very end; in a crowd only the best of it is named.
    order = np.lexsort((-np.arange(len(texts)), important))
    named = set((np.flatnonzero(important)[:_MOST_TEXTS] if len(texts) > _MOST_TEXTS else order).tolist())
    shown = [texts[i] if i in named else "" for i in order.tolist()]
    corners = np.concatenate((boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]), axis=1)[order]
    factor = PICTURE_WIDTH / picture.width
    scaled = picture.resize((PICTURE_WIDTH, max(1, round(picture.height * factor))))
    drawn = draw_boxes(scaled, torch.from_numpy(corners * factor), shown, torch.from_numpy(colors[order]))
    file = io.BytesIO()
    drawn.save(file, format="JPEG", quality=82)
    address = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return Panel(address, drawn.width, drawn.height, caption)
