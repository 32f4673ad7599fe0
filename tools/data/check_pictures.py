"""Compare picture files with the entries of an annotation file, and with each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tools.data.check_entries import SplitContent
from tools.data.kinds import Problem
from tools.data.pictures import Picture, is_picture, read_pictures

_SWAPS_SIDES = (5, 6, 7, 8)


def check_pictures(content: SplitContent, folder: Path, *, decode: bool = False) -> list[Problem]:
    """Read the pictures of one split, keep what they say in `content.pictures`, and return their problems.

    Args:
        content: the split; folder: where its pictures lie.
        decode: decode every picture, as training does.
    """
    if not folder.is_dir():
        return [Problem("image_missing", content.file, f"folder {folder}", "does not exist")]
    paths = [folder / entry["file_name"] for entry in content.images.values()]
    content.pictures = dict(zip(content.images, read_pictures(paths, decode=decode), strict=True))
    problems = [
        problem for image_id, picture in content.pictures.items() for problem in _compare(content, image_id, picture)
    ]
    problems += _find_copies(content)
    listed = {str(path) for path in paths}
    for path in sorted(folder.rglob("*")):
        if is_picture(path) and str(path) not in listed:
            problems.append(Problem("unlisted_picture", str(path), "", f"not in {content.paths.annotation_file.name}"))
    return problems


def _compare(content: SplitContent, image_id: int, picture: Picture) -> Iterator[Problem]:
    entry = content.images[image_id]
    if picture.fault:
        kind = "image_missing" if picture.is_missing else "image_unreadable"
        folder = content.paths.image_folder
        yield content.image_problem(kind, image_id, picture.fault if folder is None else f"{picture.fault} in {folder}")
        return
    listed, stored = (entry.get("width"), entry.get("height")), (picture.width, picture.height)
    if None not in listed and listed != stored:
        turned = picture.orientation in _SWAPS_SIDES and listed == stored[::-1]
        detail = f"the file has {stored[0]} x {stored[1]}, its entry {listed[0]} x {listed[1]}"
        yield content.image_problem("rotated_picture" if turned else "size_mismatch", image_id, detail)
    elif picture.orientation != 1:
        yield content.image_problem("exif_orientation", image_id, f"orientation {picture.orientation}")


def _find_copies(content: SplitContent) -> Iterator[Problem]:
    first_with: dict[str, int] = {}
    for image_id, picture in content.pictures.items():
        if picture.fault:
            continue
        first = first_with.setdefault(picture.sha256, image_id)
        # One file under two ids is said already.
        if first != image_id and content.images[first]["file_name"] != content.images[image_id]["file_name"]:
            detail = f"same sha256 as {content.name_image(first)}"
            yield content.image_problem("duplicate_content", image_id, detail)
