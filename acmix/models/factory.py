"""create_model: a network by its name, with errors that a person can act on."""

import difflib
import inspect
import re
from collections.abc import Callable
from typing import Any

import timm
from pydantic import PydanticUndefinedAnnotation, PydanticUserError, TypeAdapter, ValidationError
from timm.layers import to_2tuple
from torch import nn

from acmix.errors import UserError, one_line

# Arguments of timm's factory that read files or change what comes back: the config has its own key for weights, and a
# trainer needs a classifier.
_REFUSED = {
    "checkpoint_path": "name the weights file under model.checkpoint",
    "pretrained_cfg": "name the weights file under model.checkpoint",
    "pretrained_cfg_overlay": "name the weights file under model.checkpoint",
    "cache_dir": "set HF_HOME or TORCH_HOME instead",
    "device": "set run.device instead",
    "dtype": "set precision.amp instead",
    "features_only": "use timm.create_model in Python for feature maps",
}


def create_model(
    name: str, num_classes: int = 1000, *, image_size: tuple[int, int] | None = None, **kwargs: Any
) -> nn.Module:
    """Build a network of ours or of timm's, with new weights, or with timm's where `pretrained` is true.

    Args:
        name: Name in timm's registry, which holds ours and those of any file with timm's `register_model`.
        num_classes: Width of the classifier.
        image_size: (height, width) of the images. A network from outside timm that takes `img_size` is built for it;
            None leaves that to the network.
        kwargs: Arguments of the network (`model.kwargs` in a config). For a network from outside timm whose entry
            point names its class (`-> ACmixResNet`), they are checked against the constructor's annotations first.

    Raises:
        UserError: for an unknown name, an argument that the network does not take, a value it refuses, an `img_size`
            that is not `image_size`, or pretrained weights that cannot be had.
    """
    if not timm.is_model(name):
        known = {model.lower(): model for model in timm.list_models()}
        nearest = [known[word] for word in difflib.get_close_matches(name.lower(), known, n=3)]
        hint = f"did you mean {', '.join(nearest)}?" if nearest else "timm.list_models() in Python lists all names."
        own = "A model of your own is known once its file is imported: docs/EXTENDING.md"
        raise UserError(f"model.name: there is no model {name!r}; {hint} {own}")
    for key, way_out in _REFUSED.items():
        if key in kwargs:
            raise UserError(f"model.kwargs.{key} is not allowed: {way_out}")
    kwargs = {key: tuple(value) if isinstance(value, list) else value for key, value in kwargs.items()}
    network = _network(name)
    if network is not None and not network.__module__.startswith("timm."):  # timm takes more than it annotates
        _check_types(name, network, kwargs)
        kwargs |= _img_size(network, kwargs.get("img_size"), image_size)
    if kwargs.get("pretrained"):
        return _create_pretrained(name, num_classes, network, kwargs)
    return _create(name, num_classes, network, kwargs)


def _create(name: str, num_classes: int, network: type[nn.Module] | None, kwargs: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, num_classes=num_classes, **kwargs)
    except (TypeError, ValueError, RuntimeError, AssertionError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(_explain(name, network, error)) from error


def _create_pretrained(
    name: str, num_classes: int, network: type[nn.Module] | None, kwargs: dict[str, Any]
) -> nn.Module:
    """The network with timm's weights. Raises UserError saying where they were sought and how to do without."""
    if kwargs["pretrained"] is not True:
        raise UserError(f"model.kwargs.pretrained: {kwargs['pretrained']!r} must be true or false")
    if not timm.models.is_model_pretrained(name):
        raise UserError(
            f"model.kwargs.pretrained: No pretrained weights exist for {name}; leave it out to start with new weights, "
            "or give a file of weights as model.checkpoint=FILE"
        )
    try:
        return timm.create_model(name, num_classes=num_classes, **kwargs)
    except Exception as error:
        _create(name, num_classes, network, {**kwargs, "pretrained": False})  # other arguments may be at fault
        weights = timm.models.get_pretrained_cfg(name)
        assert weights is not None
        place = f"huggingface.co/{weights.hf_hub_id}" if weights.hf_hub_id else weights.url or weights.file
        raise UserError(
            f"model.kwargs.pretrained: the weights of {name} ({place}) cannot be loaded: {one_line(error)}. Download "
            "them on a machine that can, and give model.checkpoint=FILE in place of model.kwargs.pretrained"
        ) from error


def _img_size(network: type[nn.Module], given: Any, image_size: tuple[int, int] | None) -> dict[str, Any]:
    """The `img_size` of a network that takes one: that of the images. Raises UserError where another one is given."""
    if image_size is None or "img_size" not in inspect.signature(network).parameters:
        return {}
    if given is None:
        return {"img_size": image_size[0] if len(set(image_size)) == 1 else image_size}
    if to_2tuple(given) != image_size:
        raise UserError(
            f"model.kwargs.img_size: {given} is not data.image_size, {list(image_size)}; make them equal, or leave "
            "model.kwargs.img_size out: it is then that of the images"
        )
    return {}


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
