"""Dataclass fields as keyword arguments, JSON keys and command-line flags.

A field's metadata holds its help text and its limits; ``check`` applies them wherever the values came
from. Unknown names are refused with the nearest known ones. A JSON ``null`` is None where an argument takes
None, and stands for the default where it does not.
"""

import argparse
import dataclasses
import json
import math
import numbers
import os
import re
import sys
import types
import typing
from collections.abc import Iterable
from dataclasses import field
from typing import Any, NoReturn, TypeVar

from .other_toolkits import meant_by, nearest

# The help text of an argument that PaddleNLP's Trainer documents.
ELSEWHERE = "see PaddleNLP's Trainer"
# Of one that is accepted for PaddleNLP's files alone.
IN_FILES = "see PaddleNLP's files"
# Arguments that name rows.
_DATA = ("input_data_path", "dev_path", "dataset_name_or_path")
# Arguments that hold a text's template.
_TEMPLATES = ("template", "query_template", "passage_template")
# Whole numbers beyond it, either way, are out of range where no limit of their own says so: no library here takes them.
_LARGEST_WHOLE = 2**31 - 1
# As many unknown names are listed; a file of data may hold any number.
_MOST_LISTED = 50


class ArgumentError(ValueError):
    """An argument that is unknown, of a wrong type or out of range."""


def option(default: Any, help: str, choices: tuple = (), at_least=None, at_most=None, above=None) -> Any:
    """A dataclass field with a help text and limits (``above`` excludes the bound itself).

    Without ``at_most``, a whole number can be 2**31 - 1 at most.
    """
    limits = {"help": help, "choices": choices, "at_least": at_least, "at_most": at_most, "above": above}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=limits)
    return field(default=default, metadata=limits)


Arguments = TypeVar("Arguments")


def parse(
    cls: type[Arguments], argv: list[str], description: str, config: str | None = None, unless: str = ""
) -> Arguments:
    """Command-line flags over an optional JSON file over the defaults.

    Args:
        config: the JSON file where none is named, unless the flag ``unless`` gives another value than its default.

    Raises:
        ArgumentError: an unknown name, a wrong type, or a value out of range.
        SystemExit: ``--help`` was asked for.
    """
    types_ = typing.get_type_hints(cls)
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=_HelpFormatter)
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # its own takes -5e-1 and -1,2 for flags
    parser.add_argument("config", nargs="?", help="a JSON file of the arguments below; flags override it")
    elsewhere = [f.name for f in dataclasses.fields(cls) if f.metadata["help"] == ELSEWHERE]
    if elsewhere:
        parser.epilog = "And, as PaddleNLP's Trainer documents them: " + ", ".join(elsewhere)
    in_files = [f.name for f in dataclasses.fields(cls) if f.metadata["help"] == IN_FILES]
    if in_files:
        parser.epilog += ". For PaddleNLP's files, without effect or refused: " + ", ".join(in_files)
        elsewhere += in_files
    for f in dataclasses.fields(cls):
        text = f.metadata["help"].replace("%", "%%") if f.name not in elsewhere else argparse.SUPPRESS
        default = _default(f) if f.name not in elsewhere else None
        if default is not None:
            text += f" (default: {default})"
        spellings = [f.name, *(other for other, name in _other_names(cls).items() if name == f.name)]
        names = list(dict.fromkeys(f"--{given}" for name in spellings for given in (name, name.replace("_", "-"))))
        choices = f.metadata["choices"]
        metavar = "{" + ",".join(map(str, choices)) + "}" if choices else _metavar(cls, f.name)
        # A flag alone is a yes.
        alone = {"nargs": "?", "const": "true"} if bool in _alternatives(types_[f.name]) else {}
        parser.add_argument(*names, dest=f.name, default=argparse.SUPPRESS, help=text, metavar=metavar, **alone)
    given, unknown = parser.parse_known_args(argv)
    # Where flags are unknown, what else is left over is taken for their values.
    flags = [text.split("=")[0] for text in unknown if re.match("--?[A-Za-z]", text)]
    _refuse(flags or unknown, cls)
    values = vars(given)
    path = values.pop("config")
    if path is None and values.get(unless) in (None, getattr(cls, unless, None)):
        path = config
    merged = _by_field(_read_json(path, cls), cls) if path is not None else {}
    for name in _TEMPLATES:
        if name in values:
            values[name] = values[name].replace("\\n", "\n")  # shells pass the two characters on
    merged |= {name: _from_text(name, text, types_[name]) for name, text in values.items()}
    arguments = build(cls, **merged)
    arguments.arguments_path = path
    return arguments


