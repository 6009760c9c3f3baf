"""`optimizer.kwargs` and `schedule.kwargs`: held against the signature of what takes them, before training."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from inspect import Parameter
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from acmix.config import OptimizerConfig, ScheduleConfig
from acmix.errors import UserError

_OWN_KEYS = {"opt": "name", "sched": "name", "num_epochs": "epochs"}
"""Arguments of timm's factories that have a key of another name in the config; the rest have the argument's name."""


def checked_kwargs(
    section: str, config: OptimizerConfig | ScheduleConfig, accepted: Mapping[str, Parameter]
) -> dict[str, Any]:
    """The section's `kwargs` as arguments for timm: JSON lists become tuples.

    Args:
        section: `optimizer` or `schedule`.
        config: that section of the config.
        accepted: the arguments that the optimizer or schedule `config.name` takes.

    Raises UserError naming the key path: for an argument that has a key of its own in the section, one that is not
    accepted (with the nearest one that is), and a value of the wrong type.
    """
    keys = type(config).model_fields
    for name, value in config.kwargs.items():
        path = f"{section}.kwargs.{name}"
        own = _OWN_KEYS.get(name, name)
        if own in keys:
            raise UserError(f"{path}: has a key of its own: {section}.{own}")
        if name not in accepted:
            nearest = get_close_matches(name, [key for key in accepted if key not in keys], n=1, cutoff=0.0)
            hint = f"; nearest valid key: {section}.kwargs.{nearest[0]}" if nearest else ""
            raise UserError(f"{path}: {config.name} takes no such argument{hint}")
        try:
            _adapter(accepted[name]).validate_json(json.dumps(value), strict=True)  # a JSON list may be any sequence
        except ValidationError as error:
            raise UserError(f"{path}: {value!r} does not fit {config.name}: {error.errors()[0]['msg']}") from None
    return {name: tuple(value) if isinstance(value, list) else value for name, value in config.kwargs.items()}


def _adapter(argument: Parameter) -> TypeAdapter[Any]:
    """What a value must be: the argument's annotation; without one, the kind of its default."""
    default = argument.default
    kind: Any = argument.annotation
    if kind is Parameter.empty:
        kind = bool if isinstance(default, bool) else float if isinstance(default, (int, float)) else Any
    return TypeAdapter(kind | None if default is None else kind, config=ConfigDict(arbitrary_types_allowed=True))
