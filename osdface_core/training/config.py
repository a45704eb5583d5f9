"""Configurations: YAML read into dataclasses. An unknown key or a value of the wrong type is an
error that names it.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..errors import OSDFaceError

Config = TypeVar("Config")


def read_config(kind: type[Config], path: Path, changes: Sequence[str] = ()) -> Config:
    """The configuration in the file `path`, as the dataclass `kind`.

    changes: such as "run.steps=1000", made to it.

    Raises OSDFaceError for a file that cannot be read, an unknown or missing key, or a value of the
    wrong type.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        for change in changes:
            name, equals, value = change.partition("=")
            if not equals:
                raise OSDFaceError(
                    f"`{change}` changes nothing: write key=value, such as run.steps=1000."
                )
            *folders, last = name.split(".")
            place = tree
            for folder in folders:
                place = place.setdefault(folder, {})
            place[last] = yaml.safe_load(value)
    except (OSError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise OSDFaceError(
            f"{path} cannot be read as a configuration ({' '.join(str(error).split())}): give a "
            f"YAML file."
        ) from error
    return typing.cast(Config, _made(kind, tree, ""))


def written(config: Any) -> str:
    """The configuration as YAML that `read_config` reads."""
    return yaml.safe_dump(_plain(config), sort_keys=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {
            field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _made(kind: Any, value: Any, where: str) -> Any:
    """The value, read from YAML, as the type `kind`.

    kind: a dataclass, tuple[X, ...], tuple[X, Y], dict, X | None, Literal, Path, bool, int, float
        or str.
    where: its key, for errors.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return (
            None
            if value is None
            else _made(next(a for a in arguments if a is not types.NoneType), value, where)
        )
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        fields = {field.name: field for field in dataclasses.fields(kind)}
        for key in value:
            if key not in fields:
                place = f"`{where}`" if where else "the configuration"
                raise OSDFaceError(
                    f"The key `{key}` in {place} is unknown; known are {', '.join(fields)}: "
                    f"correct the spelling."
                )
        nothing = dataclasses.MISSING
        for name, field in fields.items():
            if name not in value and field.default is nothing and field.default_factory is nothing:
                raise OSDFaceError(
                    f"`{f'{where}.{name}'.strip('.')}` is missing from the configuration: give it "
                    f"a value."
                )
        return kind(
            **{key: _made(hints[key], v, f"{where}.{key}".strip(".")) for key, v in value.items()}
        )  # type: ignore[operator]
    if origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is Ellipsis:
            return tuple(_made(arguments[0], v, f"{where}.{i}") for i, v in enumerate(value))
        if len(value) == len(arguments):
            return tuple(
                _made(a, v, f"{where}.{i}")
                for i, (a, v) in enumerate(zip(arguments, value, strict=True))
            )
    if origin is typing.Literal:
        # YAML reads the word no as False.
        word = "no" if value is False else value
        if word in arguments:
            return word
    if origin is dict and isinstance(value, dict):
        return {key: _made(arguments[1], v, f"{where}.{key}") for key, v in value.items()}
    if kind is Any or (kind in (bool, int, str) and type(value) is kind):
        return value
    if kind is Path and isinstance(value, str):
        return Path(value).expanduser()
    if kind is float and not isinstance(value, bool):
        try:
            # YAML reads 1e-4 as a string.
            return float(value)
        except (TypeError, ValueError):
            pass
    wanted = (
        " or ".join(map(str, arguments))
        if origin is typing.Literal
        else getattr(kind, "__name__", str(kind))
    )
    raise OSDFaceError(f"`{where}` is {value!r}; {wanted} is wanted: correct the value.")
