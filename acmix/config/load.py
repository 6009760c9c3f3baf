"""How a config file is read and overridden from the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from acmix.config.contradictions import contradictions
from acmix.config.errors import describe_errors, unknown_override
from acmix.config.schema import Config
from acmix.config.yaml import KeyPath, read_yaml
from acmix.errors import UserError

COMMAND_LINE = "command line"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config and apply `KEY.PATH=VALUE` overrides, whose values are read as YAML too.

    Raises UserError naming the file (or the command line), the line, the key path and what would be valid.
    """
    source = str(path)
    document = read_yaml(_read_text(Path(path)), source)
    values = {} if document.values is None else document.values
    if not isinstance(values, dict):
        raise UserError(f"{source}: a config is a mapping of sections, e.g. `model:` with `name: ...` below it")
    origins = {key_path: f"{source}:{line}" for key_path, line in document.lines.items()}
    for override in overrides:
        _apply_override(values, override, origins)
    config = _validate(values, source, origins)
    if config.run.name is None:
        name = Path(path).stem.lstrip(".") or "config"
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    return config


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
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
    if origins.get(key_path) == COMMAND_LINE:
        raise UserError(f"{COMMAND_LINE}: {key}: duplicate key; give it once")
    target: Any = values
    for part in key_path[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise UserError(f"{COMMAND_LINE}: {key}: {part} is not a mapping in the config file; set it as a whole")
    document = read_yaml(text, f"{COMMAND_LINE}: {key}")
    target[key_path[-1]] = document.values
    for replaced in [path for path in origins if path[: len(key_path)] == key_path]:
        del origins[replaced]
    for depth in range(1, len(key_path)):
        origins.setdefault(key_path[:depth], COMMAND_LINE)
    origins.update({(*key_path, *below): COMMAND_LINE for below in [(), *document.lines]})


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
