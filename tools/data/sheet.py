"""The drawing of a contact sheet: boxes, class names that do not hide each other, captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from util.plots import COLORS, MARGIN

_FONT_SIZE, _CAPTION_SIZE = 12, 12
_CAPTION_HEIGHT = 34
_DASH = 6
# Height of a picture as a multiple of the width; higher ones are drawn narrower.
_TALLEST = 1.5
Box = tuple[float, float, float, float]


@dataclass
class Cell:
    """One picture of the sheet.

    Attributes:
        picture: RGB.
        boxes_xywh: (N) pixels of the picture; categories: their ids; texts: their class names.
        is_crowd: drawn dashed.
        caption, second_line: under the picture.
    """

    picture: Image.Image
    boxes_xywh: Sequence[tuple[float, ...]]
    categories: Sequence[int]
    texts: Sequence[str]
    is_crowd: Sequence[bool]
    caption: str
    second_line: str


def draw_sheet(cells: Sequence[Cell], category_ids: Sequence[int], *, columns: int, width: int) -> Image.Image:
    """Draw pictures in rows; each row is as high as its highest picture.

    Args:
        cells: the pictures.
        category_ids: of the data set, in order; the place of an id decides its colour.
        columns: pictures side by side; width: pixels of each.
    """
    color_of = {category: COLORS[place % len(COLORS)] for place, category in enumerate(category_ids)}
    font = ImageFont.load_default(size=_CAPTION_SIZE)
    drawn = [draw_cell(cell, [color_of[c] for c in cell.categories], width=width) for cell in cells]
    columns = min(columns, len(cells))
    rows = [list(range(start, min(start + columns, len(cells)))) for start in range(0, len(cells), columns)]
    heights = [max(drawn[place].height for place in row) + _CAPTION_HEIGHT + MARGIN for row in rows]
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, sum(heights) + MARGIN), "white")
    draw, top = ImageDraw.Draw(sheet), MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, place in enumerate(row):
            left = MARGIN + column * (width + MARGIN)
            sheet.paste(drawn[place], (left, top))
            below = top + drawn[place].height + 2
            for line, text in enumerate((cells[place].caption, cells[place].second_line)):
                fill = "#555555" if line else "black"
                draw.text((left, below + 15 * line), shorten(text, font, width), fill=fill, font=font)
        top += height
    return sheet


def draw_cell(cell: Cell, colors: Sequence[str], *, width: int) -> Image.Image:
    """Draw the boxes of one picture, resized to a width, or a height.

    Small boxes are drawn last, so that large ones do not hide them; names come on top of all boxes.
    """
    factor = min(width / cell.picture.width, _TALLEST * width / cell.picture.height)
    picture = cell.picture.resize([max(1, round(side * factor)) for side in cell.picture.size])
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=_FONT_SIZE)
    boxes = [_corners(box, factor) for box in cell.boxes_xywh]
    order = sorted(range(len(boxes)), key=lambda i: -(boxes[i][2] - boxes[i][0]) * (boxes[i][3] - boxes[i][1]))
    for place in order:
        draw_box(draw, boxes[place], colors[place], dashed=cell.is_crowd[place])
    taken: list[Box] = []
    for place in order:
        text = shorten(cell.texts[place], font, picture.width - 4)
        label = _free_place(boxes[place], draw.textbbox((0, 0), text, font=font)[2] + 3, picture.size, taken)
        if label is not None:
            taken.append(label)
            draw.rectangle(label, fill=colors[place])
            draw.text((label[0] + 2, label[1]), text, fill=_readable_on(colors[place]), font=font)
    return picture


def _corners(box: tuple[float, ...], factor: float) -> Box:
    left, top, width, height = box
    right, bottom = left + max(width, 0), top + max(height, 0)
    return (left * factor, top * factor, right * factor, bottom * factor)


def draw_box(draw: ImageDraw.ImageDraw, box: Box, color: str, *, dashed: bool) -> None:
    """Draw one frame, two pixels wide, with a thin dark rim that keeps it visible on its own colour."""
    left, top, right, bottom = (round(value) for value in box)
    if not dashed:
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline="black")
        draw.rectangle((left, top, right, bottom), outline=color, width=2)
        return
    for start in range(left, right, 2 * _DASH):
        for y in (top, bottom):
            draw.line((start, y, min(start + _DASH, right), y), fill=color, width=2)
    for start in range(top, bottom, 2 * _DASH):
        for x in (left, right):
            draw.line((x, start, x, min(start + _DASH, bottom)), fill=color, width=2)


def _free_place(box: Box, width: float, size: tuple[int, int], taken: Sequence[Box]) -> Box | None:
    """Return where a name hides no other: above the box, inside it at the top or bottom, below; None if nowhere.

    The colour of the frame still tells the class of an object whose name has no place.
    """
    height = _FONT_SIZE + 3
    left, top, _, bottom = box
    for y in (top - height, top, bottom - height, bottom):
        x = min(max(left, 0), size[0] - width)
        place = (x, y, x + width, y + height)
        inside = y >= 0 and y + height <= size[1]
        if inside and not any(_overlap(place, other) for other in taken):
            return place
    return None


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _readable_on(color: str) -> str:
    red, green, blue = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 110 else "white"


def shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Cut a text in the middle so that it fits a width in pixels."""
    if font.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        half = kept // 2
        short = f"{text[: kept - half]}...{text[-half:]}"
        if font.getlength(short) <= width:
            return short
    return text[:1]
