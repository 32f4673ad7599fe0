"""Where option values come from: model defaults, a configuration file, ``--options``, the command line.

A configuration file is a flat Python file of assignments to literals, such as ``lr = 3e-4``. It is parsed, never run.
``_base_ = "other.py"`` (or a list) takes the values of another file, found beside it, first.
"""

from __future__ import annotations

import argparse
import ast
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from addict import Dict as ConfigDict
from yapf.yapflib.yapf_api import FormatCode

from .errors import OptionError
from .options import model_defaults

BASE_KEY = "_base_"
# These describe one start of the program, not the experiment.
NOT_IN_CONFIG = frozenset({"config_file", "options", "rank", "local_rank", "world_size", "dist_url", "help"})
_NOT_GIVEN = object()


def resolve_options(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, dict[str, Any], dict[str, Any]]:
    """Give every option its value; the command line wins over ``--options``, that over the file, that over defaults.

    Args:
        parser: all options, each with a default.
        argv: the command line without the program; None takes ``sys.argv``.

    Returns:
        (options, those given on the command line, those given in ``--options`` or the file).

    Raises:
        OptionError: unknown or missing names, values of the wrong type.
    """
    command_line = given_options(parser, argv)
    from_files: dict[str, Any] = {}
    if command_line.get("config_file"):
        from_files.update(load_config(command_line["config_file"]))
    from_files.update(parse_assignments(command_line.get("options") or ()))
    from_files = check_values(parser, from_files)

    modelname = command_line.get("modelname", from_files.get("modelname"))
    if not modelname:
        choices = next(action.choices for action in parser._actions if action.dest == "modelname") or ()
        raise OptionError(f"no model chosen: pass -m MODEL, one of {', '.join(map(str, choices))}")
    defaults = {action.dest: action.default for action in parser._actions if action.dest != "help"}
    values = {**defaults, **model_defaults(modelname), **from_files, **command_line}
    return argparse.Namespace(**values), command_line, from_files


def given_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Return only the options that stand on the command line.

    Raises:
        OptionError: an option the parser does not know; the message names the nearest.
    """
    # argparse leaves a value alone that the namespace already has, so what is still the marker was not given.
    marked = argparse.Namespace(**{action.dest: _NOT_GIVEN for action in parser._actions})
    namespace, unknown = parser.parse_known_args(argv, marked)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise OptionError(f"unknown argument '{unknown[0]}'{_nearest(unknown[0], flags)}; see --help")
    return {name: value for name, value in vars(namespace).items() if value is not _NOT_GIVEN}


def load_config(path: str | Path) -> dict[str, Any]:
    """Read a configuration file and the files it builds on.

    Returns:
        name -> value, the file's own values over those of its bases.

    Raises:
        OptionError: a file is missing, no Python, holds more than assignments of literals, or is its own base.
    """
    config = _load(Path(path), ())
    return dict(config)


def _load(path: Path, parents: tuple[Path, ...]) -> ConfigDict:
    path = path.expanduser().resolve()
    if path in parents:
        raise OptionError(f"configuration file {path} builds on itself: remove its {BASE_KEY}")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except OSError as error:
        raise OptionError(f"cannot read configuration file {path}: {error.strerror}") from error
    except (SyntaxError, UnicodeDecodeError) as error:
        raise OptionError(f"configuration file {path} is not a Python file: {error}") from error
    own = ConfigDict(_literal_assignments(tree, path))
    bases = own.pop(BASE_KEY, [])
    config = ConfigDict()
    for base in [bases] if isinstance(bases, str) else bases:
        config.update(_load(path.parent / base, (*parents, path)))
    config.update(own)
    config.freeze()
    return config


def _literal_assignments(tree: ast.Module, path: Path) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for index, node in enumerate(tree.body):
        is_docstring = index == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_docstring:
            continue
        simple = isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
        if not simple:
            raise OptionError(f"{path}, line {node.lineno}: expected 'option = value', got {ast.unparse(node)!r}")
        assert isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        try:
            values[node.targets[0].id] = ast.literal_eval(node.value)
        except ValueError as error:
            raise OptionError(
                f"{path}, line {node.lineno}: expected a number, text, list, True, False or None, "
                f"got {ast.unparse(node.value)!r}"
            ) from error
    return values


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` texts; a value that is no Python literal is text.

    Raises:
        OptionError: there is no "=".
    """
    values = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise OptionError(f"--options expects KEY=VALUE, got '{assignment}'")
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[key] = text
    return values


def check_values(parser: argparse.ArgumentParser, values: Mapping[str, Any]) -> dict[str, Any]:
    """Check names, types and choices of values that did not come through the command line.

    Returns:
        The same values, whole numbers turned into floats where the option is a float.

    Raises:
        OptionError: an unknown name (with the nearest one), or a value the command line would refuse.
    """
    actions = {action.dest: action for action in parser._actions if action.dest not in NOT_IN_CONFIG}
    for name in values:
        if name not in actions:
            raise OptionError(f"unknown option '{name}' in the configuration{_nearest(name, actions)}")
    return {name: _checked(actions[name], value) for name, value in values.items()}


def _checked(action: argparse.Action, value: Any) -> Any:
    if value is None and action.default is None:
        return None
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise OptionError(f"option '{action.dest}' expects True or False, got {value!r}")
        return value
    if action.nargs is None:
        return _checked_item(action, value)
    if not isinstance(value, (list, tuple)):
        raise OptionError(f"option '{action.dest}' expects a list, got {value!r}")
    if isinstance(action.nargs, int) and len(value) != action.nargs:
        raise OptionError(f"option '{action.dest}' expects {action.nargs} values, got {len(value)}")
    return [_checked_item(action, item) for item in value]


def _checked_item(action: argparse.Action, item: Any) -> Any:
    kind = action.type if isinstance(action.type, type) else str
    fits = isinstance(item, (int, float) if kind is float else kind) and not isinstance(item, bool)
    if not fits:
        raise OptionError(f"option '{action.dest}' expects {kind.__name__}, got {item!r}")
    if action.choices is not None and item not in action.choices:
        choices = ", ".join(map(str, action.choices))
        raise OptionError(f"option '{action.dest}' expects one of {choices}, got {item!r}")
    return kind(item)


def save_config(args: argparse.Namespace, parser: argparse.ArgumentParser, path: Path) -> None:
    """Write the values of all options as a configuration file that `load_config` reads again."""
    names = [action.dest for action in parser._actions if action.dest not in NOT_IN_CONFIG]
    lines = [f"{name} = {getattr(args, name)!r}" for name in dict.fromkeys(names)]
    text, _ = FormatCode("\n".join(lines) + "\n", style_config="{based_on_style: pep8, column_limit: 120}")
    path.write_text(text, encoding="utf-8")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