def build(cls: type[Arguments], **values) -> Arguments:
    """Keyword arguments as a checked dataclass. None for an argument that does not take None leaves the default.

    Raises:
        ArgumentError: an unknown name, a wrong type, or a value out of range.
    """
    values = _by_field(values, cls)
    known = {f.name for f in dataclasses.fields(cls)}
    _refuse([name for name in values if name not in known], cls)
    types_ = typing.get_type_hints(cls)
    arguments = cls(**{name: v for name, v in values.items() if v is not None or _takes_none(types_[name])})
    check(arguments)
    return arguments


def _other_names(cls: type) -> dict[str, str]:
    """Second names of arguments, which PaddleNLP's examples give them, and the arguments' own."""
    return getattr(cls, "OTHER_NAMES", {})


def _by_field(values: dict[str, Any], cls: type) -> dict[str, Any]:
    """The values by the arguments' own names.

    Raises:
        ArgumentError: an argument is given by both of its names.
    """
    others = _other_names(cls)
    for other, name in others.items():
        if values.get(other) is not None and values.get(name) is not None:
            raise ArgumentError(f"{other} and {name} are both given; they are one argument")
    own = {name: value for name, value in values.items() if name not in others}
    return own | {name: values[other] for other, name in others.items() if values.get(other) is not None}


def check(arguments) -> None:
    """Apply every field's type and limits, and the rules that tie fields together.

    Raises:
        ArgumentError: names the argument, the value and what was expected.
    """
    types_ = typing.get_type_hints(type(arguments))
    for f in dataclasses.fields(arguments):
        value = _checked_type(f.name, getattr(arguments, f.name), types_[f.name])
        setattr(arguments, f.name, value)
        for item in value if isinstance(value, list) else [value]:
            _check_limits(f, item)
    for name in _TEMPLATES:
        template = getattr(arguments, name, None)
        if template is not None and template.count("{text}") != 1:
            raise ArgumentError(f'{name} is {template!r}; expected exactly one "{{text}}" in it')
    if getattr(arguments, "template", None) is not None:
        for name in ("query_template", "passage_template"):
            if getattr(arguments, name) is not None:
                raise ArgumentError(f"template and {name} are both given; template already covers both sides")
    if hasattr(arguments, "check"):
        arguments.check()


def _check_limits(f: dataclasses.Field, value) -> None:
    limits = f.metadata
    if value is None or (type(value) is str and not limits["choices"]):
        return
    if limits["choices"] and value not in limits["choices"]:
        expected = ", ".join(map(repr, limits["choices"]))
        raise ArgumentError(f"{f.name} is {value!r}; expected one of {expected}{nearest(value, limits['choices'])}")
    low, high, above = limits["at_least"], limits["at_most"], limits["above"]
    if type(value) is int and abs(value) > _LARGEST_WHOLE:
        low = -_LARGEST_WHOLE if low is None and above is None else low
        high = _LARGEST_WHOLE if high is None else high
    too_low = (low is not None and value < low) or (above is not None and value <= above)
    if too_low or (high is not None and value > high):
        bounds = [f"at least {low}"] if low is not None else []
        bounds += [f"more than {above}"] if above is not None else []
        bounds += [f"at most {high}"] if high is not None else []
        raise ArgumentError(f"{f.name} is {_shown(value)}; expected {' and '.join(bounds)}")


