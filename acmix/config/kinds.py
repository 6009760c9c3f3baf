"""What kind of value a key takes, read off its annotation: text, a path, null."""

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticCustomError


class _IsPath:
    """Marks a text as a path: `~` and variables in it are replaced."""


IS_PATH = _IsPath()


def without_nul(path: str) -> str:
    """The path; an error of pydantic where no file system could hold it."""
    if "\0" in path:
        raise PydanticCustomError("nul_in_path", "must not hold the character NUL, which no path may")
    return path


def is_text(annotation: Any) -> bool:
    """Whether the values are text (or null), so that what is written needs no interpretation."""
    kinds = [kind for kind in _alternatives(annotation) if kind is not type(None)]
    return all(kind is str or (get_origin(kind) is Literal and _all_text(get_args(kind))) for kind in kinds)


def is_path(annotation: Any) -> bool:
    """Whether the values are paths."""
    return any(isinstance(part, _IsPath) for part in _marks(annotation))


def takes_null(annotation: Any) -> bool:
    """Whether null is a value of the key."""
    return type(None) in _alternatives(annotation)


def path_keys(schema: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Section and key of every path."""
    for section, info in schema.model_fields.items():
        for key, field in getattr(info.annotation, "model_fields", {}).items():
            if is_path(field.annotation) or any(isinstance(mark, _IsPath) for mark in field.metadata):
                yield section, key


def _alternatives(annotation: Any) -> list[Any]:
    """The types of a union without their marks; the type itself if it is none."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) is Literal or not _is_union(annotation):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _alternatives(part)]


def _marks(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return list(get_args(annotation)[1:]) + _marks(get_args(annotation)[0])
    return [mark for part in get_args(annotation) for mark in _marks(part)] if _is_union(annotation) else []


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType)


def _all_text(values: tuple[Any, ...]) -> bool:
    return all(isinstance(value, str) for value in values)
