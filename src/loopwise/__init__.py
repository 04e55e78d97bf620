"""loopwise: a decoder is layers plus a plan.

Names are resolved on first use (PEP 562), so that `import loopwise` and `loopwise --help` load neither torch nor
transformers; registration with the Auto classes of transformers happens on the first `load`, `attach` or `save`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loopwise.checkpoints.loading import load
    from loopwise.models.attach import attach, detach, plan_of, set_cache, set_loops, use_loops
    from loopwise.models.realise import materialize
    from loopwise.models.saving import load_tokenizer, save
    from loopwise.plan import Plan, PlanError

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "PlanError",
    "attach",
    "detach",
    "load",
    "load_tokenizer",
    "materialize",
    "plan_of",
    "save",
    "set_cache",
    "set_loops",
    "use_loops",
]

_HOME = {
    "Plan": "loopwise.plan",
    "PlanError": "loopwise.plan",
    "attach": "loopwise.models.attach",
    "detach": "loopwise.models.attach",
    "load": "loopwise.checkpoints.loading",
    "load_tokenizer": "loopwise.models.saving",
    "materialize": "loopwise.models.realise",
    "plan_of": "loopwise.models.attach",
    "save": "loopwise.models.saving",
    "set_cache": "loopwise.models.attach",
    "set_loops": "loopwise.models.attach",
    "use_loops": "loopwise.models.attach",
}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'loopwise' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
