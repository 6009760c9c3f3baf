"""create_model: a network by its name, with errors that a person can act on."""

import difflib
import inspect
import re
import sys
from typing import Any

import timm
from pydantic import TypeAdapter, ValidationError
from torch import nn

from acmix.errors import UserError

# Arguments of timm's factory that read files or change what comes back: the config has its own key for weights, and a
# trainer needs a classifier.
_REFUSED = {
    "checkpoint_path": "name the weights file under model.checkpoint",
    "pretrained_cfg": "name the weights file under model.checkpoint",
    "pretrained_cfg_overlay": "name the weights file under model.checkpoint",
    "cache_dir": "set HF_HOME or TORCH_HOME instead",
    "features_only": "use timm.create_model in Python for feature maps",
}


def create_model(name: str, num_classes: int = 1000, **kwargs: Any) -> nn.Module:
    """Build a network of ours or of timm's, with new weights.

    Args:
        name: Name in timm's registry, which holds ours once `models` is imported.
        num_classes: Width of the classifier.
        kwargs: Arguments of the network (`model.kwargs` in a config).

    Raises:
        UserError: for an unknown name, an argument that the network does not take, or a value it refuses.
    """
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(nearest)}?" if nearest else "timm.list_models() in Python lists all names"
        raise UserError(f"model.name: there is no model {name!r}; {hint}")
    for key, way_out in _REFUSED.items():
        if key in kwargs:
            raise UserError(f"model.kwargs.{key} is not allowed: {way_out}")
    kwargs = {key: tuple(value) if isinstance(value, list) else value for key, value in kwargs.items()}
    if name.startswith("acmix_"):
        _check_types(name, kwargs)
    try:
        return timm.create_model(name, num_classes=num_classes, **kwargs)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise UserError(_explain(name, error)) from error


def _network(name: str, class_name: str | None = None) -> type | None:
    """The class named `class_name`, or the only ACmix network, in the file that registers `name`."""
    file = sys.modules[timm.models.model_entrypoint(name.split(".")[0]).__module__]
    if class_name is not None:
        return getattr(file, class_name, None)
    return next(value for key, value in vars(file).items() if key.startswith("ACmix") and key != "ACmix")


def _check_types(name: str, kwargs: dict[str, Any]) -> None:
    """Hold the values against the annotations of our own networks."""
    network = _network(name)
    assert network is not None
    parameters = inspect.signature(network).parameters
    for key, value in kwargs.items():
        if key not in parameters or value is None:
            continue
        try:
            TypeAdapter(parameters[key].annotation).validate_python(value, strict=True)
        except ValidationError as error:
            wanted = error.errors()[0]["msg"]
            raise UserError(f"model.kwargs.{key}: {value!r} does not fit {name}: {wanted}") from error


def _explain(name: str, error: Exception) -> str:
    """What a failed construction means to the person who wrote model.kwargs."""
    match = re.match(r"(?:(\w+)\.)?\w+\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not match:
        return f"model.kwargs do not fit {name}: {error}"
    key, message = match[2], f"model.kwargs.{match[2]}: {name} takes no such argument"
    network = _network(name, match[1]) if match[1] else None
    if network is None:
        return message
    known = [key for key in inspect.signature(network).parameters if key not in ("num_classes", "kwargs")]
    nearest = difflib.get_close_matches(key, known, n=1)
    return f"{message}; did you mean {nearest[0]}?" if nearest else f"{message}; it takes {', '.join(known)}"
