"""Arrays as JSON, which has no NaN."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def as_lists(array: Any, digits: int = 6) -> Any:
    """Nested lists of an array, or one number, with so many significant digits; what is not finite becomes None."""
    values = np.asarray(array)
    if values.ndim:
        return [as_lists(item, digits) for item in values]
    value = values.item()
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value
