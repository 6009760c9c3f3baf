"""What a study file holds and how it is read: name, base, arms, seeds, reference, equal."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from acmix.config import as_override
from acmix.config.errors import describe_errors
from acmix.config.load import read_text
from acmix.config.schema import RunName, Text
from acmix.config.yaml import KeyPath, read_yaml
from acmix.errors import UserError
from acmix.paths import expand_path, missing_path_hint

Equal = Literal["epochs", "time", "multiply_adds", "parameters"]
OWN_KEYS = ("run.dir", "run.seed")
"""Keys that differ from run to run, which the study sets."""
_ARM = re.compile(r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]{0,199}")
_MAX_SEED = 2**63 - 1
_MAX_RUNS = 10_000


@dataclass(frozen=True)
class Study:
    """Arms × seeds of one config.

    name: of the study; base: the config that all arms share; arms: name → what it sets, as `KEY.PATH=VALUE`;
    seeds: values of run.seed; reference: the arm that the others are compared with; equal: what all arms get the same
    of (see `acmix.studies.budget`).
    """

    name: str
    base: Path
    arms: dict[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    reference: str
    equal: Equal

    def settings(self, arm: str, seed: int) -> tuple[str, ...]:
        """What an arm sets in the run of a seed, which `{seed}` in its values stands for."""
        return tuple(text.replace("{seed}", str(seed)) for text in self.arms[arm])


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: RunName = Field(examples=["mixes"])
    """Name of the study."""

    base: Text
    """Config that all arms share; a path from the folder of the study file."""

    arms: dict[str, JsonValue]
    """Name of each arm → the keys it sets, like {model.kwargs.mix: attention}; {} for the base as it is.

    `{seed}` in a value is the seed of the run: model.checkpoint: "weights/{seed}.safetensors".
    """

    seeds: JsonValue
    """How many seeds (0, 1, …), or a list of them."""

    reference: Text
    """The arm that the others are compared with."""

    equal: Equal = "epochs"
    """What all arms get the same of: epochs, time, multiply_adds or parameters."""


def load_study(path: Path) -> Study:
    """Read a study file. `base` is a path from the folder of the study file.

    Raises UserError naming the file, the line, the key and what would be valid.
    """
    document = read_yaml(read_text(path, "study", missing_path_hint), str(path))
    values = {} if document.values is None else document.values
    if not isinstance(values, dict):
        raise UserError(f"{path}: a study is a mapping of name, base, arms, seeds and reference")
    origins = {key_path: f"{path}:{line}" for key_path, line in document.lines.items()}
    try:
        file = _File.model_validate(values)
    except ValidationError as error:
        raise UserError(describe_errors(_File, error, str(path), origins)) from None
    study = Study(
        name=file.name,
        base=_base(path, file.base, origins),
        arms=_arms(file.arms, origins),
        seeds=_seeds(file.seeds, origins),
        reference=file.reference,
        equal=file.equal,
    )
    if study.reference not in study.arms:
        nearest = get_close_matches(study.reference, study.arms, n=1, cutoff=0.0)[0]
        message = f"there is no arm {study.reference!r}; nearest: {nearest} (all: {', '.join(study.arms)})"
        raise UserError(f"{origins['reference',]}: reference: {message}")
    return study


def _base(path: Path, base: str, origins: Mapping[KeyPath, str]) -> Path:
    where = f"{origins['base',]}: base"
    given = Path(expand_path(base, where))
    found = Path(os.path.normpath(path.parent / given))
    if found.is_file():
        return found
    hint = missing_path_hint(found)
    if given.is_file():
        hint = f"; write {os.path.relpath(given.resolve(), path.parent.resolve())}"
    raise UserError(f"{where}: there is no config {found}; it is a path from the folder of the study file{hint}")


def _arms(arms: Mapping[str, Any], origins: Mapping[KeyPath, str]) -> dict[str, tuple[str, ...]]:
    if not arms:
        raise UserError(f"{origins['arms',]}: arms: there are none; name at least one, like {{learned: {{}}}}")
    checked: dict[str, tuple[str, ...]] = {}
    for name, settings in arms.items():
        where = f"{origins['arms', name]}: arms.{name}"
        if not _ARM.fullmatch(name):
            raise UserError(f"{where}: the name becomes that of a folder: no slash in it, no point at its start")
        if not isinstance(settings, dict):
            example = f"{name}: {{model.kwargs.mix: attention}}"
            raise UserError(f"{where}: must be a mapping of keys to values, like {example}; {{}} for the base as it is")
        checked[name] = tuple(_override(key, value, where) for key, value in settings.items())
        if problem := overlapping(checked[name]):
            raise UserError(f"{where}: {problem}")
    return checked


def _override(key: str, value: Any, where: str) -> str:
    if key in OWN_KEYS:
        raise UserError(f"{where}: {key} is set by the study")
    try:
        return as_override(key, value)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def overlapping(overrides: Sequence[str], others: Sequence[str] | None = None) -> str | None:
    """Which two overrides set the same key, or one a part of what the other sets; None if none do.

    With `others`, which may be none at all, only pairs of one of each are looked at.
    """
    keys = [override.partition("=")[0] for override in overrides]
    if others is None:
        pairs = [(a, b) for i, a in enumerate(keys) for b in keys[:i]]
    else:
        pairs = [(a, b) for a in keys for b in (other.partition("=")[0] for other in others)]
    for a, b in pairs:
        if f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}."):
            return f"{b} and {a} set the same" if a != b else f"{a} is set twice"
    return None


def _seeds(seeds: Any, origins: Mapping[KeyPath, str]) -> tuple[int, ...]:
    if type(seeds) is int and 1 <= seeds <= _MAX_RUNS:
        return tuple(range(seeds))
    listed = seeds if isinstance(seeds, list) else []
    if all(type(seed) is int and 0 <= seed <= _MAX_SEED for seed in listed) and 1 <= len(set(listed)) == len(listed):
        return tuple(listed)
    raise UserError(
        f"{origins['seeds',]}: seeds: must be their number, such as 3 for the seeds 0, 1 and 2, or a list of different "
        f"integers from 0 on; got {seeds!r}"
    )
