"""Data and output folder: can one be read and the other be written?"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import main as program
from datasets import DatasetError, build_dataset

from .finding import ERROR, OK, WARNING, Finding

# A checkpoint of a detector with ResNet-50 and its optimizer takes 0.5 GB, and a run keeps several.
LITTLE_SPACE, NO_SPACE = 10e9, 1e9


def examine_data(coco_path: str | None, label_mapping: str) -> list[Finding]:
    """Open both splits as the training does, count, and read one picture of each."""
    if not coco_path:
        return [Finding(OK, "data", "no --coco_path: the generated data set is used, rendered at the first start")]
    found = []
    for split in ("train", "val"):
        # Any model: it is the data options that count.
        argv = ["-m", "dab_detr", "--coco_path", coco_path, "--label_mapping", label_mapping]
        try:
            data = build_dataset(split, program.parse_args(argv))
            picture = data.read_image(0)
        except DatasetError as error:
            found.append(Finding(ERROR, f"data: {split}", str(error), "see the section Data of README.md"))
            continue
        objects, classes = len(data.coco.anns), sum(name != "N/A" for name in data.class_names)
        text = f"{len(data)} pictures, {objects} objects, {classes} classes (--num_classes {data.num_classes})"
        text += f"; the first is {picture.width} x {picture.height} pixels"
        found.append(Finding(OK, f"data: {split}", text))
    return found


def examine_output(output_dir: str) -> list[Finding]:
    """Write a file into the output folder, or where it would be created, and look at the free space."""
    if not output_dir:
        return [Finding(OK, "output", "no --output_dir: nothing would be written")]
    folder = Path(output_dir).expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"doctor")
    except OSError as error:
        text = f"cannot write to {existing}: {error.strerror}"
        return [Finding(ERROR, "output", text, "change its permissions or choose another --output_dir")]
    free = shutil.disk_usage(existing).free
    text = f"{folder} can be {'written' if existing == folder else 'created'}, {free / 1e9:.1f} GB are free"
    if free < LITTLE_SPACE:
        remedy = (
            "make space: a checkpoint of a ResNet-50 detector takes 0.5 GB and several are kept (--keep_checkpoints)"
        )
        return [Finding(ERROR if free < NO_SPACE else WARNING, "output", text, remedy)]
    return [Finding(OK, "output", text)]
