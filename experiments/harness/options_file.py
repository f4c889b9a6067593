"""Options from a TOML file, whose keys are the options' names."""

from __future__ import annotations

import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

T = TypeVar("T")
SIMPLE = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    Path: "a path as a string",
}


def read_file(path: Path, kind: type) -> dict[str, Any]:
    """Read the values of options from a file.

    Args:
        path: a TOML file without tables. Lists are what has commas on the command line.
        kind: the dataclass of the options.

    Returns:
        The values by the options' names, as the dataclass wants them.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no TOML, a name is not that of an option, or a value has the wrong type.
    """
    try:
        given = tomllib.loads(path.read_text())
    except ValueError as error:  # of tomllib, or the text is not UTF-8
        raise ValueError(f"{path} must be a TOML file: {error}") from None
    hints, values = _hints_of(kind), {}
    for name, value in given.items():
        if name not in hints:
            raise ValueError(f"{path}: {name!r} must be one of the options {', '.join(sorted(hints))}")
        try:
            values[name] = _converted(hints[name], value)
        except ValueError as error:
            raise ValueError(f"{path}: {name} {error}, got {value!r}") from None
    return values


def with_values(kind: type[T], base: T | None, values: dict[str, Any]) -> T:
    """Return an instance with these values by option name.

    Args:
        kind: a dataclass of options.
        base: what holds all other values; by default the dataclass's defaults, and `tyro.MISSING` if it has none.
        values: by the options' names.
    """
    own, hints = {}, get_type_hints(kind, include_extras=True)
    plain = get_type_hints(kind)
    for field in fields(kind):  # type: ignore[arg-type]
        if base is not None:
            current = getattr(base, field.name)
        elif callable(field.default_factory):
            current = field.default_factory()
        else:
            current = tyro.MISSING if field.default is field.default_factory else field.default
        if is_dataclass(plain[field.name]):
            current = with_values(plain[field.name], current, values)
        own[field.name] = values.get(_option_name(field.name, hints[field.name]), current)
    return kind(**own)


def _hints_of(kind: type) -> dict[str, Any]:
    """Return the types of all options by name; those of nested dataclasses are on the same level."""
    found: dict[str, Any] = {}
    hints, plain = get_type_hints(kind, include_extras=True), get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(plain[field.name]):
            found |= _hints_of(plain[field.name])
        else:
            found[_option_name(field.name, hints[field.name])] = hints[field.name]
    return found


def _option_name(field_name: str, hint: Any) -> str:
    """Return the name that `tyro.conf.arg` gives the option, if it gives one."""
    given = [name for one in get_args(hint)[1:] if isinstance(name := getattr(one, "name", None), str)]
    return (given or [field_name])[0].replace("_", "-")


def _converted(hint: Any, value: Any) -> Any:
    """Return a value of TOML as a value of this type. Raise ValueError, with what it must be, if it is none."""
    if get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
        for spec in notes:
            if isinstance(spec, PrimitiveConstructorSpec):
                parts = value if isinstance(value, list) else [value]
                if not parts or not all(type(part) in (int, str) for part in parts):
                    raise ValueError("must be a list")
                return spec.instance_from_str([",".join(map(str, parts))])
    if get_origin(hint) in (Union, UnionType):
        [hint] = [one for one in get_args(hint) if one is not NoneType]
        return _converted(hint, value)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"must be one of {', '.join(map(repr, get_args(hint)))}")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ValueError("must be a list")
        return tuple(_converted(get_args(hint)[0], part) for part in value)
    if hint is Path and isinstance(value, str) and value:
        return Path(value)
    if type(value) is hint or (hint is float and type(value) is int):
        return hint(value)
    raise ValueError(f"must be {SIMPLE[hint]}")
