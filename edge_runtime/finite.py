"""Numbers for JSON, which has no infinity and none that is not a number."""

from __future__ import annotations

import math
from typing import Any


def finite(value: Any) -> Any:
    """The same value, of dictionaries, lists and plain values, with None for such numbers."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: finite(each) for key, each in value.items()}
        case list() | tuple():
            return [finite(each) for each in value]
    return value
