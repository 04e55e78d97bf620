"""What the Auto classes of transformers see of a looped model.

`LoopedForCausalLM` is a door, not a model: its `from_pretrained` returns an instance of the base model's own class,
attached.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from loopwise.models.attach import attach
from loopwise.models.hub import align
from loopwise.models.wrapper import LoopwiseConfig
from loopwise.plan.plans import Plan


class LoopedForCausalLM:
    """The door through which the Auto classes load looped models."""

    config_class = LoopwiseConfig

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Part of the contract of the Auto classes; nothing to do."""

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *args: Any, config: LoopwiseConfig | None = None, **kwargs: Any
    ) -> Any:
        """Load a saved looped model; arguments are those of the base model's `from_pretrained`.

        Raises:
            ValueError: the tensors do not fit the configuration, or the plan does not fit the layers.
        """
        if config is None:
            config = LoopwiseConfig.from_pretrained(source)
        kwargs.pop("trust_remote_code", None)
        want_info = kwargs.pop("output_loading_info", False)
        base = config.base()
        kind = _model_class(config, base)
        model, info = kind.from_pretrained(source, *args, config=base, output_loading_info=True, **kwargs)
        refuse_missing(info, str(source))
        align(model)
        attach(model, config.plan, cache=config.cache, on_deeper=config.on_deeper)
        return (model, info) if want_info else model

    @classmethod
    def _from_config(cls, config: LoopwiseConfig, **kwargs: Any) -> Any:
        base = config.base()
        model = _model_class(config, base)._from_config(base, **kwargs)
        return attach(model, config.plan, cache=config.cache, on_deeper=config.on_deeper)


def register() -> None:
    """Tell the Auto classes of transformers about type "loopwise"; safe to call again."""
    AutoConfig.register(LoopwiseConfig.model_type, LoopwiseConfig, exist_ok=True)
    AutoModelForCausalLM.register(LoopwiseConfig, LoopedForCausalLM, exist_ok=True)


def refuse_missing(info: dict[str, Any], source: str) -> None:
    """Raise `ValueError` when a checkpoint lacks tensors, which transformers would fill with random numbers."""
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise ValueError(
            f"{source} does not fit its configuration: tensor {missing[0]} is missing ({len(missing)} in all)"
        )


def _model_class(config: LoopwiseConfig, base: Any) -> Any:
    Plan.parse(config.plan)
    names = config.base_config.get("architectures") or [] if config.base_config else []
    kind = getattr(transformers, str(names[0]), None) if names else None
    if kind is None or not hasattr(kind, "from_pretrained"):
        try:
            kind = AutoModelForCausalLM._model_mapping[type(base)]
        except KeyError:
            raise ValueError(f"no causal language model is known for base type {base.model_type!r}") from None
    return kind[0] if isinstance(kind, tuple) else kind
