"""Settings that stand once: default, bounds, choices and help text of a dataclass field, for commands and checks alike.

@dataclass(frozen=True)
class Union:
    radius: int = setting(30, "r of FAF, pixels", least=0)

check_settings(self)                      # in __post_init__: type, bounds, choices
add_options(parser, Union, "radius")      # --radius with its help text and default
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, field, fields, replace
from typing import Any, ClassVar, Self

from hmg_gpu.common.errors import InputError

META = "hmg_gpu"  # key of a field's metadata


def setting(
    default: Any,
    text: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] | Callable[[], Sequence[str]] = (),
    words: Sequence[str | None] = (),
    names: Sequence[str] | None = None,
) -> Any:
    """A dataclass field that knows what it may be.

    Args:
        default: decides the type: bool, int, float, str, or a tuple of int or of float.
        text: for --help.
        least, most: bounds, included. above, below: bounds, excluded.
        choices: the only values of a str, or a function that gives them.
        words: values that are no number but allowed as well, such as "auto" or None; the type is then int.
        names: of a tuple's numbers, for --help. A single float stands for all of a tuple's.
    """
    about = {"text": text, "least": least, "most": most, "above": above, "below": below}
    about |= {"choices": choices, "words": tuple(words), "names": names}
    return field(default=default, metadata={META: about})


def like(settings: type, name: str) -> Any:
    """A dataclass field with the default, bounds and text of another class's."""
    entry = next(entry for entry in fields(settings) if entry.name == name)
    return field(default=entry.default, metadata=entry.metadata)