def _shown(value) -> str:
    """A number, but not thousands of digits."""
    return repr(value) if abs(value) < 10**100 else "a number of more than 100 digits"


def _checked_type(name: str, value, hint) -> Any:
    """The value as its field's type, an int where a float is wanted and no other leniency."""
    options, words = _alternatives(hint), _words(hint)
    if value is None and _takes_none(hint):
        return None
    if type(value) is str and value in words:
        return value
    (wanted,) = [t for t in options if t is not type(None)]
    if isinstance(value, os.PathLike) and wanted is str:
        return os.fspath(value)
    if typing.get_origin(wanted) is list:
        (item,) = typing.get_args(wanted)
        if type(value) is str:
            return _parts_from_text(name, value, item)
        if isinstance(value, list | tuple) and not value and not _takes_none(hint):
            raise ArgumentError(f"{name} is an empty list; expected at least one {_type_name(item).removeprefix('a ')}")
        if isinstance(value, list | tuple):
            return [_checked_type(f"{name}[{i}]", v, item) for i, v in enumerate(value)]
        return [_checked_type(name, value, item)]
    kind = {int: numbers.Integral, float: numbers.Real}.get(wanted, ())
    if isinstance(value, kind) and not isinstance(value, bool):
        try:
            value = wanted(value)  # NumPy's scalars, and whole numbers where any number is wanted
        except OverflowError:
            raise ArgumentError(f"{name} is out of range; expected {_type_name(wanted)}") from None
    if type(value) is not wanted:
        others = "".join(f" or {word!r}" for word in words) + (" or null" if _takes_none(hint) else "")
        raise ArgumentError(f"{name} is {value!r}; expected {_type_name(wanted)}{others}")
    if wanted is float and not math.isfinite(value):
        raise ArgumentError(f"{name} is {value!r}; expected a finite number")
    if wanted is str:
        _check_text(name, value)
    return value


