"""Which tiny models grow in width with their function kept: one line per type, then the counts.

As a script: `python tests/conformance/widening.py [type ...]`.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter

from tiny import MODEL_TYPES, UNAVAILABLE, tiny_model

from loopwise.edit.axes import sizes_of
from loopwise.edit.width import Widen


def growths(old: dict[str, int]) -> dict[str, Widen]:
    """The operators that are tried on a model of these sizes."""
    found = {}
    if "hidden" in old:
        found |= {"hidden x2": Widen(hidden=2 * old["hidden"]), "hidden x1.5": Widen(hidden=3 * old["hidden"] // 2)}
    if "mlp" in old:
        found["mlp x1.5"] = Widen(mlp=3 * old["mlp"] // 2)
    if "heads" in old:
        found["heads x2"] = Widen(heads=2 * old["heads"])
    if "kv_heads" in old:
        found["groups x2"] = Widen(heads=2 * old["heads"], kv_heads=2 * old["kv_heads"])
    return found


def main(types: list[str]) -> None:
    """Try each type and print what happened."""
    warnings.simplefilter("ignore")
    kept, tried = Counter(), Counter()
    for model_type in types:
        model = tiny_model(model_type)
        for name, operator in growths(sizes_of(model)).items():
            tried[name] += 1
            try:
                print(f"{model_type}: {name} kept, {operator.edit(model).error:.0e}", flush=True)
                kept[name] += 1
            except ValueError as error:
                print(f"{model_type}: {name} refused: {error}", flush=True)
    for name, number in tried.items():
        print(f"{name}: {kept[name]} of {number}")


if __name__ == "__main__":
    main(sys.argv[1:] or [name for name in MODEL_TYPES if name not in UNAVAILABLE])
