"""Detection data sets in COCO's layout, COCO itself included."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from util.pixels import normalize_pixels

from .annotations import (
    DatasetError,
    ObjectTable,
    Target,
    clip_boxes,
    has_area,
    load_annotation_file,
    make_arrays,
    read_objects,
    to_tensors,
)
from .images import ImageFolder
from .labels import LabelMap
from .rendering import RENDERERS, Augmentation
from .transforms import augment_objects

_log = logging.getLogger(__name__)


class Transform(Protocol):
    """What decides how pictures are changed, see `datasets.transforms`."""

    def draw(self, width: int, height: int) -> Augmentation:
        """Say what happens to a picture of this size."""
        ...


class CocoDetection(Dataset[tuple[Tensor, Target]]):
    """Pictures and targets of one split, in the order of the image ids.

    Args:
        image_folder: folder of the pictures.
        annotation_file: instances file of the split.
        transform: decides how each picture is resized, cut and mirrored.
        other_categories: categories of the other splits; labels and class count are those of all together.
        label_mapping: "ids" or "contiguous", see `LabelMap`.
        num_classes: classes of the model, None = what the categories need.
        keep_bytes: keep the encoded files in memory (of every process that opens the data set).
        skip_bad_images: replace an unreadable picture by the next readable one instead of raising.
        remove_difficult: treat annotations with ``difficult`` or ``ignore`` 1 as crowd regions: never trained on,
            neither counted for nor against in evaluation.
        objects_required: False for files that list images only.
        image_backend: "pil" gives the official pixels, "torch" nearly the same ones faster, see `datasets.rendering`.

    Attributes:
        ids: image ids; position in this list = index.
        coco: pycocotools' index of the annotation file, the evaluator's ground truth.
        transform, image_backend: as given.
        num_classes, class_names, label_to_category: see `LabelMap`.

    Raises:
        DatasetError: see `load_annotation_file`, `ImageFolder` and `LabelMap`.
    """

    def __init__(
        self,
        image_folder: Path,
        annotation_file: Path,
        *,
        transform: Transform,
        other_categories: Iterable[Mapping[str, Any]] = (),
        label_mapping: str = "ids",
        num_classes: int | None = None,
        keep_bytes: bool = False,
        skip_bad_images: bool = False,
        remove_difficult: bool = False,
        objects_required: bool = True,
        image_backend: str = "pil",
    ) -> None:
        content = load_annotation_file(annotation_file, objects_required=objects_required)
        if not content["images"]:
            raise DatasetError(f"{annotation_file} lists no image; add its list 'images'")
        if remove_difficult:
            _turn_difficult_into_crowd(content["annotations"], annotation_file)
        images = sorted(content["images"], key=lambda image: image["id"])
        self.ids: list[int] = [image["id"] for image in images]
        self.coco = index_annotations(content)
        self._labels = LabelMap(
            [*content["categories"], *other_categories], mapping=label_mapping, num_classes=num_classes
        )
        self.num_classes = self._labels.num_classes
        self.class_names = self._labels.class_names
        self.label_to_category = self._labels.label_to_category
        self.folder = ImageFolder(
            image_folder,
            [image["file_name"] for image in images],
            self.ids,
            keep_bytes=keep_bytes,
            allow_missing=skip_bad_images,
        )
        self._objects, self._first = self._group_by_image(content["annotations"])
        self._size_wh = [(image.get("width"), image.get("height")) for image in images]
        self._report_dropped(annotation_file)
        self.transform = transform
        self.image_backend, self._renderer = image_backend, RENDERERS[image_backend]
        self._skip_bad_images = skip_bad_images
        # Shared with the workers, so that the main process can tell how many pictures they met.
        self._is_bad = torch.zeros(len(images), dtype=torch.bool).share_memory_()
        self._told_about_size = torch.zeros(1, dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Return (image (3, H, W) float32 normalised, target) of one picture.

        Raises:
            DatasetError: the picture is missing or damaged, and bad pictures are not skipped or none is readable.
        """
        pixels, target = self.load(index)
        return normalize_pixels(pixels), target

    def load(self, index: int) -> tuple[Tensor, Target]:
        """Return (image (3, H, W) uint8, target) of one picture, to be normalised where it is needed.

        Raises:
            DatasetError: as for `dataset[index]`.
        """
        image, index = self._read(index)
        width, height = self._renderer.size_wh(image)
        self._compare_size(index, width, height)
        plan = self.transform.draw(width, height)
        rows = slice(self._first[index], self._first[index + 1])
        objects = make_arrays(self._objects.rows(rows), image_id=self.ids[index], width=width, height=height)
        objects = augment_objects(objects, plan, width=width, height=height)
        return self._renderer.render(image, plan), to_tensors(objects)

    @property
    def num_bad_images(self) -> int:
        """Number of different pictures found unreadable so far, by any worker."""
        return int(self._is_bad.sum())

    @property
    def bad_image_ids(self) -> list[int]:
        """Ids of the pictures found unreadable so far, by any worker of this process."""
        return [self.ids[position] for position in self._is_bad.nonzero().flatten().tolist()]

    def orientations(self) -> list[int]:
        """Tell for every picture whether it is taller than wide (1) or not (0), by the annotation file.

        Raises:
            DatasetError: the file does not list the size of a picture.
        """
        unknown = [index for index, (width, height) in enumerate(self._size_wh) if not width or not height]
        if unknown:
            raise DatasetError(
                f"--aspect_ratio_grouping needs width and height of every picture in the annotation file; "
                f"{self.describe(unknown[0])} and {len(unknown) - 1} others have none: add them or leave the option out"
            )
        return [int(height > width) for width, height in self._size_wh]

    def describe(self, index: int) -> str:
        """Return path and image id of one picture, for messages."""
        return self.folder.describe(index)

    def read_image(self, index: int) -> Image.Image:
        """Return the picture as stored, RGB, without any transform."""
        return self.folder.read(index)

    def labels_to_categories(self, labels: Tensor) -> Tensor:
        """Turn predicted labels of any shape into the category ids of the annotation file."""
        return self._labels.to_categories(labels)

    def _read(self, index: int) -> tuple[Any, int]:
        decode = self._renderer.decode
        if not self._skip_bad_images:
            return self.folder.read_with(decode, index), index
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            try:
                return self.folder.read_with(decode, candidate), candidate
            except DatasetError as error:
                if not self._is_bad[candidate]:
                    self._is_bad[candidate] = True
                    _log.warning("skipped bad picture number %d: %s", self.num_bad_images, error)
        raise DatasetError(f"none of the {len(self)} pictures in {self.folder.folder} is readable")

    def _group_by_image(self, annotations: list[dict[str, Any]]) -> tuple[ObjectTable, np.ndarray[Any, Any]]:
        position = np.searchsorted(self.ids, np.array([a["image_id"] for a in annotations], dtype=np.int64))
        # Stable: inside an image the objects keep the order of the file, as official.
        order = np.argsort(position, kind="stable")
        objects = read_objects(annotations).rows(order)
        objects = objects._replace(categories=self._labels.to_labels(objects.categories))
        return objects, np.searchsorted(position[order], np.arange(len(self.ids) + 1))

    def _report_dropped(self, annotation_file: Path) -> None:
        sizes = np.array([[w or np.inf, h or np.inf] for w, h in self._size_wh], dtype=np.float32)
        per_object = np.repeat(sizes, np.diff(self._first), axis=0)
        boxes_xyxy = clip_boxes(self._objects.boxes_xywh, per_object[:, 0], per_object[:, 1])
        dropped = int((~has_area(boxes_xyxy) & (self._objects.iscrowd == 0)).sum())
        if dropped:
            _log.warning(
                "%s: %d of %d boxes lie outside their image or have no area; they are not trained on",
                annotation_file,
                dropped,
                len(boxes_xyxy),
            )

    def _compare_size(self, index: int, width: int, height: int) -> None:
        listed = self._size_wh[index]
        if None in listed or listed == (width, height) or self._told_about_size[0]:
            return
        self._told_about_size[0] = True
        _log.warning(
            "%s is %dx%d as stored, the annotation file says %sx%s: boxes are used as they are and EXIF rotation is "
            "not applied, check that they fit (said once)",
            self.folder.names[index],
            width,
            height,
            *listed,
        )


def index_annotations(content: dict[str, Any]) -> COCO:
    """Build pycocotools' index of an annotation file's content, without its prints."""
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _turn_difficult_into_crowd(annotations: list[dict[str, Any]], path: Path) -> None:
    difficult = [a for a in annotations if a.get("difficult") == 1 or a.get("ignore") == 1]
    for annotation in difficult:
        annotation["iscrowd"] = 1
    _log.info("%s: %d of %d annotations are difficult and left out", path, len(difficult), len(annotations))
