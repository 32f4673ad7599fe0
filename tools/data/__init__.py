"""Rooms of `python -m tools.dataset`: check, convert, stats, split and preview of a data set in COCO's layout."""
