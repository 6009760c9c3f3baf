"""YAML as config files need it: plain data only, every key once, and each key's line kept for messages.

Differences from PyYAML's safe loader: numbers, booleans and nulls follow YAML 1.2 (`5e-4` is a number,
`yes` and `on` are strings), duplicate keys are errors, and tags, anchors and merge keys are refused.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.composer import ComposerError

from acmix.errors import UserError

KeyPath = tuple[str | int, ...]

_MAX_BYTES = 1 << 20
_CORE = "tag:yaml.org,2002:"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_SCALARS: tuple[tuple[str, str, str], ...] = (  # tag, pattern, first characters (YAML 1.2 core schema)
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
)


@dataclass
class Document:
    """The values of one YAML text, the line (from 1) on which each key path begins, and whether they are all of it.

    whole: False where the text has more than the values: a comment, or a marker of a document.
    """

    values: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)
    whole: bool = True


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own attribute)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None):  # on aliases too; both let a small file expand without bound
            message = "anchors and aliases are not supported; write the values out"
            raise ComposerError(None, None, message, event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 would read as something else."""


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _starts = [*_first, ""] if _tag == "null" else list(_first)
        _class.add_implicit_resolver(_CORE + _tag, re.compile(f"(?:{_pattern})$"), _starts)


def dotted(path: KeyPath) -> str:
    """The key path as written on the command line: `model.kwargs.stem`."""
    return ".".join(str(part) for part in path)


def read_yaml(text: str, source: str) -> Document:
    """Parse one YAML document of plain data.

    `source` is the name used in messages. Raises UserError naming source, line and, where there is one,
    the key path.
    """
    if len(text) > _MAX_BYTES:
        raise UserError(f"{source}: {len(text)} characters is too long for a config (limit {_MAX_BYTES})")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        document = Document(None)
        if node is not None:
            document.values = _value(node, (), source, document.lines)
        written = "" if node is None else text[node.start_mark.index : node.end_mark.index]
        document.whole = written.strip() == text.strip()
        return document
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{source}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{source}: nested too deeply") from None


def write_yaml(values: Any) -> str:
    """YAML text that `read_yaml`, and any YAML 1.1 reader, reads back as exactly `values`."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _value(node: yaml.Node, path: KeyPath, source: str, lines: dict[KeyPath, int]) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode) and node.tag == _CORE + "map":
        return _mapping(node, path, source, lines)
    if isinstance(node, yaml.SequenceNode) and node.tag == _CORE + "seq":
        return [_value(item, (*path, i), source, lines) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, path, source)
    raise _refused_tag(node, path, source)


def _mapping(node: yaml.MappingNode, path: KeyPath, source: str, lines: dict[KeyPath, int]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        where = f"{source}:{line}: "
        key = _value(key_node, (), source, {})
        if not isinstance(key, str):
            raise UserError(f"{where}the key {key!r} in {dotted(path) or 'the top level'} must be a string")
        key_path = (*path, key)
        if key == "<<" and key_node.style is None:
            raise UserError(f"{where}{dotted(key_path)}: merge keys are not supported; write the keys out")
        if key in values:
            first = lines[key_path]
            raise UserError(f"{where}{dotted(key_path)}: duplicate key, first given on line {first}; keep one of them")
        lines[key_path] = line
        values[key] = _value(value_node, key_path, source, lines)
    return values


def _scalar(node: yaml.ScalarNode, path: KeyPath, source: str) -> str | int | float | bool | None:
    text, tag = node.value, node.tag.removeprefix(_CORE)
    if tag == "str":
        return text
    pattern = next((pattern for name, pattern, _ in _SCALARS if name == tag), None)
    if pattern is None:
        raise _refused_tag(node, path, source)
    if not re.fullmatch(pattern, text):
        raise UserError(f"{source}:{node.start_mark.line + 1}: {dotted(path)}: {text!r} is not a YAML {tag}")
    if tag == "null":
        return None
    if tag == "bool":
        return text.lower() == "true"
    if tag == "int":
        return _integer(text, f"{source}:{node.start_mark.line + 1}: {dotted(path)}")
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _integer(text: str, where: str) -> int:
    if text.startswith(("0o", "0x")):
        return int(text[2:], 8 if text[1] == "o" else 16)
    if len(text) > 100:
        raise UserError(f"{where}: an integer of {len(text)} digits is out of range")
    return int(text)


def _refused_tag(node: yaml.Node, path: KeyPath, source: str) -> UserError:
    where = f"{source}:{node.start_mark.line + 1}: {dotted(path)}".rstrip(": ")
    tag = node.tag.replace(_CORE, "!!")
    return UserError(f"{where}: the tag {tag} is refused: a config holds plain data only, nothing that names code")


def read_arguments(settings: Sequence[str]) -> dict[str, Any]:
    """The arguments that a command line gives a network as KEY=VALUE, values as in YAML.

    Raises UserError for another form, and for a key given twice.
    """
    arguments: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"{setting!r} is not of the form KEY=VALUE, such as mix=attention")
        if key in arguments:
            raise UserError(f"{key}: given twice")
        arguments[key] = read_yaml(text, key).values
    return arguments
