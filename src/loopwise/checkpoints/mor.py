"""Mixture-of-Recursions (2507.10524), expert choice and token choice, on the Llama layout.

    x = layer 0 (embed(ids));  N recursions over the same K layers F, each for the tokens that a router lets in
    expert choice: x[chosen] += g F(x[chosen]), N times;  token choice: x += g F(...F(x)), as deep as chosen
    logits = head(n(last layer (x)))

The published transform writes the recursions out as modules whose layers share their tensors: a state dict holds them N
times, a safetensors file once. Releases before upstream commit 82c97f2 made the attention of every recursion anew in
expert mode, so that it is not shared; such a checkpoint is only loaded, on request, as separate layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loopwise.checkpoints.family import Config, Family, count, require
from loopwise.checkpoints.tensors import Rule, UntiedError
from loopwise.loop.config import Component, to_dict
from loopwise.loop.route import ExpertChoice, TokenChoice
from loopwise.models.blocks import BlockConfig
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.mixers import AttentionConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.norms import NormConfig
from loopwise.models.rotary import RotaryConfig

_ROUTERS = {"linear": "linear", "mlp": "mlp", "wide_mlp": "mlp"}  # the published wide one is no wider
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def _matches(config: Config, names: frozenset[str]) -> bool:
    cfg = config.get("cfg")
    routed = isinstance(cfg, Mapping) and isinstance(cfg.get("mor"), Mapping) and bool(cfg["mor"].get("enable", True))
    return routed or any(".mor_router." in name for name in names)


class _Shape:
    """What the configuration says of layers and recursions, checked.

    Attributes:
        kind: "expert" or "token".
        num_recursions: N.
        depth: K, layers in a recursion.
        before: number of layers before the first recursion, 0 or 1; as many come after the last.
    """

    def __init__(self, config: Config):
        self.llama = _part(config, "llama_config")
        self.cfg = _part(config, "cfg")
        self.mor = _part(self.cfg, "mor", "cfg.")
        recursive = _part(self.cfg, "recursive", "cfg.")
        for name in ("kv_sharing", "relaxation"):
            if (self.cfg.get(name) or {}).get("enable"):
                raise ValueError(f"config.json has cfg.{name}.enable=True: supported is False")
        self.kind: str = _value(self.mor, "type", "cfg.mor.", "expert", "token")
        sharings = ("middle_cycle", "cycle") if self.kind == "expert" else ("middle_cycle",)
        self.before = int(_value(recursive, "sharing", "cfg.recursive.", *sharings) == "middle_cycle")
        path = "cfg.recursive.num_recursion"
        self.num_recursions = count({path: recursive.get("num_recursion")}, path, least=2)
        self.depth = (count(self.llama, "num_hidden_layers") - 2 * self.before) // self.num_recursions
        if self.depth < 1:
            layers = self.llama["num_hidden_layers"]
            raise ValueError(
                f"config.json has num_hidden_layers={layers}: too few for {self.num_recursions} recursions"
            )
        self.shares_norms = bool(recursive.get("ln_share", True))
        if self.mor.get("rand_router"):
            raise ValueError("config.json has cfg.mor.rand_router=True: supported is False")

    def recursion(self, i: int) -> str:
        """Prefix of the layers of recursion i."""
        if self.kind == "token":
            return f"model.layers.{self.before}.block_list.{i}"
        return f"model.layers.{self.before + i}.block"

    def last(self) -> str:
        """Prefix of the layer after the recursions."""
        return f"model.layers.{self.before + (self.num_recursions if self.kind == 'expert' else 1)}"

    def tensors(self) -> dict[str, str]:
        """Names within a layer, theirs and ours."""
        names = {
            "input_layernorm.weight": "mixer_norm_in.weight",
            "post_attention_layernorm.weight": "mlp_norm_in.weight",
        }
        kinds = ["weight", "bias"] if self.llama.get("attention_bias") else ["weight"]
        names |= {f"self_attn.{p}_proj.{kind}": f"mixer.{p}_proj.{kind}" for p in "qkvo" for kind in kinds}
        kinds = ["weight", "bias"] if self.llama.get("mlp_bias") else ["weight"]
        return names | {
            f"mlp.{p}_proj.{kind}": f"mlp.{p}_proj.{kind}" for p in ("gate", "up", "down") for kind in kinds
        }


def _part(config: Config, field: str, path: str = "") -> Mapping[str, Any]:
    value = config.get(field)
    if not isinstance(value, Mapping):
        raise ValueError(f"config.json lacks the object {path}{field}")
    return value


def _value(part: Mapping[str, Any], field: str, path: str, *allowed: Any) -> Any:
    return require({path + field: part[field]} if field in part else {}, path + field, *allowed)


def _route(shape: _Shape) -> Component:
    mor = shape.mor
    router: Any = _ROUTERS[_value({"router_type": "linear", **mor}, "router_type", "cfg.mor.", *_ROUTERS)]
    shared: dict[str, Any] = {"router": router, "temperature": float(mor.get("temp", 1.0))}
    shared["z_weight"] = float(mor.get("z_coeff", 0.001)) if mor.get("z_loss") else 0.0
    part, path = _part(mor, shape.kind, "cfg.mor."), f"cfg.mor.{shape.kind}."
    shared["gating"] = _value({"gating": "weighted", **part}, "gating", path, "weighted", "additive")
    if shape.kind == "token":
        function = _value({"router_func": "softmax", **part}, "router_func", path, "softmax", "sigmoid")
        return TokenChoice(
            alpha=float(part.get("alpha", 1.0 if function == "softmax" else 0.1)),
            balancing=_value(part, "balancing", path, "loss", "loss_free"),
            balance_weight=float(part.get("coeff", 0.1)),
            bias_step=float(part.get("u", 0.001)),
            function=function,
            **shared,
        )
    sampling = _value({"sampling": "aux_loss", **part}, "sampling", path, "aux_loss", None)
    return ExpertChoice(
        capacities=_capacities(mor.get("capacity"), shape.num_recursions),
        alpha=float(part.get("alpha", 0.1)),
        aux_weight=float(part.get("coeff", 0.001)) if sampling else 0.0,
        function=_value({"router_func": "sigmoid", **part}, "router_func", path, "sigmoid", "tanh", None) or "none",
        **shared,
    )


def _capacities(value: Any, num_recursions: int) -> tuple[float, ...]:
    if value is None:
        return ()
    try:
        numbers = tuple(float(item) for item in (value.split(",") if isinstance(value, str) else value))
    except (TypeError, ValueError):
        numbers = ()
    falling = all(a >= b for a, b in zip(numbers, numbers[1:], strict=False))
    if len(numbers) != num_recursions or not falling or not all(0 < number <= 1 for number in numbers):
        raise ValueError(
            f"config.json has cfg.mor.capacity={value!r}: use {num_recursions} numbers in (0, 1] that do not grow"
        )
    return numbers


def _block(llama: Mapping[str, Any]) -> BlockConfig:
    width, heads = count(llama, "hidden_size"), count(llama, "num_attention_heads")
    head_dim = llama.get("head_dim") or width // heads
    rope = dict(llama.get("rope_parameters") or {})
    theta = float(llama.get("rope_theta") or rope.pop("rope_theta", None) or 10000.0)
    scaling = llama.get("rope_scaling") or {key: value for key, value in rope.items() if key != "rope_theta"} or None
    return BlockConfig(
        hidden_size=width,
        mixer=AttentionConfig(
            num_heads=heads,
            num_kv_heads=llama.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            rope=RotaryConfig(dim=head_dim, theta=theta, scaling=scaling),
            qkv_bias=bool(llama.get("attention_bias")),
            out_bias=bool(llama.get("attention_bias")),
            dropout=float(llama.get("attention_dropout") or 0.0),
        ),
        mlp=MLPConfig(
            intermediate_size=count(llama, "intermediate_size"),
            activation=_ACTIVATIONS[require({"hidden_act": "silu", **llama}, "hidden_act", *_ACTIVATIONS)],
            bias=bool(llama.get("mlp_bias")),
        ),
        norm=NormConfig(eps=float(llama.get("rms_norm_eps", 1e-6))),
    )


def _model(shape: _Shape, num_inner: int, middle: str, loops: dict[str, Any]) -> LoopwiseForCausalLM:
    llama, block = shape.llama, _block(shape.llama)
    num_layers = num_inner + 2 * shape.before
    plan = f"0 {middle} {num_layers - 1}" if shape.before else middle
    return LoopwiseForCausalLM(
        LoopwiseDecoderConfig(
            vocab_size=count(llama, "vocab_size"),
            hidden_size=block.hidden_size,
            num_hidden_layers=num_layers,
            blocks=[block.to_dict()],
            plan=plan,
            loops=loops,
            norm={"eps": block.norm.eps},
            cache="selected",
            max_position_embeddings=llama.get("max_position_embeddings", 2048),
            initializer_range=llama.get("initializer_range", 0.02),
            tie_word_embeddings=bool(llama.get("tie_word_embeddings", False)),
            **{key: llama[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id") if key in llama},
        )
    )


def _build(config: Config, names: frozenset[str]) -> LoopwiseForCausalLM:
    shape = _Shape(config)
    if not shape.shares_norms:
        raise UntiedError("config.json has cfg.recursive.ln_share=False: norms of the recursions must be tied")
    first, last = shape.before, shape.before + shape.depth - 1
    middle = f"core:({_span(first, last)})x{shape.num_recursions}"
    return _model(shape, shape.depth, middle, {"core": _routers(shape)})


def _build_untied(config: Config, names: frozenset[str]) -> LoopwiseForCausalLM:
    shape = _Shape(config)
    starts = [shape.before + i * shape.depth for i in range(shape.num_recursions)]
    middle = " ".join(f"r{i}:({_span(start, start + shape.depth - 1)})" for i, start in enumerate(starts))
    loops: dict[str, Any] = {"r0": _routers(shape)}
    loops |= {f"r{i}": {"follows": "r0"} for i in range(1, shape.num_recursions)}
    return _model(shape, shape.num_recursions * shape.depth, middle, loops)


def _routers(shape: _Shape) -> dict[str, Any]:
    return {"route": to_dict(_route(shape)), "iterations": shape.num_recursions}


def _span(first: int, last: int) -> str:
    return f"{first}-{last}" if last > first else str(first)


def _rules(config: Config, names: frozenset[str]) -> list[Rule]:
    shape = _Shape(config)
    rules = _outer_rules(shape, shape.depth, "core")
    for j in range(shape.depth):
        for theirs, ours in shape.tensors().items():
            copies = [f"{shape.recursion(i)}.{j}.{theirs}" for i in range(shape.num_recursions)]
            kept = next((name for name in copies if name in names), copies[0])
            rules.append(Rule(foreign=kept, ours=(f"model.layers.{shape.before + j}.{ours}",)))
            rules += [Rule(foreign=name, tied_to=kept) for name in copies if name != kept]
    return rules


def _untied_rules(config: Config, names: frozenset[str]) -> list[Rule]:
    shape = _Shape(config)
    rules = _outer_rules(shape, shape.num_recursions * shape.depth, "r0")
    for j in range(shape.depth):
        for theirs, ours in shape.tensors().items():
            copies = [f"{shape.recursion(i)}.{j}.{theirs}" for i in range(shape.num_recursions)]
            kept = next((name for name in copies if name in names), copies[0])
            for i, name in enumerate(copies):  # a file has what is shared once, beside what is not
                here = f"model.layers.{shape.before + i * shape.depth + j}.{ours}"
                rules.append(Rule(foreign=name if name in names else kept, ours=(here,)))
    return rules


def _outer_rules(shape: _Shape, num_inner: int, loop: str) -> list[Rule]:
    """Everything but the layers of the recursions."""
    rules = [
        Rule(foreign="model.embed_tokens.weight", ours=("model.embed_tokens.weight",)),
        Rule(foreign="model.norm.weight", ours=("model.norm.weight",)),
    ]
    if shape.llama.get("tie_word_embeddings", False):
        rules.append(Rule(foreign="lm_head.weight", tied_to="model.embed_tokens.weight"))
    else:
        rules.append(Rule(foreign="lm_head.weight", ours=("lm_head.weight",)))
    outer = {"model.layers.0": "model.layers.0", shape.last(): f"model.layers.{num_inner + 1}"} if shape.before else {}
    for there, here in outer.items():
        rules += [Rule(foreign=f"{there}.{a}", ours=(f"{here}.{b}",)) for a, b in shape.tensors().items()]
    parts = [""] if _ROUTERS[shape.mor.get("router_type", "linear")] == "linear" else [".0", ".2"]
    here = f"model.loops.{loop}.route.router"
    if shape.kind == "token":
        there = f"model.layers.{shape.before}"
        rules += [Rule(foreign=f"{there}.mor_router.router{p}.weight", ours=(f"{here}{p}.weight",)) for p in parts]
        if _part(shape.mor, "token", "cfg.mor.").get("balancing") == "loss_free":
            rules.append(Rule(foreign=f"{there}.router_bias", ours=(f"{here}_bias",)))
        return rules
    for i in range(shape.num_recursions):
        there = f"model.layers.{shape.before + i}.mor_router.router"
        rules += [Rule(foreign=f"{there}{p}.weight", ours=(f"{here}s.{i}{p}.weight",)) for p in parts]
    return rules


_SOURCE = "2507.10524, raymin0223/mixture_of_recursions (read in a fork at 0c98df3)"
_UNTIED = Family(
    name="mor_untied",
    source=_SOURCE,
    matches=lambda config, names: False,
    build=_build_untied,
    rules=_untied_rules,
    differs="Recursions whose tensors are not shared, a defect of releases before 82c97f2: each has its own layers.",
)
MOR = Family(
    name="mor",
    source=_SOURCE,
    matches=_matches,
    build=_build,
    rules=_rules,
    untied=_UNTIED,
    differs=(
        "Evaluation code selects the best tokens of the sequence, which sees later ones; a plain call follows it, "
        "select='threshold' and generate are causal. Published code has no padding and no decoding with a router."
    ),
)
