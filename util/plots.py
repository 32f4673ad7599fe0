"""Pictures of a run: curves from its log lines, predictions beside ground truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from .box_ops import box_cxcywh_to_xyxy
from .curves import DEFAULT_PANELS, PANELS, Panel, read_log, run_names
from .nested_tensor import nested_tensor_from_tensor_list

# How the data pipeline normalises (mean and deviation of ImageNet, per RGB channel).
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Distinguishable without red against green (Okabe and Ito).
COLORS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
MARGIN, TITLE_HEIGHT = 6, 18


def plot_logs(folders: Sequence[Path], output: Path, panels: Sequence[str] = DEFAULT_PANELS) -> None:
    """Draw curves over epochs, one colour per run.

    Args:
        folders: output folders with a log.txt.
        output: where the picture goes; the suffix decides on the format, e.g. .png or .svg.
        panels: names of `PANELS`.

    Raises:
        OptionError: as `read_log`.
    """
    runs = dict(zip(run_names(folders), map(read_log, folders), strict=True))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6 * columns, 3.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, name in zip(axes.flat, panels, strict=False):
        _draw_panel(axis, PANELS[name], runs)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    figure.savefig(output, dpi=100)


def draw_predictions(
    images: Sequence[Tensor],
    targets: Sequence[Mapping[str, Tensor]],
    results: Sequence[Mapping[str, Tensor]],
    class_names: Sequence[str],
    out_png: Path,
    *,
    min_score: float = 0.3,
    width: int = 320,
) -> None:
    """Draw ground truth on the left and predictions on the right, one image per row.

    Args:
        images: (3, H, W) normalised.
        targets: `boxes` (N, 4) cxcywh in [0, 1] and `labels` (N,).
        results: `scores`, `labels`, `boxes` (n, 4) xyxy in pixels of the image.
        class_names: name of every label.
        out_png: where the picture goes.
        min_score: predictions below are not drawn.
        width: pixels of each column.
    """
    rows = []
    for image, target, result in zip(images, targets, results, strict=True):
        height_px, width_px = image.shape[1:]
        scale = torch.tensor([width_px, height_px, width_px, height_px])
        true_xyxy = box_cxcywh_to_xyxy(target["boxes"].cpu()) * scale
        texts = [_class_name(class_names, label) for label in target["labels"].tolist()]
        kept = result["scores"] >= min_score
        found = zip(result["labels"][kept].tolist(), result["scores"][kept].tolist(), strict=True)
        found_texts = [f"{_class_name(class_names, label)} {score:.2f}" for label, score in found]
        picture = to_picture(image)
        factor = width / picture.width
        picture = picture.resize((width, max(1, round(picture.height * factor))))
        left = draw_boxes(picture, true_xyxy * factor, texts, target["labels"])
        right = draw_boxes(picture, result["boxes"][kept].cpu() * factor, found_texts, result["labels"][kept])
        rows.append((left, right))
    height = TITLE_HEIGHT + sum(left.height + MARGIN for left, _ in rows)
    sheet = Image.new("RGB", (2 * width + 3 * MARGIN, height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), "ground truth", fill="black")
    draw.text((width + 2 * MARGIN, MARGIN), f"predictions, score at least {min_score:g}", fill="black")
    top = TITLE_HEIGHT + MARGIN
    for left, right in rows:
        sheet.paste(left, (MARGIN, top))
        sheet.paste(right, (width + 2 * MARGIN, top))
        top += left.height + MARGIN
    sheet.save(out_png)


@torch.no_grad()
def draw_examples(
    model: torch.nn.Module,
    postprocess: Callable[..., list[dict[str, Tensor]]],
    dataset: Any,
    device: torch.device,
    out_png: Path,
    *,
    count: int = 6,
) -> None:
    """Draw the predictions of some images of a data set beside ground truth.

    Args:
        model: the detector; postprocess: its outputs and sizes -> detections in pixels.
        dataset: gives (image (3, H, W), target) and has `class_names`.
        device: where the model is.
        out_png: where the picture goes.
        count: images drawn, evenly spread over the data set.
    """
    model.eval()
    count = min(count, len(dataset))
    images, targets = zip(*(dataset[i * len(dataset) // count] for i in range(count)), strict=True)
    sizes = torch.tensor([image.shape[1:] for image in images], device=device)
    outputs = model(nested_tensor_from_tensor_list(images).to(device))
    results = [{name: value.cpu() for name, value in result.items()} for result in postprocess(outputs, sizes)]
    draw_predictions(images, targets, results, dataset.class_names, out_png)


def to_picture(image: Tensor) -> Image.Image:
    """Undo the normalisation of a (3, H, W) image."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    pixels = ((image.cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def draw_boxes(picture: Image.Image, boxes_xyxy: Tensor, texts: Sequence[str], labels: Tensor) -> Image.Image:
    """Return a copy of a picture with labelled boxes; lines and letters grow with the picture.

    Args:
        picture: RGB.
        boxes_xyxy: (n, 4) in pixels; later ones are drawn over earlier ones.
        texts: n short texts; an empty one is left out.
        labels: (n,), which decide the colours.
    """
    drawn = picture.copy()
    draw = ImageDraw.Draw(drawn)
    diagonal = math.hypot(*picture.size)
    line, font = max(2, round(diagonal / 400)), ImageFont.load_default(size=max(11, round(diagonal / 55)))
    colors = [COLORS[label % len(COLORS)] for label in labels.tolist()]
    # PIL wants the corners in order, which an untrained detector does not promise.
    outlines = [(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)) for x0, y0, x1, y1 in boxes_xyxy.tolist()]
    for outline, color in zip(outlines, colors, strict=True):
        draw.rectangle(outline, outline=color, width=line)
    # After all boxes: no line crosses a text.
    for outline, text, color in zip(outlines, texts, colors, strict=True):
        if text:
            _draw_label(draw, outline, text, color, font)
    return drawn


def _draw_label(
    draw: ImageDraw.ImageDraw,
    outline: tuple[float, float, float, float],
    text: str,
    color: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Write a text on a coloured ground above a box, inside the picture."""
    _, _, width, height = draw.textbbox((0, 0), text, font=font)
    left = max(0, min(outline[0], draw.im.size[0] - width - 4))
    top = max(0, outline[1] - height - 2)
    draw.rectangle((left, top, left + width + 3, top + height + 1), fill=color)
    red, green, blue = ImageColor.getrgb(color)[:3]
    # The weights of the eye's sensitivity; the middle lies where black and white read equally well.
    is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 110
    draw.text((left + 2, top), text, fill="white" if is_dark else "black", font=font)


def _draw_panel(axis: Axes, panel: Panel, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    for number, (name, records) in enumerate(runs.items()):
        for line in panel.lines:
            points = line.points(records)
            if points:
                marker = "." if len(points) < 30 else ""
                label = f"{name} {line.label}".rstrip()
                axis.plot(*zip(*points, strict=True), line.style, color=f"C{number}", label=label, marker=marker)
    axis.set_title(panel.title)
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize="small")
    else:
        axis.text(0.5, 0.5, "not in these logs", transform=axis.transAxes, ha="center")
    if panel.from_zero:
        axis.set_ylim(bottom=0)


def _class_name(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) and names[label] else str(label)
