"""Turns a config that does not fit the schema into messages a person can act on."""

from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from acmix.config.hints import hint
from acmix.config.yaml import KeyPath, dotted

_SYNONYMS = {
    "lr": ("learning_rate",),
    "weight_decay": ("wd",),
    "num_workers": ("workers",),
    "epochs": ("num_epochs", "max_epochs"),
    "dir": ("output_dir",),
    "optimizer": ("optim",),
    "schedule": ("scheduler",),
    "augment": ("augmentation", "aug"),
}
_EXPECTED = {
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "model_attributes_type": "must be a mapping of keys to values",
    "tuple_type": "must be a list",
    "too_long": "has too many entries",
    "too_short": "has too few entries",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "string_too_long": "is too long",
    "string_pattern_mismatch": "does not have the form {pattern}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
}
_KINDS = {str: "a string", bool: "a boolean", int: "an integer", float: "a number", list: "a list", dict: "a mapping"}


def schema_keys(schema: type[BaseModel]) -> Iterator[KeyPath]:
    """Every valid key path: sections first, then `section.key`."""
    sections = {name: info.annotation for name, info in schema.model_fields.items()}
    for name in sections:
        yield (name,)
    for name, section in sections.items():
        for key in getattr(section, "model_fields", ()):
            yield (name, key)


def nearest_key(schema: type[BaseModel], path: KeyPath) -> str:
    """The valid key path most similar to an unknown one; keys of the same section are preferred."""

    def likeness(candidate: KeyPath) -> float:
        words = (str(candidate[-1]), *_SYNONYMS.get(str(candidate[-1]), ()))
        best = max(SequenceMatcher(None, str(path[-1]).lower(), word).ratio() for word in words)
        return best + 0.2 * (len(candidate) == len(path) and candidate[:-1] == path[:-1])

    return dotted(max(schema_keys(schema), key=likeness))


def unknown_override(schema: type[BaseModel], path: KeyPath) -> str | None:
    """Why a `KEY.PATH` of the command line does not exist in the schema; None if it does."""
    keys = set(schema_keys(schema))
    if len(path) == 1 and path in keys:
        example = dotted(next(key for key in schema_keys(schema) if key[:-1] == path))
        return f"{path[0]} is a section: set its keys one by one, like {example}"
    if path[:2] in keys and (len(path) == 2 or path[1] == "kwargs"):
        return None
    unknown = path[:1] if path[:1] not in keys else path[:2]
    if unknown in keys:
        return f"{dotted(path)}: unknown key, {dotted(unknown)} has no keys below it"
    nearest = nearest_key(schema, unknown)
    if len(unknown) == 1 and len(path) > 1 and (nearest, path[1]) in keys:
        nearest = dotted((nearest, path[1]))
    return f"{dotted(path)}: unknown key; nearest valid key: {nearest}"


def describe_errors(
    schema: type[BaseModel], error: ValidationError, source: str, origins: Mapping[KeyPath, str]
) -> str:
    """One line per error: where the value was given, the key path, what is wrong, what would be right.

    `origins` maps each key path to where it was given: `FILE:LINE` or `command line`.
    """
    lines = []
    items = error.errors(include_url=False)
    inner = {item["loc"][:-1] for item in items}  # "too short" says nothing new where an entry is wrong
    for item in (item for item in items if item["loc"] not in inner):
        path = _written_path(item["loc"], origins)
        where = next((origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origins), source)
        lines.append(f"{where}: {dotted(path)}: {_complaint(schema, path, item)}")
    return "\n".join(dict.fromkeys(lines))


def _written_path(loc: tuple[str | int, ...], origins: Mapping[KeyPath, str]) -> KeyPath:
    path: KeyPath = loc[:2]
    if path[1:] != ("kwargs",):
        return (*path, *(part for part in loc[2:] if isinstance(part, int)))  # the rest names a member of a union
    for part in loc[2:]:  # pydantic puts the names of its own types between the keys here
        path = (*path, part) if (*path, part) in origins else path
    return path


def _complaint(schema: type[BaseModel], path: KeyPath, item: Any) -> str:
    kind, given, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key; nearest valid key: {nearest_key(schema, path)}"
    if kind == "missing" and isinstance(path[-1], int):
        return f"is missing; {dotted(path[:-1])} has too few entries"
    if kind == "missing":
        return f"is required: {_description(_field(schema, path))}"
    if kind == "literal_error":
        expected = context["expected"].replace(" or ", ", ")
        return f"must be one of {expected}, got {_shown(given)}{hint(path, kind, given, _field(schema, path))}"
    info = _field(schema, path)
    if kind == "string_pattern_mismatch" and info.examples:
        expected = f"is not of a valid form, like {info.examples[0]}"
    else:
        expected = _EXPECTED.get(kind, item["msg"]).format(**context)
    return f"{expected}, got {_shown(given)}{hint(path, kind, given, info)}"


def _field(schema: type[BaseModel], path: KeyPath) -> FieldInfo:
    info = schema.model_fields[str(path[0])]
    if len(path) > 1:
        assert info.annotation is not None
        info = info.annotation.model_fields[str(path[1])]  # type: ignore[attr-defined]
    return info


def _description(info: FieldInfo) -> str | None:
    """What a key is for: the docstring below it, of a section that of its class."""
    return info.description or getattr(info.annotation, "__doc__", None)


def _shown(value: object) -> str:
    if value is None:
        return "null"
    text = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    return f"{text} ({_KINDS.get(type(value), type(value).__name__)})"
