"""What can be wrong with a data set: every kind of problem with its weight and its remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """A kind of problem.

    Attributes:
        is_error: training or evaluation stops, or learns or measures something wrong; else a remark.
        title: what it is, in a few words.
        remedy: what it leads to and what to do.
    """

    is_error: bool
    title: str
    remedy: str


class Problem(NamedTuple):
    """One problem at one place.

    Attributes:
        kind: a key of `KINDS`.
        file: annotation file, or picture.
        where: the entry in the file, "" where the whole file is meant.
        detail: what was found.
        image_id: image it belongs to, None where that is unknown or there is none.
    """

    kind: str
    file: str
    where: str
    detail: str
    image_id: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return it with weight, title and remedy, for `--json`."""
        kind = KINDS[self.kind]
        weight = "error" if kind.is_error else "remark"
        return {"severity": weight, **self._asdict(), "title": kind.title, "remedy": kind.remedy}


def _error(title: str, remedy: str) -> Kind:
    return Kind(True, title, remedy)


def _remark(title: str, remedy: str) -> Kind:
    return Kind(False, title, remedy)


# In the order of the report.
KINDS: Mapping[str, Kind] = {
    "annotation_file": _error("annotation file that cannot be used", "fetch or write it again in COCO's format"),
    "malformed_entry": _error("entry with a missing or wrong field", "training refuses the file: correct the entry"),
    "duplicate_image_id": _error("image id used twice", "training refuses the file: number the images anew"),
    "duplicate_category_id": _error("category id used twice", "training refuses the file: one id per class"),
    "duplicate_category_name": _error(
        "two categories of one name", "they are trained as two classes: give their objects one id, or rename one"
    ),
    "duplicate_file_name": _error(
        "picture listed under two image ids",
        "its objects are background to the other entry: put them under one image id",
    ),
    "unknown_image": _error("annotation of an image that is not listed", "add the image or remove the annotation"),
    "unknown_category": _error(
        "annotation of a category that is not listed", "add the category, or correct category_id"
    ),
    "segmentation_only": _error(
        "annotation with a segmentation but no box",
        "add bbox, the extent of the mask: left, top, width, height (pycocotools.mask.toBbox computes it)",
    ),
    "malformed_box": _error(
        "box that is not four finite numbers", "training refuses the file: write left, top, width, height in pixels"
    ),
    "corner_boxes": _error(
        "boxes that look like corners",
        "COCO's bbox is left, top, width, height: subtract the first corner from the second",
    ),
    "normalised_boxes": _error(
        "boxes that look relative to the picture",
        "COCO's bbox is in pixels: multiply by width and height (YOLO's format: convert --from yolo)",
    ),
    "empty_box": _error(
        "box without area",
        "training drops it, so that its object is taught as background; evaluation still asks for it: remove or redraw",
    ),
    "outside_box": _error("box outside its picture", "training drops it: correct the box or the size of the image"),
    "image_missing": _error(
        "missing picture", "add the file, or remove the image; --skip_bad_images trains without it"
    ),
    "image_unreadable": _error(
        "unreadable picture", "replace the file, or remove the image; --skip_bad_images trains without it"
    ),
    "size_mismatch": _error(
        "picture of another size than its entry says",
        "boxes are used on the file's pixels as they are: scale them, or restore the picture they were drawn on",
    ),
    "rotated_picture": _error(
        "picture that its EXIF tag turns",
        "training takes the pixels as stored, boxes were drawn on the turned picture: save it upright, without the tag",
    ),
    "category_id_range": _error("category id that cannot be a label", "train with --label_mapping contiguous"),
    "split_content": _error(
        "picture in both splits, equal by sha256",
        "AP is measured on a picture that was trained on: keep it in one split only",
    ),
    "split_categories": _error("splits disagree about a category", "give both files the same list of categories"),
    "exif_orientation": _remark(
        "picture with an EXIF tag for turning",
        "training takes the pixels as stored, as the sizes in the file suggest: check that the boxes fit (preview)",
    ),
    "image_without_size": _remark("image entry without width and height", "training reads the size from the picture"),
    "duplicate_content": _remark("two pictures of equal content", "they count twice; remove one if that is no purpose"),
    "split_file_name": _remark(
        "file name in both splits", "harmless where the pictures differ; with their contents compared, it is said above"
    ),
    "split_image_id": _remark(
        "image id in both splits", "harmless here; tools that join the two files need different ids"
    ),
    "split_category_missing": _remark(
        "category listed in one split only", "classes are those of both files together; its AP cannot be measured"
    ),
    "category_id_zero": _remark(
        "category id 0",
        "an ordinary class here, label 0, as in the official code (whose background is no class); some other "
        "tools take 0 for background. COCO's ids begin at 1",
    ),
    "category_id_gaps": _remark(
        "category ids with many gaps",
        "the classifier has a row for every id up to the largest: --label_mapping contiguous saves the empty ones",
    ),
    "unused_category": _remark("category without objects", "it is never trained, and has no AP in this split"),
    "image_without_objects": _remark(
        "image without objects", "trained on as background; remove it if its objects were forgotten"
    ),
    "annotation_ids": _remark(
        "annotation id missing, 0 or used twice",
        "numbered anew when read here; pycocotools and the official code count such objects wrongly",
    ),
    "over_edge": _remark("box that reaches over the edge", "training cuts it at the edge, evaluation does not"),
    "tiny_box": _remark("box thinner than a pixel", "hardly learnable: check whether it was meant"),
    "duplicate_object": _remark(
        "the same box twice", "two queries are taught to find one object: remove one of the two"
    ),
    "area": _remark(
        "area missing, or larger than the box",
        "a missing area is filled in as width x height here and stops the official code; evaluation sorts by area "
        "into small, medium, large",
    ),
    "crowd": _remark("crowd region", "never trained on, and neither counted for nor against in evaluation"),
    "difficult": _remark("object marked difficult or ignore", "trained on unless --remove_difficult is passed"),
    "unlisted_picture": _remark("picture in the folder that no entry lists", "not used: add it or leave it"),
}