class Configured:
    """What a maker and a rule have in common: a name, and settings that can be listed and changed."""

    name: ClassVar[str]  # on the command line

    def settings(self) -> dict[str, Any]:
        """Its settings by name."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if META in entry.metadata}

    def change(self, name: str, value: Any) -> Self:
        """The same with another value of a setting.

        Raises:
            InputError: there is no such setting (the text lists those there are), or not with such a value.
        """
        known = self.settings()
        if name not in known:
            raise InputError(f"{self.name} has no setting {name}; it has {', '.join(known) or 'none'}")
        return replace(self, **{name: value})

    def __str__(self) -> str:
        return ", ".join([self.name, *(f"{name} {value}" for name, value in self.settings().items())])


def check_settings(values: Any) -> None:
    """Check every :func:`setting` of a dataclass instance; a whole number in a float's place becomes a float.

    Raises:
        InputError: a value of another type or out of its range; the text names it and what was expected.
    """
    for entry in fields(values):
        if META not in entry.metadata:
            continue
        value, about = getattr(values, entry.name), entry.metadata[META]
        if value in about["words"] and (value is None or isinstance(value, str)):
            continue
        kind = int if about["words"] else type(entry.default)
        if kind is float and type(value) is int:
            value = float(value)
            object.__setattr__(values, entry.name, value)  # the class may be frozen
        if kind is tuple and type(entry.default[0]) is float:
            value = _numbers(entry.name, value, len(entry.default))
            object.__setattr__(values, entry.name, value)
        if type(value) is not kind:
            more = "".join(f", {word}" for word in about["words"] if word is not None)
            raise InputError(f"{entry.name} = {value!r}: expected {kind.__name__}{more}, got {type(value).__name__}")
        allowed = choices_of(entry)
        if allowed and value not in allowed:
            raise InputError(f"{entry.name} = {value!r}: expected one of {', '.join(allowed)}")
        for number in value if kind is tuple else [value] if kind in (int, float) else ():
            if type(number) in (int, float):  # a tuple of int is its class's to check
                _check_number(entry.name, number, about)


def _numbers(name: str, value: Any, count: int) -> tuple[float, ...]:
    """One number, or a list of one or of so many, as a tuple."""
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    if len(numbers) not in (1, count) or not all(type(number) in (int, float) for number in numbers):
        raise InputError(f"{name} = {value!r}: expected one number, or one for each of {count}")
    return tuple(map(float, numbers * (count // len(numbers))))


def _check_number(name: str, value: float, about: Mapping[str, Any]) -> None:
    least, most, above, below = (about[key] for key in ("least", "most", "above", "below"))
    low = f"at least {least}" if least is not None else f"above {above}" if above is not None else ""
    high = f"at most {most}" if most is not None else f"below {below}" if below is not None else ""
    good = isinstance(value, int) or math.isfinite(value)
    good &= (least is None or value >= least) and (above is None or value > above)
    good &= (most is None or value <= most) and (below is None or value < below)
    if not good:
        expected = f"a number from {least} to {most}" if least is not None and most is not None else ""
        expected = expected or " and ".join(part for part in (low, high) if part) or "a finite number"
        raise InputError(f"{name} = {value}: expected {expected}")


def choices_of(entry: Field) -> tuple[str, ...]:
    """The only values that a field may have; empty where there are others."""
    choices = entry.metadata[META]["choices"]
    return tuple(choices() if callable(choices) else choices)


def add_options(
    parser: argparse.ArgumentParser,
    settings: type,
    *names: str,
    defaults: Mapping[str, Any] | None = None,
    unset: bool = False,
) -> None:
    """Add an option for fields of a dataclass: --half-width for ``half_width``.

    Args:
        settings: the dataclass.
        names: fields; none: all that are a :func:`setting`.
        defaults: other defaults than the class's.
        unset: leave what is not given as None, so that a caller knows what was.
    """
    for entry in fields(settings):
        if META not in entry.metadata or (names and entry.name not in names):
            continue
        about, default = entry.metadata[META], (defaults or {}).get(entry.name, entry.default)
        flag, allowed = "--" + entry.name.replace("_", "-"), choices_of(entry)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = about["text"].replace("%", "%%") + (f" (default: {shown})" if shown not in (None, False) else "")
        if isinstance(entry.default, bool):
            parser.add_argument(flag, action="store_const", const=True, default=None if unset else default, help=text)
            continue
        more: dict[str, Any] = {"default": None if unset else default, "help": text}
        if isinstance(entry.default, tuple):
            counts = "+" if type(entry.default[0]) is float else len(entry.default)
            more |= {"type": _parser_of(entry), "nargs": counts, "metavar": tuple(about["names"])}
        elif about["words"]:
            more |= {"type": _parser_of(entry), "metavar": "N"}
        elif allowed:
            more |= {"choices": allowed}
        else:
            more |= {"type": _parser_of(entry)}
        parser.add_argument(flag, **more)


def parse_value(entry: Field, text: str) -> Any:
    """A field's value from text, as on the command line.

    Raises:
        InputError: the text is no such value.
    """
    if entry.metadata[META]["words"]:
        convert: Callable[[str], Any] = _number_or(entry.metadata[META]["words"])
    elif isinstance(entry.default, bool):
        convert = {"true": True, "false": False}.__getitem__
    else:
        convert = type(entry.default) if entry.default is not None else str
    try:
        return convert(text)
    except (ValueError, KeyError, argparse.ArgumentTypeError):
        raise InputError(f"{entry.name} = {text!r}: expected {_kind(entry)}") from None


def _kind(entry: Field) -> str:
    if entry.metadata[META]["words"]:
        return " or ".join(["a whole number", *(word for word in entry.metadata[META]["words"] if word)])
    kinds = {bool: "true or false", int: "a whole number", float: "a number"}
    return kinds.get(type(entry.default), "text")


def _number_or(words: Sequence[str | None]) -> Callable[[str], int | str]:
    def convert(text: str) -> int | str:
        if text in words:
            return text
        if not text.isdecimal():
            others = "".join(f" or {word}" for word in words if word)
            raise argparse.ArgumentTypeError(f"expected a whole number{others}, got {text!r}")
        return int(text)

    return convert


def _parser_of(entry: Field) -> Callable[[str], Any]:
    """Converts an option's text and checks its bounds, so that argparse names the option."""
    about = entry.metadata[META]
    default = entry.default[0] if isinstance(entry.default, tuple) else entry.default
    kind = _number_or(about["words"]) if about["words"] else type(default)

    def convert(text: str) -> Any:
        value = kind(text)
        if isinstance(value, (int, float)):
            try:
                _check_number(entry.name, value, about)
            except InputError as error:
                raise argparse.ArgumentTypeError(str(error).partition(": ")[2] + f", got {text!r}") from None
        return value

    convert.__name__ = kind.__name__  # argparse: "invalid int value"
    return convert