def _check_text(name: str, value: str) -> None:
    if not value:
        raise ArgumentError(f"{name} is an empty string; expected some text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ArgumentError(f"{name} is {value!r}; expected valid Unicode") from None
    if "\0" in value:
        raise ArgumentError(f"{name} is {value!r}; expected text without NUL")


def _from_text(name: str, text: str, hint) -> Any:
    """A command-line flag's text as its field's type."""
    options, words = _alternatives(hint), _words(hint)
    if text in words:
        return text
    if _takes_none(hint) and text.lower() in ("none", "null"):
        return None
    (wanted,) = [t for t in options if t is not type(None)]
    if typing.get_origin(wanted) is list:
        (item,) = typing.get_args(wanted)
        return _parts_from_text(name, text, item)
    if wanted is bool:
        if text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
            return False
    elif wanted in (int, float):
        try:
            return wanted(text)
        except ValueError:
            pass
    else:
        return text
    others = "".join(f" or {word!r}" for word in words)
    raise ArgumentError(f"{name} is {text!r}; expected {_type_name(wanted)}{others}")


def _parts_from_text(name: str, text: str, item) -> list:
    """A list that was given as one text, its items between commas."""
    return [_from_text(name, part.strip(), item) for part in text.split(",")]


def _read_json(path: str, cls: type) -> dict:
    if os.path.exists(path) and not os.path.isfile(path):
        raise ArgumentError(f"{path}: is no regular file; expected a JSON file of arguments")
    try:
        with open(path, encoding="utf-8-sig") as stream:
            values = json.load(stream, object_pairs_hook=lambda pairs: _each_once(pairs, path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; expected a JSON file of arguments") from None
    except OSError as error:
        raise type(error)(f"{path}: cannot be read: {error.strerror}; expected a JSON file of arguments") from None
    except UnicodeDecodeError:
        raise ArgumentError(f"{path}: not UTF-8; expected a JSON file of arguments") from None
    except json.JSONDecodeError as error:
        data = next((name for name in _DATA if name in {f.name for f in dataclasses.fields(cls)}), None)
        if error.msg == "Extra data" and data is not None:
            several = ", several files with commas between them" if data == "dataset_name_or_path" else ""
            raise ArgumentError(
                f"{path}: more than one JSON value, as in a file of rows; expected one JSON object of arguments. Rows"
                f" go into --{data}{several}"
            ) from None
        raise ArgumentError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ArgumentError(f"{path}: JSON nested too deeply; expected one flat JSON object") from None
    except ArgumentError:
        raise
    except ValueError:  # nothing else is left: Python reads no longer numbers
        digits = sys.get_int_max_str_digits()
        raise ArgumentError(f"{path}: holds a number of more than {digits:,} digits; expected a shorter one") from None
    if not isinstance(values, dict):
        raise ArgumentError(f"{path}: expected one JSON object of arguments")
    known = {f.name for f in dataclasses.fields(cls)} | _other_names(cls).keys()
    _refuse([name for name in values if name not in known], cls, f"{path}: ")
    return values


def _each_once(pairs: list[tuple[str, Any]], path: str) -> dict:
    """A JSON object, whose names Python would let be given twice."""
    values: dict = {}
    for name, value in pairs:
        if name in values:
            raise ArgumentError(f'{path}: "{name}" is given twice; expected it once')
        values[name] = value
    return values


def _alternatives(hint) -> tuple:
    """The types that a value may have, without the words that may stand in their place."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    return tuple(option for option in options if typing.get_origin(option) is not typing.Literal)


def _takes_none(hint) -> bool:
    return type(None) in _alternatives(hint)


def _words(hint) -> tuple[str, ...]:
    """The words that may stand in a number's place, such as ``auto``."""
    options = typing.get_args(hint)
    return tuple(
        w for option in options if typing.get_origin(option) is typing.Literal for w in typing.get_args(option)
    )


def _type_name(wanted: type) -> str:
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    return names[wanted]


def _metavar(cls: type, name: str) -> str:
    (wanted,) = [t for t in _alternatives(typing.get_type_hints(cls)[name]) if t is not type(None)]
    if typing.get_origin(wanted) is list:
        return "A,B,..."
    return {int: "N", float: "X", str: "TEXT", bool: "true|false"}[wanted]


def _default(f: dataclasses.Field):
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _refuse(unknown: Iterable[str], cls: type, where: str = "") -> None:
    """Raise for all unknown names in one line: of keywords, of JSON keys, or of flags with their dashes."""
    known = [f.name for f in dataclasses.fields(cls)]
    unknown = list(dict.fromkeys(unknown))
    parts = []
    for name in unknown[:_MOST_LISTED]:
        meant = meant_by(name, known)
        alone, among = (f"; {meant}", f" ({meant})") if meant else ("", "")
        shown = name if re.fullmatch("--?[A-Za-z][A-Za-z0-9_-]*", name) else repr(name)
        parts.append(shown + (alone if len(unknown) == 1 else among))
    if unknown:
        more = f" and {len(unknown) - _MOST_LISTED:,} more" if len(unknown) > _MOST_LISTED else ""
        raise ArgumentError(f"{where}unknown argument{'s' * (len(unknown) > 1)} {', '.join(parts)}{more}")


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # One spelling is enough in the help; --with-dashes is accepted silently.
        if action.option_strings[:1] and action.option_strings[0].startswith("--"):
            return f"{action.option_strings[0]} {action.metavar or ''}".strip()
        return super()._format_action_invocation(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ArgumentError(message)

    def format_usage(self) -> str:
        return f"usage: {self.prog} [config.json] [--name value ...]\n"

    def format_help(self) -> str:
        text = super().format_help()
        return self.format_usage() + text[text.index("\n\n") :]
