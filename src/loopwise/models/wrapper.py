"""What a looped model is on disk.

The base model's own tensors, a configuration of type "loopwise" that wraps the base configuration and the plan, and a
file with the tensors of what was added to the model, where anything was; `save_pretrained` of an attached model writes
this form.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from loopwise.io.atomic import write_text
from loopwise.models.playing import looping_of

CODE_FILE = "modeling_loopwise.py"
COMPONENTS_FILE = "components.safetensors"
# By the name of a component, what adds it to an attached model from its JSON form. The rooms that have them fill this;
# a file of code that comes with a checkpoint has none.
COMPONENTS: dict[str, Callable[[PreTrainedModel, Any], Any]] = {}
AUTO_MAP = {
    "AutoConfig": "modeling_loopwise.LoopwiseConfig",
    "AutoModelForCausalLM": "modeling_loopwise.LoopedForCausalLM",
}


class LoopwiseConfig(PreTrainedConfig):
    """A base configuration and what loopwise adds to it.

    Attributes:
        base_config: the base model's configuration as a dictionary, with its `model_type`.
        plan: plan text.
        cache: cache policy, see `loopwise.attach`.
        on_deeper: "refuse" or "catch_up".
        components: what was added to the model by name, in JSON form: "relaxation" (offsets per visit, see
            `RelaxationConfig`) and "loops" (as in `LoopwiseDecoderConfig.loops`).
    """

    model_type = "loopwise"

    base_config: dict | None = None
    plan: str = ""
    cache: str = "own"
    on_deeper: str = "refuse"
    components: dict | None = None

    def base(self) -> Any:
        """The base configuration as an object.

        Raises:
            ValueError: it is missing, of an unknown type, or there are components that this version does not know.
        """
        if not isinstance(self.base_config, dict) or not isinstance(self.base_config.get("model_type"), str):
            raise ValueError("config.json is of type loopwise but holds no base_config with a model_type")
        names = self.components if isinstance(self.components, (dict, list)) else [self.components]
        if self.components and not (isinstance(names, dict) and names.keys() <= COMPONENTS.keys()):
            raise ValueError(
                f"config.json has components that this version does not know: {', '.join(map(str, names))}"
            )
        values = dict(self.base_config)
        return AutoConfig.for_model(values.pop("model_type"), **values)


class SavePretrained:
    """`save_pretrained` of an attached model: what its class writes, with the configuration wrapped."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def __call__(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write tensors and the wrapped configuration into a folder; arguments as in transformers."""
        added = component_names(self.model)
        state = kwargs.get("state_dict")
        if added:
            state = dict(self.model.state_dict() if state is None else state)
            own = {
                name: tensor.detach().contiguous() for name in added if (tensor := state.pop(name, None)) is not None
            }
            kwargs["state_dict"] = state
            if kwargs.get("is_main_process", True):
                Path(save_directory).mkdir(parents=True, exist_ok=True)
                save_file(own, Path(save_directory) / COMPONENTS_FILE, {"format": "pt"})
        type(self.model).save_pretrained(self.model, save_directory, **kwargs)
        path = Path(save_directory) / "config.json"
        looping = looping_of(self.model)
        if looping is None or not path.exists():
            return
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("model_type") == LoopwiseConfig.model_type:
            return
        write_text(path, json.dumps(wrap_config(values, looping), indent=2) + "\n")
        if not __name__.startswith("loopwise."):
            shutil.copyfile(__file__, Path(save_directory) / CODE_FILE)


def component_names(model: PreTrainedModel) -> list[str]:
    """Names of the tensors of what was added to a model."""
    found = [name for name, module in model.named_modules() if getattr(module, "is_component", False)]
    return [f"{name}.{rest}" for name in found for rest in model.get_submodule(name).state_dict()]


def remove_components(model: nn.Module) -> None:
    """Take away what was added to a model."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if getattr(child, "is_component", False):
                del module._modules[name]
        forward: Any = module.__dict__.get("forward")
        if getattr(forward, "is_component", False):
            forward.remove()


def wrap_config(base: dict[str, Any], looping: Any) -> dict[str, Any]:
    """The JSON object of a looped model's config.json from that of its base."""
    policy = looping.policy
    wrapped = {
        "model_type": LoopwiseConfig.model_type,
        "architectures": ["LoopedForCausalLM"],
        "plan": str(looping.plan),
        "cache": str(policy),
        "on_deeper": policy.on_deeper,
        "components": looping.components,
        "base_config": base,
        "transformers_version": transformers.__version__,
    }
    if not __name__.startswith("loopwise."):
        wrapped["auto_map"] = AUTO_MAP
    return wrapped


def keep_plan_on_save(model: PreTrainedModel) -> PreTrainedModel:
    """Make `save_pretrained` of an attached model write the plan too."""
    model.__dict__["save_pretrained"] = SavePretrained(model)
    return model
