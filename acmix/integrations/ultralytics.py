"""`ACmix` as a module of ultralytics' YAML model files.

    from acmix.integrations.ultralytics import register

    register()
    YOLO("my-yolo11n.yaml")  # with rows such as  - [-1, 1, ACmix, [256]]

What a row may say, in place of [256]:

    []                                              as many channels as come in
    [c2]                                            channels that go out, scaled by the model's width
    [c1, c2]                                        the same; c1 is what the parser knows anyway
    [c2, kernel_att, heads, kernel_conv, stride]    as far as one likes, dilation last; c1 may stand before these too

A second number that is odd is a window, for a window has a centre; one that is even is a number of channels.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from acmix.errors import MissingPackageError, UserError
from acmix.layers import ACmix as Block

TESTED = ("8.0.200", "8.4.190")  # the oldest and the newest version that the tests were run with
NAME, SAME = "ACmix", "ACmixSameChannels"  # in YAML files; what an empty row becomes

Parser = Callable[..., tuple[nn.Module, list[int]]]


def register() -> None:
    """Let YAML model files of ultralytics name `ACmix`, in this process; further calls change nothing.

    Models that are built then hold ordinary `acmix.ACmix` blocks, which a checkpoint of theirs names, so that loading
    one needs acmix installed and no call of this function.

    Raises:
        MissingPackageError: if ultralytics is not installed.
        UserError: for a version whose parser counts channels in another way.
    """
    try:
        from ultralytics.nn import tasks
    except ModuleNotFoundError as error:
        raise MissingPackageError(f"{error.name} is not installed; pip install ultralytics", name=error.name) from None
    if isinstance(getattr(tasks, NAME, None), _Row):
        return
    parse: Parser = tasks.parse_model
    like_c2f = type(NAME, (_ScaledRow,), {"__module__": __name__, "like": tasks.C2f})
    ours: dict[str, Any] = {NAME: like_c2f, SAME: _SameRow, "parse_model": _with_plain_rows(parse)}
    before = {name: vars(tasks)[name] for name in ours if name in vars(tasks)}
    vars(tasks).update(ours)
    try:
        refusal = _refusal(tasks.parse_model)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        refusal = f"{type(error).__name__}: {error}"
    if refusal is not None:
        for name in ours.keys() - before.keys():
            delattr(tasks, name)
        vars(tasks).update(before)
        raise UserError(
            f"ultralytics {_version()} reads model files in a way that ACmix does not fit into ({refusal}); "
            f"versions from {TESTED[0]} to {TESTED[1]} were tested"
        )


def _with_plain_rows(parse: Parser) -> Parser:
    """The parser, which is given every ACmix row in one spelling."""

    @functools.wraps(parse)
    def parse_model(d: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[nn.Module, list[int]]:
        rows = {part: [_plain(row) for row in d[part]] for part in ("backbone", "head")}
        return parse({**d, **rows}, *args, **kwargs)

    return parse_model


def _plain(row: Sequence[Any]) -> Sequence[Any]:
    """An ACmix row as [from, number, name, [c2, ...]], or for no arguments as one that asks for the channels."""
    source, number, name, arguments = row
    if name != NAME:
        return row
    if not arguments:
        # the parser replaces the names of its variables: the channels of all layers so far, and `source`
        return [source, number, SAME, ["ch", "f"]]
    if not all(isinstance(value, int) for value in arguments) or len(arguments) > 7:
        raise UserError(
            f"ACmix: {list(arguments)} must be up to seven whole numbers; see acmix.integrations.ultralytics"
        )
    has_inputs = len(arguments) > 1 and arguments[1] % 2 == 0
    return [source, number, NAME, list(arguments[has_inputs:])]


class _Row(type):
    """Classes that the parser calls for a row of a model file, to get the module that goes into the model.

    The parser decides by membership in sets of its own modules whether it passes (c1, c2, repeats), scaled. A class
    of this type with an attribute `like` is equal to that module, and so a member wherever that is.
    """

    like: type | None = None

    def __eq__(cls, other: object) -> bool:
        return other is cls or (other is not None and other is cls.like)

    def __hash__(cls) -> int:
        return type.__hash__(cls) if cls.like is None else hash(cls.like)


class _ScaledRow(nn.Module, metaclass=_Row):
    """A row that names its channels; a call gives the block itself, or several."""

    def __new__(  # type: ignore[misc]
        cls,
        c1: int,
        c2: int,
        repeats: int = 1,
        kernel_att: int = 7,
        heads: int = 4,
        kernel_conv: int = 3,
        stride: int = 1,
        dilation: int = 1,
    ) -> nn.Module:
        heads = _heads(heads, c2)
        blocks = [
            Block(c2 if index else c1, c2, heads, kernel_att, kernel_conv, 1 if index else stride, dilation)
            for index in range(repeats)
        ]
        return blocks[0] if repeats == 1 else nn.Sequential(*blocks)


class _SameRow(nn.Module, metaclass=_Row):
    """A row without arguments: as many channels go out as come in."""

    def __new__(cls, channels: Sequence[int], source: int) -> nn.Module:  # type: ignore[misc]
        return Block(channels[source], channels[source], _heads(4, channels[source]))


@functools.cache
def _heads(wanted: int, channels: int) -> int:
    """The largest number of heads up to `wanted` that divides the channels; what is not wanted is said once."""
    heads = next(n for n in range(max(wanted, 1), 0, -1) if channels % n == 0)
    if heads != wanted:
        from ultralytics.utils import LOGGER

        LOGGER.warning(f"ACmix: {wanted} heads do not divide {channels} channels, taking {heads}")
    return heads


def _refusal(parse: Parser) -> str | None:
    """What is wrong with a small model of every kind of row as this parser builds it; None if it is right."""
    rows = [[-1, 1, "Conv", [32, 3, 2]], [-1, 1, NAME, [64, 3, 2, 3, 2]], [-1, 2, NAME, [48, 96]], [-3, 1, NAME, []]]
    model, _ = parse({"nc": 1, "width_multiple": 0.5, "backbone": rows, "head": []}, ch=3, verbose=False)
    _, strided, repeated, same = model.children()
    found = [
        (block.in_channels, block.out_channels, block.stride) if isinstance(block, Block) else None
        for block in (strided, *repeated.children(), same)
    ]
    wanted = [(16, 32, 2), (32, 48, 1), (48, 48, 1), (16, 16, 1)]
    return None if found == wanted else f"channels and strides {found} where {wanted} were expected"


def _version() -> str:
    import ultralytics

    return str(ultralytics.__version__)
