"""Detect objects with an exported model: numpy, Pillow and onnxruntime are all it needs.

    python run_onnx.py model.onnx picture.jpg --output detections.png

Works with every file that `python -m tools.export` writes, with and without padding mask or post-processing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

COLORS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")


def main() -> None:
    """Detect, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--output", type=Path, help="picture to draw")
    parser.add_argument("--min_score", type=float, default=0.3)
    args = parser.parse_args()
    session = onnxruntime.InferenceSession(str(args.model), providers=onnxruntime.get_available_providers())
    about = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    picture = Image.open(args.picture).convert("RGB")
    scores, labels, boxes = detect(session, picture, about)
    kept = scores >= args.min_score
    print(f"{about['model']}: {int(kept.sum())} objects of score {args.min_score:g} or more in {args.picture}")
    texts = []
    for score, label, box in zip(scores[kept], labels[kept], boxes[kept], strict=True):
        texts.append(f"{about['class_names'][label]} {score:.2f}")
        print(f"{texts[-1]}  from ({box[0]:.1f}, {box[1]:.1f}) to ({box[2]:.1f}, {box[3]:.1f})")
    if args.output:
        draw(picture, boxes[kept], labels[kept], texts)
        picture.save(args.output)


def detect(
    session: Any, picture: Image.Image, about: dict[str, Any]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Run the model on one picture.

    Args:
        session: of onnxruntime; about: what the file says about itself.

    Returns:
        scores (n,) descending, labels (n,) and boxes (n, 4) xyxy in pixels of the picture.
    """
    width, height = picture.size
    factor = min(about["short_side"] / min(width, height), about["long_side"] / max(width, height))
    resized = picture.resize((round(width * factor), round(height * factor)), Image.Resampling.BILINEAR)
    pixels = np.asarray(resized, dtype=np.float32).transpose(2, 0, 1)[None] / 255
    offered = {
        "images": pixels,
        "padding_mask": np.zeros(pixels[:, 0].shape, dtype=bool),  # one picture has no padding
        "sizes": np.array([[height, width]], dtype=np.int64),
    }
    outputs = [each.name for each in session.get_outputs()]
    values = session.run(None, {each.name: offered[each.name] for each in session.get_inputs()})
    found = {name: value[0] for name, value in zip(outputs, values, strict=True)}
    if "scores" in found:
        return found["scores"], found["labels"], found["boxes"]
    return select(found["pred_logits"], found["pred_boxes"], (height, width), about["num_results"])


def select(
    logits: NDArray[Any], boxes_cxcywh: NDArray[Any], size: tuple[int, int], count: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Take the best pairs of query and class from (Q, K) logits and (Q, 4) boxes; scale boxes to (height, width)."""
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64))).ravel()
    best = np.argsort(-probabilities, kind="stable")[:count]
    query, label = np.divmod(best, logits.shape[1])
    centre, half = boxes_cxcywh[query, :2], boxes_cxcywh[query, 2:] / 2
    height, width = size
    boxes = np.concatenate((centre - half, centre + half), axis=1) * (width, height, width, height)
    return probabilities[best], label, boxes


def draw(picture: Image.Image, boxes: NDArray[Any], labels: NDArray[Any], texts: list[str]) -> None:
    """Draw boxes with their texts into a picture."""
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=max(11, min(picture.size) // 40))
    for box, label, text in zip(boxes, labels, texts, strict=True):
        left, top, right, bottom = box
        color = COLORS[label % len(COLORS)]
        pen.rectangle((min(left, right), min(top, bottom), max(left, right), max(top, bottom)), outline=color, width=2)
        place = pen.textbbox((max(left, 0), max(top, 0)), text, font=font)
        pen.rectangle(place, fill=color)
        pen.text((max(left, 0), max(top, 0)), text, fill="black", font=font)


if __name__ == "__main__":
    main()
