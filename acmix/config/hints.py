"""What a refused value was probably meant to be: `yes` for true, `0,5` for 0.5, `cuda:0` for cuda."""

import json
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from acmix.config.kinds import takes_null

_NULL_WORDS = ("none", "null", "nil", "~", "undefined")
_BOOLEANS = {"yes": True, "on": True, "y": True, "true": True, "1": True,
             "no": False, "off": False, "n": False, "false": False, "0": False}  # fmt: skip
_SCALES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "%": 0.01}
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)(e[-+]?\d+)?", re.ASCII)
_DEVICES = {
    "mps": "Apple's GPU is not supported: use cpu",
    "gpu": "write cuda",
    "xpu": "only CUDA devices are supported: use cpu",
    "tpu": "only CUDA devices are supported: use cpu",
}


def hint(path: Sequence[str | int], kind: str, given: object, info: FieldInfo) -> str:
    """A clause that begins with "; " and says what to write instead; empty if that cannot be told.

    Args:
        path: the key path.
        kind: pydantic's name of the error.
        given: the value refused.
        info: the field of the key.
    """
    text = _suggestion(path, kind, given, info)
    return f"; {text}" if text else ""


def _suggestion(path: Sequence[str | int], kind: str, given: object, info: FieldInfo) -> str:
    if given is None:
        return "" if info.is_required() else "remove the key to keep its default"
    if kind == "string_type":
        return f"write it in quotes: {json.dumps(_plain(given))}" if isinstance(given, (bool, int, float)) else ""
    if (
        len(path) == 2
        and isinstance(given, str)
        and given.strip().lower() in _NULL_WORDS
        and takes_null(info.annotation)
    ):
        return "write null"
    if kind == "literal_error":
        return _device(str(given)) if tuple(path) == ("run", "device") else _choice(given, info.annotation)
    if kind == "bool_type":
        meant = _BOOLEANS.get(str(given).strip().lower())
        return "" if meant is None else f"write {json.dumps(meant)}"
    if kind in ("int_type", "float_type"):
        return _number(given, whole=kind == "int_type")
    if kind == "tuple_type" and isinstance(given, str):
        return f"write {_list(given)}"
    if kind in ("dict_type", "model_type", "model_attributes_type"):
        return "write {KEY: VALUE}"
    return ""


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _device(given: str) -> str:
    name, _, index = given.strip().lower().partition(":")
    if name in ("cuda", "gpu") and index.isdigit():
        return f"choose the GPU with the environment variable CUDA_VISIBLE_DEVICES={index} and write cuda"
    if name.isdigit():
        return f"choose the GPU with the environment variable CUDA_VISIBLE_DEVICES={name} and write cuda"
    return _DEVICES.get(name) or (f"write {name}" if name in ("auto", "cpu", "cuda") else "")


def _choice(given: object, annotation: Any) -> str:
    """The choice that looks most like the value; for None and false the one that turns the thing off."""
    choices = [choice for choice in get_args(annotation) if isinstance(choice, str)]
    if get_origin(annotation) is not Literal:
        choices = [choice for part in get_args(annotation) for choice in get_args(part) if isinstance(choice, str)]
    word = _plain(given).strip().lower()
    if word in ("null", "false", "no", "off", "") and "none" in choices:
        return "write none"
    nearest = get_close_matches(word, choices, n=1)
    return f"write {nearest[0]}" if nearest else ""


def _number(given: object, *, whole: bool) -> str:
    """The number behind thousands separators, a decimal comma, a unit or quotes."""
    if isinstance(given, float) and whole:
        return f"write {int(given)}" if given.is_integer() else ""
    if not isinstance(given, str):
        return ""
    if not whole and _NUMBER.fullmatch(given.lower()):
        return "write it without quotes"
    value = _read_number(given, whole=whole)
    if value is None or (whole and not float(value).is_integer()):
        return ""
    return f"write {int(value) if whole else format(value, 'g')}"


def _read_number(text: str, *, whole: bool) -> float | None:
    text = text.partition(" #")[0].strip().lower().replace("_", "").replace("\N{NO-BREAK SPACE}", "")
    scale = text[-1:] if text[-1:] in _SCALES else ""
    text = text.removesuffix(scale)
    if whole and re.fullmatch(r"\d{1,3}([, ]\d{3})+", text, re.ASCII):
        text = re.sub("[, ]", "", text)
    elif not whole and re.fullmatch(r"[-+]?\d*,\d+", text, re.ASCII):
        text = text.replace(",", ".")
    return float(text) * _SCALES[scale] if _NUMBER.fullmatch(text) else None


def _list(given: str) -> str:
    """A list as YAML has it, of what is separated by commas or spaces."""
    parts = [part for part in re.split(r"[,;\s]+", given.strip(" ()[]{}")) if part]
    return f"[{', '.join(parts)}]"
