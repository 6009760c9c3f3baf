"""How a config file is read and overridden from the command line."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from acmix.config.contradictions import contradictions
from acmix.config.errors import describe_errors, unknown_override
from acmix.config.kinds import is_path, is_text, path_keys, takes_null
from acmix.config.schema import Config
from acmix.config.yaml import Document, KeyPath, dotted, read_yaml
from acmix.errors import UserError
from acmix.paths import escape_path, expand_path

COMMAND_LINE = "command line"
_NULLS = ("", "null", "Null", "NULL", "~")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config and apply `KEY.PATH=VALUE` overrides.

    A VALUE for a key that takes text is that text, whatever YAML would make of it. Quotes around the whole of it may
    still be given, and `null` stands for null where the key takes it. Other values are read as YAML, but `#` begins no
    comment. Paths come back with `~` and `$VARIABLES` replaced.

    Raises UserError naming the file (or the command line), the line, the key path and what would be valid.
    """
    path = Path(expand_path(str(path), "--config"))
    source = str(path)
    document = read_yaml(read_text(path, "config"), source)
    values = {} if document.values is None else document.values
    if not isinstance(values, dict):
        raise UserError(f"{source}: a config is a mapping of sections, e.g. `model:` with `name: ...` below it")
    origins = {key_path: f"{source}:{line}" for key_path, line in document.lines.items()}
    config = _resolved(values, overrides, source, origins)
    if config.run.name is None:
        config = _with(config, "run", "name", path.stem.lstrip(".") or "config")
    return config


def data_config(root: str, overrides: Sequence[str] = ()) -> Config:
    """A config for a program that only reads data: the folder at `root`, unless the overrides say something else.

    Raises UserError as `load_config`.
    """
    data = {"dataset": "folder", "root": escape_path(root)}
    values = {"model": {"name": "none"}, "data": data, "schedule": {"epochs": 1}}
    return _resolved(values, overrides, COMMAND_LINE, {})


def as_override(key: str, value: Any) -> str:
    """The `KEY.PATH=VALUE` that sets a key to a value, written as a person would. Raises UserError where none does."""
    key_path: KeyPath = tuple(key.split("."))
    if problem := unknown_override(Config, key_path):
        raise UserError(problem)
    for text in [value] * isinstance(value, str) + [json.dumps(value, ensure_ascii=False)]:
        try:
            read = _read_value(text, key_path, key).values
        except UserError:
            continue
        if type(read) is type(value) and read == value:
            return f"{key}={text}"
    raise UserError(f"{key}: {value!r} is no value of this key; text that looks like a number needs quotes")


def _resolved(values: dict[str, Any], overrides: Sequence[str], source: str, origins: dict[KeyPath, str]) -> Config:
    for override in overrides:
        _apply_override(values, override, origins)
    config = _validate(values, source, origins)
    for section, key in path_keys(Config):
        if (text := getattr(getattr(config, section), key)) is not None:
            where = origins.get((section, key), source)
            config = _with(config, section, key, expand_path(text, f"{where}: {section}.{key}"))
    return config


def _with(config: Config, section: str, key: str, value: str) -> Config:
    changed = getattr(config, section).model_copy(update={key: value})
    return config.model_copy(update={section: changed})


def read_text(path: Path, kind: str, hint: Callable[[Path], str] = lambda _: "") -> str:
    """The text of a file that holds a `kind`. Raises UserError, which ends with the `hint` where there is no file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such {kind} file{hint(path)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _apply_override(values: dict[str, Any], override: str, origins: dict[KeyPath, str]) -> None:
    key, equals, text = override.partition("=")
    key_path: KeyPath = tuple(key.split("."))
    if not equals or not all(key_path):
        raise UserError(f"{COMMAND_LINE}: {override!r} is not of the form KEY.PATH=VALUE, e.g. optimizer.lr=0.1")
    if problem := unknown_override(Config, key_path):
        raise UserError(f"{COMMAND_LINE}: {problem}")
    given = [path for path, origin in origins.items() if origin == COMMAND_LINE and path[: len(key_path)] == key_path]
    if (deepest := max(given, key=len, default=key_path)) != key_path:
        raise UserError(f"{COMMAND_LINE}: {key}: would undo {dotted(deepest)}, given before it; give {key} first, once")
    if given:
        raise UserError(f"{COMMAND_LINE}: {key}: duplicate key; give it once")
    target: Any = values
    for part in key_path[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise UserError(f"{COMMAND_LINE}: {key}: {part} is not a mapping in the config file; set it as a whole")
    document = _read_value(text, key_path, f"{COMMAND_LINE}: {key}")
    target[key_path[-1]] = document.values
    for replaced in [path for path in origins if path[: len(key_path)] == key_path]:
        del origins[replaced]
    for depth in range(1, len(key_path)):
        origins.setdefault(key_path[:depth], COMMAND_LINE)
    origins.update({(*key_path, *below): COMMAND_LINE for below in [(), *document.lines]})


def _read_value(text: str, key_path: KeyPath, where: str) -> Document:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {text!r} is not text in UTF-8") from None
    section = Config.model_fields[str(key_path[0])].annotation
    annotation = section.model_fields[str(key_path[1])].annotation  # type: ignore[union-attr]
    if not is_text(annotation):
        document = read_yaml(text, where)
        return document if document.whole else Document(text)
    if text.startswith("!!"):  # a tag of YAML, which is refused or names the type of what follows
        return read_yaml(text, where)
    if takes_null(annotation) and text in _NULLS and not (text == "~" and is_path(annotation)):
        return Document(None)
    return Document(_unquoted(text))


def _unquoted(text: str) -> str:
    """The text without the quotes around the whole of it, if YAML reads it as quoted."""
    if len(text) < 2 or text[0] not in "\"'" or text[-1] != text[0]:
        return text
    try:
        document = read_yaml(text, COMMAND_LINE)
    except UserError:
        return text
    return document.values if document.whole and isinstance(document.values, str) else text


def _validate(values: dict[str, Any], source: str, origins: dict[KeyPath, str]) -> Config:
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(describe_errors(Config, error, source, origins)) from None
    problems = [
        f"{origins.get(key_path, source)}: {'.'.join(map(str, key_path))}: {text}"
        for key_path, text in contradictions(config)
    ]
    if problems:
        raise UserError("\n".join(problems))
    return config
