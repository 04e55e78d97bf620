"""Where the model of a run comes from: our own decoder from sizes, any transformers type, a checkpoint, a regressor.

Every choice gives a model with a plan, which is what stages change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from loopwise.checkpoints.loading import load
from loopwise.loop import config as components
from loopwise.loop.config import Component
from loopwise.models.attach import attach, plan_of
from loopwise.models.blocks import BlockConfig
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.decoder_config import SHARED_NORM, LoopwiseDecoderConfig
from loopwise.models.mixers import AttentionConfig, QKNormConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.norms import NormConfig
from loopwise.models.regression import LoopwiseForRegression, LoopwiseRegressionConfig
from loopwise.models.rotary import RotaryConfig
from loopwise.plan import Plan
from loopwise.train.optim.parametrisation import (
    LayerNormScaling,
    Parametrisation,
    StandardParametrisation,
    scale_initial_values,
)
from loopwise.train.optim.roles import Multipliers

Rules = Mapping[str, Multipliers]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Component):
    """Base of the sources of models."""

    def build(self, vocab_size: int, *, seed: int, parametrisation: Parametrisation | None = None) -> tuple[Any, Rules]:
        """A model in training mode with a plan; random weights are a function of the seed.

        Args:
            vocab_size: number of token ids of the data; 0 for points.
            seed: of the random weights; the global generators of torch are left as they were.
            parametrisation: of our own decoder; None is the standard one.

        Returns:
            The model, and multipliers for the optimizer by parameter name.

        Raises:
            ValueError: sizes, a plan or a checkpoint that do not fit.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, rules = self._build(vocab_size, parametrisation or StandardParametrisation())
        return model.train(), rules

    def _build(self, vocab_size: int, parametrisation: Parametrisation) -> tuple[Any, Rules]:
        raise NotImplementedError

    def _refuse(self, parametrisation: Parametrisation) -> None:
        if not isinstance(parametrisation, StandardParametrisation) or isinstance(parametrisation, LayerNormScaling):
            raise ValueError(f"{parametrisation.kind} scales random weights of our own decoder, not {self.kind}")


@dataclass(frozen=True, kw_only=True)
class Loop(Component):
    """What the loop named core of our own decoder adds; the fields are those of `LoopwiseDecoderConfig.loops`.

    Attributes:
        state: where its state starts; None is the state that reaches it.
        update: how the input re-enters; None does not.
        turn_norm: apply the final norm after every iteration (and feed it back).
        gate: has an exit gate.
        halting: the rule that the gate drives, or None.
    """

    kind: ClassVar[str | None] = "model.loop"
    state: Component | None = None
    update: Component | None = None
    turn_norm: bool = False
    gate: bool = False
    halting: Component | None = None

    def spec(self) -> dict[str, Any]:
        """The JSON form that the decoder reads."""
        parts = {"state": self.state, "update": self.update, "halting": self.halting}
        spec: dict[str, Any] = {name: components.to_dict(part) for name, part in parts.items() if part is not None}
        return spec | ({"turn": SHARED_NORM} if self.turn_norm else {}) | ({"gate": True} if self.gate else {})


