"""What keys that describe images may hold: their size, and the mean and standard deviation of their channels."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Side = Annotated[int, Field(ge=1, le=65535)]


def _side_or_pair(value: Any) -> str:
    return "pair" if isinstance(value, (list, tuple)) else "side"


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _one_or_three(values: tuple[float, ...]) -> tuple[float, ...]:
    if len(values) == 2:
        raise PydanticCustomError("one_or_three", "must be one number, or one for each of R, G and B")
    return values


ImageSize = Annotated[
    Annotated[Side, Tag("side")] | Annotated[tuple[Side, Side], Field(strict=False), Tag("pair")],
    Discriminator(_side_or_pair),
]
_FEW = Field(strict=False, min_length=1, max_length=3)
Mean = Annotated[
    tuple[Probability, ...],
    _FEW,
    BeforeValidator(_listed, json_schema_input_type=Probability | Annotated[tuple[Probability, ...], _FEW]),
    AfterValidator(_one_or_three),
]
Std = Annotated[
    tuple[Share, ...],
    _FEW,
    BeforeValidator(_listed, json_schema_input_type=Share | Annotated[tuple[Share, ...], _FEW]),
    AfterValidator(_one_or_three),
]
