"""Names of detectors and how to build them. A detector's file registers itself when it is imported."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

Builder = Callable[[Any], Any]

_BUILDERS: dict[str, Builder] = {}


def register_model(*names: str) -> Callable[[Builder], Builder]:
    """Register a ``build(args)`` function under one name and any aliases.

    Raises:
        ValueError: a name is taken.
    """

    def register(build: Builder) -> Builder:
        for name in names:
            if name in _BUILDERS:
                raise ValueError(f"model name '{name}' is registered twice")
            _BUILDERS[name] = build
        return build

    return register


def list_models() -> list[str]:
    """Return every registered name, aliases included, in alphabetical order."""
    return sorted(_BUILDERS)


def get_builder(name: str) -> Builder:
    """Return the ``build(args)`` function of a model.

    Raises:
        ValueError: the name is unknown; the message lists the known ones and the nearest.
    """
    if name not in _BUILDERS:
        near = difflib.get_close_matches(name, _BUILDERS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"unknown model '{name}'{hint} Known models: {', '.join(list_models())}")
    return _BUILDERS[name]
