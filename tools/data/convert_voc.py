"""Pascal VOC: one XML file per picture in Annotations/, lists of names in ImageSets/Main/, pictures in JPEGImages/.

VOC counts pixels from 1, and xmax, ymax are the last pixels of the object: the box of COCO begins at xmin - 1 and is
xmax - xmin + 1 wide. `--origin 0` reads files of tools that write edges instead: it begins at xmin, xmax - xmin wide.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.parsers import expat

from tools.data.sources import BadRow, Source, SourceImage, SourceObject, corner_box, is_picture, read_lines
from util.errors import OptionError

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc(
    source: Path, *, images: Path | None, sets: Mapping[str, str], class_names: Sequence[str], origin: int
) -> Source:
    """Read a data set in Pascal VOC's format.

    Args:
        source: folder with Annotations, or with XML files beside their pictures.
        images: folder of the pictures; None takes JPEGImages, images, or the XML files' own.
        sets: split -> name of its list in ImageSets/Main; empty takes train and val, else trainval and test, and
            everything as train where there is no list.
        class_names: the classes; empty takes those found, in alphabetical order.
        origin: 1 or 0, see the module.

    Raises:
        OptionError: folders or lists cannot be found.
    """
    folder = source / "Annotations" if (source / "Annotations").is_dir() else source
    pictures = images or next((source / name for name in ("JPEGImages", "images") if (source / name).is_dir()), folder)
    listed = _read_sets(source, folder, sets)
    documents = {file: _parse(file) for files in listed.values() for file in files}
    names = list(class_names) or sorted(
        {name for root, _ in documents.values() if root is not None for name in _class_names(root)}
    )
    result = Source(names)
    by_stem = {path.stem: path for path in sorted(pictures.iterdir()) if is_picture(path)}
    for split, files in listed.items():
        result.splits[split] = _read_split(files, documents, by_stem, pictures, result, origin)
    return result


def _read_sets(source: Path, folder: Path, sets: Mapping[str, str]) -> dict[str, list[Path]]:
    lists = source / "ImageSets" / "Main"
    if not sets:
        present = {path.stem for path in lists.glob("*.txt")} if lists.is_dir() else set()
        for candidate in ({"train": "train", "val": "val"}, {"train": "trainval", "val": "test"}):
            if set(candidate.values()) <= present:
                sets = candidate
                break
        else:
            files = sorted(folder.glob("*.xml"))
            if present:
                raise OptionError(f"{lists} has {', '.join(sorted(present))}: say which is which, --sets train=NAME")
            if not files:
                raise OptionError(f"no XML file in {folder}: pass the folder that holds Annotations")
            return {"train": files}
    found = {}
    for split, name in sets.items():
        path = lists / f"{name}.txt"
        if not path.is_file():
            raise OptionError(f"no list {path} for --sets {split}={name}: check the name")
        # Lists of single classes have a second column, -1 where the picture lacks the class; all are listed.
        found[split] = [folder / f"{line.split()[0]}.xml" for _, line in read_lines(path)]
    return found


def _parse(path: Path) -> tuple[ElementTree.Element | None, dict[ElementTree.Element, int] | str]:
    """Return the root and the line of every element, or None and what is wrong."""
    lines: dict[ElementTree.Element, int] = {}
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()

    def start(tag: str, attributes: dict[str, Any]) -> None:
        lines[builder.start(tag, attributes)] = parser.CurrentLineNumber

    parser.StartElementHandler = start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(path.read_bytes(), True)
        return builder.close(), lines
    except expat.ExpatError as error:
        return None, f"is no XML ({error})"
    except OSError as error:
        return None, f"cannot be read ({error.strerror})"


def _class_names(root: ElementTree.Element) -> list[str]:
    return [name for entry in root.iter("object") if (name := (entry.findtext("name") or "").strip())]


def _read_split(
    files: Sequence[Path],
    documents: Mapping[Path, tuple[ElementTree.Element | None, dict[ElementTree.Element, int] | str]],
    by_stem: Mapping[str, Path],
    pictures: Path,
    result: Source,
    origin: int,
) -> list[SourceImage]:
    usable, paths = [], []
    for file in files:
        root, lines = documents[file]
        if root is None:
            result.bad.append(BadRow(file, 0, str(lines)))
            continue
        named = pictures / (root.findtext("filename") or "").strip()
        path = named if named.is_file() else by_stem.get(file.stem, pictures / f"{file.stem}.jpg")
        usable.append(file)
        paths.append((path, path.name))
    read = result.add_pictures(paths, [BadRow(file, 0, "") for file in usable])
    images = []
    for file, image in zip(usable, read, strict=True):
        if image is not None and _read_objects(file, documents[file], image, result, origin):
            images.append(image)
    return images


def _read_objects(
    file: Path,
    document: tuple[ElementTree.Element | None, Any],
    image: SourceImage,
    result: Source,
    origin: int,
) -> bool:
    root, lines = document
    assert root is not None
    said = tuple((root.findtext(f"size/{side}") or "0").strip() for side in ("width", "height"))
    if said not in (("0", "0"), (str(image.width), str(image.height))):
        fault = f"says {said[0]} x {said[1]}, the picture has {image.width} x {image.height}: the boxes may not fit"
        size = root.find("size")
        result.bad.append(BadRow(file, lines.get(size, 0), fault))
        return False
    label_of = {name: label for label, name in enumerate(result.class_names)}
    for entry in root.iter("object"):
        name = (entry.findtext("name") or "").strip()
        corners = [(entry.findtext(f"bndbox/{corner}") or "").strip() for corner in _CORNERS]
        box = corner_box(corners, origin=origin, size=image)
        if name not in label_of:
            result.bad.append(BadRow(file, lines[entry], f"class '{name}' is none of {', '.join(label_of)}"))
        elif isinstance(box, str):
            result.bad.append(BadRow(file, lines[entry], box))
        else:
            difficult = (entry.findtext("difficult") or "").strip() == "1"
            left, top, width, height = box
            image.objects.append(SourceObject(label_of[name], (left, top, width, height), is_difficult=difficult))
    return True
