"""Weights made for other images, as timm makes them fit a network: other channels, another size; what does not fit."""

import sys
import warnings
from collections.abc import Mapping

from timm.models import adapt_input_conv
from torch import Tensor, nn

_SHOWN = 3
_POSITIONS = ("relative_position_bias_table", "pos_embed")


def fit_channels(model: nn.Module, weights: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights whose first convolution takes the model's number of channels: summed for one, repeated for more.

    A warning on stderr names `source` where this changes something.
    """
    fitted, own = dict(weights), model.state_dict()
    for key in (f"{name}.weight" for name in _first_convolutions(model)):
        if key not in weights or key not in own or not weights[key].dim() == own[key].dim() == 4:
            continue
        before, channels = weights[key].shape[1], own[key].shape[1]
        if {before, channels} == {1, 3}:
            fitted[key] = adapt_input_conv(channels, weights[key], base_chans=before)
            print(
                f"warning: {source}: its first convolution is for images of {before} channel{'s' * (before > 1)}; "
                f"adapted to {channels}",
                file=sys.stderr,
            )
    return fitted


def fit_positions(model: nn.Module, weights: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights whose tables of positions have the model's shapes.

    A warning on stderr names `source` where this changes something. Raises ValueError as `interpolated_positions`.
    """
    interpolated = interpolated_positions(model, weights)
    if interpolated:
        print(
            f"warning: {source}: {len(interpolated)} of its tables of positions are for another size of image; "
            "interpolated",
            file=sys.stderr,
        )
    return weights | interpolated


def interpolated_positions(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tables of positions among the weights that have another shape than the model's, interpolated to it, by name.

    That is done by the `checkpoint_filter_fn` of the model's family, timm's name for what a family's file does to
    weights before they are loaded; a family without one gives none. Raises ValueError for a table that cannot be
    interpolated.
    """
    own = model.state_dict()
    others = [
        name
        for name, value in weights.items()
        if name.endswith(_POSITIONS) and name in own and own[name].shape != value.shape
    ]
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if not others or convert is None:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how timm indexes
        converted = convert(dict(weights), model)
    return {name: converted[name] for name in others if name in converted}


def load_fitting(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights strictly. Raises ValueError with the first that do not fit the model, and how many do not."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        misfits = _misfits(model.state_dict(), weights)
        if not misfits:
            raise
        more = f"; … {len(misfits)} in all" if len(misfits) > _SHOWN else ""
        raise ValueError("; ".join(misfits[:_SHOWN]) + more) from error


def _misfits(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """What is of another shape, missing or unknown, in the order of the network."""
    found = []
    for name, value in own.items():
        if name not in weights:
            found.append(f"{name} is missing")
        elif weights[name].shape != value.shape:
            found.append(f"{name} is {list(weights[name].shape)}, in the network {list(value.shape)}")
    return found + [f"{name} is not in the network" for name in weights if name not in own]


def _first_convolutions(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that see the image, from timm's description of the model; else its first convolution."""
    described = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv")
    if described:
        return (described,) if isinstance(described, str) else tuple(described)
    return tuple(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))[:1]