@dataclass(frozen=True, kw_only=True)
class DecoderSizes(ModelConfig):
    """Sizes of our own decoder; a base of those below.

    Attributes:
        layers: number of physical layers.
        width: D.
        heads: attention heads; D is a multiple.
        kv_heads: heads of keys and values; None is `heads`.
        mlp_size: F; None is 4 D for plain activations and 8 D / 3 rounded up to a multiple of 16 for gated ones.
        activation: "swiglu", "gelu", "relu" or "relu2".
        placement: where norms stand, see `models.blocks`.
        norm: "rms" or "layer".
        qk_norm: norm queries and keys, per head.
        positions: "rope", "learned", or "none".
        rope_theta: base of the rotation.
        dropout: probability on both branches in training.
        plan: plan text; empty visits every layer once.
        loop: components of the loop named core.
        max_length: size of learned positions, and the longest context, for information.
        init_std: standard deviation of random matrices; None is `D ** -0.5`.
        extra: fields of `LoopwiseDecoderConfig` that replace what the sizes say.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int | None = None
    mlp_size: int | None = None
    activation: Literal["swiglu", "gelu", "relu", "relu2"] = "swiglu"
    placement: Literal["pre", "post", "stream", "branch", "branch_out"] = "pre"
    norm: Literal["rms", "layer"] = "rms"
    qk_norm: bool = False
    positions: Literal["rope", "learned", "none"] = "rope"
    rope_theta: float = 10000.0
    dropout: float = 0.0
    plan: str = ""
    loop: Loop | None = None
    max_length: int = 2048
    init_std: float | None = None
    extra: dict | None = None

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        for name in ("layers", "width", "heads", "max_length"):
            self.require(getattr(self, name) >= 1, name, "must be at least 1")
        self.require(self.width % self.heads == 0, "heads", f"must divide width={self.width}")

    def fields(self, vocab_size: int, parametrisation: Parametrisation, **more: Any) -> dict[str, Any]:
        """The fields of `LoopwiseDecoderConfig`."""
        plan = Plan.parse(self.plan) if self.plan else Plan.identity(self.layers)
        loops = {} if self.loop is None else {"core": self.loop.spec()}
        values = {
            "vocab_size": vocab_size,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "blocks": [self._block().to_dict()],
            "plan": str(plan),
            "loops": {name: spec for name, spec in loops.items() if spec},
            "norm": self._norm(),
            "norm_last": not (self.loop and self.loop.turn_norm and _ends_with_core(plan)),
            "num_positions": self.max_length if self.positions == "learned" else None,
            "max_position_embeddings": self.max_length,
            "initializer_range": self.init_std or self.width**-0.5,
        }
        return parametrisation.decoder_fields(values | more | (self.extra or {}))

    def _norm(self) -> dict[str, Any]:
        return {"type": self.norm, "bias": self.norm == "layer"}

    def _block(self) -> BlockConfig:
        gated = self.activation == "swiglu"
        size = self.mlp_size or (-(-8 * self.width // 3 // 16) * 16 if gated else 4 * self.width)
        rope = RotaryConfig(dim=self.width // self.heads, theta=self.rope_theta) if self.positions == "rope" else None
        return BlockConfig(
            hidden_size=self.width,
            mixer=AttentionConfig(
                num_heads=self.heads,
                num_kv_heads=self.kv_heads,
                rope=rope,
                qk_norm=QKNormConfig() if self.qk_norm else None,
                out_dropout=self.dropout,
            ),
            mlp=MLPConfig(
                intermediate_size=size,
                activation="silu" if gated else self.activation,
                gated=gated,
                dropout=self.dropout,
            ),
            norm=NormConfig(**self._norm()),
            placement=self.placement,
        )


@dataclass(frozen=True, kw_only=True)
class DecoderModel(DecoderSizes):
    """A causal language model of our own, with random weights.

    Attributes:
        tie_embeddings: the head is the embedding table.
    """

    kind: ClassVar[str | None] = "model.decoder"
    tie_embeddings: bool = False

    def _build(self, vocab_size: int, parametrisation: Parametrisation) -> tuple[Any, Rules]:
        values = self.fields(vocab_size, parametrisation, tie_word_embeddings=self.tie_embeddings)
        return _scaled(LoopwiseForCausalLM(LoopwiseDecoderConfig(**values)), parametrisation, values)


@dataclass(frozen=True, kw_only=True)
class RegressionModel(DecoderSizes):
    """In-context regression (2208.01066, looped as in 2311.12424) with random weights.

    Attributes:
        inputs: numbers per point.
    """

    kind: ClassVar[str | None] = "model.regression"
    inputs: int

    def _build(self, vocab_size: int, parametrisation: Parametrisation) -> tuple[Any, Rules]:
        values = self.fields(0, parametrisation)
        model = LoopwiseForRegression(LoopwiseRegressionConfig(**values, num_inputs=self.inputs))
        return _scaled(model, parametrisation, values)


@dataclass(frozen=True, kw_only=True)
class TransformersModel(ModelConfig):
    """Any causal model type of transformers, with random weights.

    Attributes:
        type: `model_type`, such as "llama".
        config: fields of its configuration; the vocabulary is that of the data unless given.
        plan: plan text; empty visits every layer once.
    """

    kind: ClassVar[str | None] = "model.transformers"
    type: str
    config: dict
    plan: str = ""

    def _build(self, vocab_size: int, parametrisation: Parametrisation) -> tuple[Any, Rules]:
        self._refuse(parametrisation)
        if self.type not in transformers.CONFIG_MAPPING:
            raise ValueError(
                f"model.transformers: type={self.type!r}{components.suggest(self.type, transformers.CONFIG_MAPPING)}"
            )
        config = AutoConfig.for_model(self.type, **({"vocab_size": vocab_size} | self.config))
        model = AutoModelForCausalLM.from_config(config)
        return attach(model, self.plan or Plan.identity(config.get_text_config().num_hidden_layers)), {}


@dataclass(frozen=True, kw_only=True)
class CheckpointModel(ModelConfig):
    """A checkpoint to go on from: whatever `loopwise.load` takes.

    Attributes:
        source: folder, GGUF file or name.
        plan: plan text; empty keeps the checkpoint's own.
        dtype: number type of the weights.
    """

    kind: ClassVar[str | None] = "model.checkpoint"
    source: str
    plan: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"

    def _build(self, vocab_size: int, parametrisation: Parametrisation) -> tuple[Any, Rules]:
        self._refuse(parametrisation)
        if not self.source:
            raise ValueError("model.source is not set: name a checkpoint to go on from, such as model.source=FOLDER")
        model = load(
            Path(self.source) if Path(self.source).exists() else self.source, plan=self.plan or None, dtype=self.dtype
        )
        if plan_of(model) is None:
            attach(model, Plan.identity(model.config.get_text_config().num_hidden_layers))
        known = model.get_input_embeddings().num_embeddings
        if vocab_size > known:
            raise ValueError(
                f"the data has {vocab_size} token ids, {self.source} knows {known}: build the data with its tokenizer"
            )
        return model, {}


def _scaled(model: Any, parametrisation: Parametrisation, values: Mapping[str, Any]) -> tuple[Any, Rules]:
    """A new model with its first values scaled, and the multipliers of its parameters."""
    parameters = dict(model.named_parameters())
    rules = parametrisation.multipliers(parameters, values)
    scale_initial_values(parameters, rules)
    return model, rules


def _ends_with_core(plan: Plan) -> bool:
    last = plan.nodes[-1]
    return getattr(last, "name", None) == "core"


__all__ = ["CheckpointModel", "DecoderModel", "Loop", "ModelConfig", "RegressionModel", "TransformersModel"]
