"""What the Auto classes of transformers see of a looped model.

`LoopedForCausalLM` is a door, not a model: its `from_pretrained` returns an instance of the base model's own class,
attached.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from loopwise.models.attach import attach
from loopwise.models.hub import align, find_file
from loopwise.models.wrapper import COMPONENTS, COMPONENTS_FILE, LoopwiseConfig, component_names
from loopwise.plan.plans import Plan

_PLACE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


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
        if config.components:
            add_components(model, config.components)
            load_components(model, source, **{name: kwargs[name] for name in _PLACE if name in kwargs})
        return (model, info) if want_info else model

    @classmethod
    def _from_config(cls, config: LoopwiseConfig, **kwargs: Any) -> Any:
        base = config.base()
        model = _model_class(config, base)._from_config(base, **kwargs)
        attach(model, config.plan, cache=config.cache, on_deeper=config.on_deeper)
        return add_components(model, config.components or {})


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


def add_components(model: Any, components: dict[str, Any]) -> Any:
    """Add to an attached model what its configuration names; with first values, where nothing is loaded into it."""
    for name, spec in components.items():
        COMPONENTS[name](model, spec)
    return model


def load_components(model: Any, source: str | Path, **place: Any) -> None:
    """Fill what was added to a model from the file of a checkpoint.

    Raises:
        ValueError: the file is missing or no tensor file, or a tensor is missing or of another shape.
    """
    path = find_file(source, COMPONENTS_FILE, **place)
    if path is None:
        raise ValueError(f"{source} has no {COMPONENTS_FILE}, in which the tensors of its components are")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    own = model.state_dict()
    names = component_names(model)
    for name in sorted(set(names) ^ set(tensors)):
        which = "lacks tensor" if name in own else "has a tensor that fits nothing,"
        raise ValueError(f"{path} {which} {name}")
    for name in names:
        if tensors[name].shape != own[name].shape:
            raise ValueError(f"{path}: tensor {name} is {list(tensors[name].shape)}, expected {list(own[name].shape)}")
        own[name].copy_(tensors[name])


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
