"""One line of the doctor's report."""

from __future__ import annotations

from typing import NamedTuple

OK, WARNING, ERROR = "ok", "warning", "error"


class Finding(NamedTuple):
    """What was found about one thing.

    Attributes:
        mark: "ok", "warning" (works, but worse than it could) or "error" (will not work).
        name: of the thing.
        text: what is there.
        remedy: what to do about it; empty for "ok".
    """

    mark: str
    name: str
    text: str
    remedy: str = ""
