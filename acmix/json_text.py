"""JSON that every reader takes: it has no nan and no inf, so they stand in it as strings. A leaf without torch."""

import json
import math
from collections.abc import Mapping
from typing import Any


def json_text(value: Any, *, indent: int | None = None) -> str:
    """The value as JSON, made `plain` first."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)


def plain(value: Any) -> Any:
    """A value in JSON's own types; a float that is not finite becomes "nan", "inf" or "-inf"."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "item"):  # tensors and numpy scalars
        return plain(value.item())
    return str(value)
