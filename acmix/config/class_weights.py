"""What `loss.class_weights` may hold: a word, a list, or a mapping of class names to weights."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

Weight = Annotated[float, Field(gt=0)]


def _kind(value: Any) -> str:
    return "mapping" if isinstance(value, dict) else "list" if isinstance(value, (list, tuple)) else "word"


ClassWeights = Annotated[
    Annotated[Literal["none", "balanced"], Tag("word")]
    | Annotated[tuple[Weight, ...], Field(strict=False), Tag("list")]
    | Annotated[dict[str, Weight], Tag("mapping")],
    Discriminator(_kind),
]
