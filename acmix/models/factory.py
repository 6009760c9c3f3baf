"""create_model: a network by its name, with errors that a person can act on."""

import difflib
import inspect
import re
from collections.abc import Callable
from typing import Any

import timm
from pydantic import PydanticUndefinedAnnotation, PydanticUserError, TypeAdapter, ValidationError
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
        name: Name in timm's registry, which holds ours and those of any file with timm's `register_model`.
        num_classes: Width of the classifier.
        kwargs: Arguments of the network (`model.kwargs` in a config). For a network from outside timm whose entry
            point names its class (`-> ACmixResNet`), they are checked against the constructor's annotations first.

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
    network = _network(name)
    if network is not None and not network.__module__.startswith("timm."):  # timm takes more than it annotates
        _check_types(name, network, kwargs)
    try:
        return timm.create_model(name, num_classes=num_classes, **kwargs)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise UserError(_explain(name, network, error)) from error


def _network(name: str) -> type[nn.Module] | None:
    """The class that the entry point of `name` is annotated to return; None if it names none."""
    network = _signature(timm.models.model_entrypoint(name.split(".")[0])).return_annotation
    return network if isinstance(network, type) and issubclass(network, nn.Module) else None


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function or class; annotations that name what only a type checker imports stay strings."""
    try:
        return inspect.signature(function, eval_str=True)
    except NameError:
        return inspect.signature(function)


def _check_types(name: str, network: type[nn.Module], kwargs: dict[str, Any]) -> None:
    """Check the values against the annotations of the network's constructor; raises UserError."""
    parameters = _signature(network).parameters
    for key, value in kwargs.items():
        if key not in parameters or value is None:
            continue
        forms = (value, list(value)) if isinstance(value, tuple) else (value,)  # a list in YAML may stand for either
        refusals = [_type_refusal(parameters[key].annotation, form) for form in forms]
        if all(refusals):
            raise UserError(f"model.kwargs.{key}: {value!r} does not fit {name}: {refusals[0]}")


def _type_refusal(annotation: Any, value: Any) -> str | None:
    """Why a value is not of the annotated type; None if it is, or if pydantic does not know the type."""
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError as error:
        return error.errors()[0]["msg"]
    except (PydanticUserError, PydanticUndefinedAnnotation):
        return None
    return None


def _explain(name: str, network: type[nn.Module] | None, error: Exception) -> str:
    """What a failed construction means to the person who wrote model.kwargs."""
    match = re.match(r"(?:(\w+)\.)?\w+\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not match:
        return f"model.kwargs do not fit {name}: {error}"
    key, message = match[2], f"model.kwargs.{match[2]}: {name} takes no such argument"
    if network is None or match[1] not in [base.__name__ for base in network.__mro__]:
        return message
    known = [key for key in inspect.signature(network).parameters if key not in ("num_classes", "kwargs")]
    nearest = difflib.get_close_matches(key, known, n=1)
    return f"{message}; did you mean {nearest[0]}?" if nearest else f"{message}; it takes {', '.join(known)}"
