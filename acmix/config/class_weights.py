"""What `loss.class_weights` may hold: a word, a list, or a mapping of class names to weights."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

# float32 holds the weights and their products with losses: none of them may become 0 or infinite there
Weight = Annotated[float, Field(ge=1e-30, le=1e30)]


def _kind(value: Any) -> str:
    return "mapping" if isinstance(value, dict) else "list" if isinstance(value, (list, tuple)) else "word"


ClassWeights = Annotated[
    Annotated[Literal["none", "balanced"], Tag("word")]
    | Annotated[tuple[Weight, ...], Field(strict=False), Tag("list")]
    | Annotated[dict[str, Weight], Tag("mapping")],
    Discriminator(_kind),
]
