"""What a looped model is on disk.

The base model's own tensors, and a configuration of type "loopwise" that wraps the base configuration and the plan;
`save_pretrained` of an attached model writes this form.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from loopwise.io.atomic import write_text
from loopwise.models.playing import looping_of

CODE_FILE = "modeling_loopwise.py"
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
        components: further parts by name (streams, deltas, gates); none are defined in this version.
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
        if self.components:
            names = self.components if isinstance(self.components, (dict, list)) else [self.components]
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


def wrap_config(base: dict[str, Any], looping: Any) -> dict[str, Any]:
    """The JSON object of a looped model's config.json from that of its base."""
    policy = looping.policy
    wrapped = {
        "model_type": LoopwiseConfig.model_type,
        "architectures": ["LoopedForCausalLM"],
        "plan": str(looping.plan),
        "cache": str(policy),
        "on_deeper": policy.on_deeper,
        "components": {},
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
