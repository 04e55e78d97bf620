"""Names: roles, one place for every parameter, state that goes on bit for bit, and refusals."""

import re
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, MambaConfig

from loopwise.loop.config import from_dict, to_dict
from loopwise.models.blocks import BlockConfig
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.mixers import AttentionConfig
from loopwise.models.mlps import MLPConfig
from loopwise.train.optim import (
    AdamATan2Config,
    AdamWConfig,
    Multipliers,
    MuonConfig,
    NamedOptimizer,
    OptimizerConfig,
    role_of,
    trainable,
)
from tests.train.optim.naive import Small

CONFIGS = [
    AdamWConfig(),
    AdamWConfig(fused=True),
    AdamATan2Config(correction="outside"),
    MuonConfig(lr=3e-3, adamw=AdamWConfig(beta1=0.7)),
]
STEPS = 8


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("model.embed_tokens.weight", (9, 4), "embedding"),
        ("model.embed_positions.weight", (9, 4), "embedding"),
        ("model.value_embeddings.3.weight", (9, 4), "embedding"),
        ("transformer.wte.weight", (9, 4), "embedding"),
        ("read_in.weight", (4, 9), "embedding"),
        ("model.layers.0.mixer.q_proj.weight", (4, 4), "matrix"),
        ("model.layers.0.mlp.experts.gate_up_proj", (2, 8, 4), "matrix"),
        ("model.layers.0.mixer.q_proj.lora_A.default.weight", (2, 4), "matrix"),
        ("model.loops.core.update.adapter.weight", (4, 8), "matrix"),
        ("model.loops.core.gate.linear.weight", (1, 4), "head"),
        ("model.loops.core.update.A_log", (4,), "vector"),
        ("backbone.layers.0.mixer.A_log", (4, 16), "vector"),
        ("model.layers.0.mixer.qk_bias", (2, 1, 2, 4), "vector"),
        ("model.layers.0.mlp_norm_in.weight", (4,), "vector"),
        ("model.loops.core.delta.input_layernorm.weight", (3, 4), "vector"),
        ("model.layers.0.mixer.q_proj.bias", (4,), "vector"),
        ("lm_head.weight", (9, 4), "head"),
        ("embed_out.weight", (9, 4), "head"),
        ("q_head.weight", (2, 4), "head"),
        ("weight", (4, 4), "matrix"),
    ],
)
def test_roles_by_name(name: str, shape: tuple[int, ...], role: str) -> None:
    assert role_of(name, shape) == role


def decoder() -> LoopwiseForCausalLM:
    block = BlockConfig(hidden_size=8, mixer=AttentionConfig(num_heads=2), mlp=MLPConfig(intermediate_size=12))
    config = LoopwiseDecoderConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=3,
        blocks=[block.to_dict()],
        plan="0 core:(1)x2 2",
        norm={},
        loops={"core": {"state": {"kind": "state.zeros"}, "update": {"kind": "update.concat"}, "gate": True}},
    )
    return LoopwiseForCausalLM(config)


def models() -> dict[str, nn.Module]:
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2}
    configs = {
        "llama": LlamaConfig(**sizes, num_attention_heads=2, intermediate_size=12),
        "gpt_neox": GPTNeoXConfig(**sizes, num_attention_heads=2, intermediate_size=12),
        "mamba": MambaConfig(**sizes, state_size=4, tie_word_embeddings=False),
        "gpt2": GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2),
    }
    return {name: AutoModelForCausalLM.from_config(config) for name, config in configs.items()} | {"own": decoder()}


def test_roles_agree_with_the_modules_of_real_models() -> None:
    for kind, model in models().items():
        parameters, head = trainable(model), model.get_output_embeddings().weight
        tables = {id(item.weight) for item in model.modules() if isinstance(item, nn.Embedding)}
        for name, parameter in parameters.items():
            if id(parameter) in tables:
                wanted = "embedding"
            elif parameter is head or "gate.linear.weight" in name:
                wanted = "head"
            else:
                wanted = "vector" if parameter.ndim < 2 or "A_log" in name else "matrix"
            assert role_of(name, parameter.shape) == wanted or name.endswith("gate.linear.bias"), (kind, name)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_parameter_of_real_models_is_in_one_group(config: OptimizerConfig) -> None:
    for kind, model in models().items():
        optimizer = config.build(trainable(model))
        counts = Counter(id(value) for group in optimizer.groups for value in group["params"])
        assert counts == Counter(id(value) for value in model.parameters()), kind
        assert len({group["label"] for group in optimizer.groups}) == len(optimizer.groups)


def test_a_tied_parameter_is_trained_once_and_a_frozen_one_not_at_all() -> None:
    model = Small()
    model.lm_head.weight = model.embed_tokens.weight
    model.spare.weight.requires_grad_(False)
    everything = dict(model.named_parameters(remove_duplicate=False))
    assert "lm_head.weight" in everything
    optimizer = AdamWConfig().build(everything)
    assert "lm_head.weight" not in optimizer.parameters and "spare.weight" not in optimizer.parameters
    assert optimizer.parameters.keys() == trainable(model).keys()


def test_names_do_not_see_compiled_or_checkpointed_blocks() -> None:
    model = Small()
    plain = list(trainable(model))
    model.up_proj = torch.compile(model.up_proj)  # type: ignore[assignment]
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    assert list(trainable(model)) == plain


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (AdamWConfig(), {"up_proj.weight", "down_proj.weight", "lm_head.weight", "spare.weight"}),
        (MuonConfig(), {"up_proj.weight", "down_proj.weight", "lm_head.weight", "spare.weight"}),
        (MuonConfig(decay="all"), {name for name, _ in Small().named_parameters()}),
        (AdamATan2Config(decay="all"), {name for name, _ in Small().named_parameters()}),
    ],
)
def test_what_decays(config: OptimizerConfig, names: set[str]) -> None:
    optimizer = config.build(dict(Small().named_parameters()))
    assert {name for group in optimizer.groups if group["weight_decay"] for name in group["names"]} == names


def run(model: Small, optimizer: NamedOptimizer, first: int, stop: int) -> None:
    for step in range(first, stop):
        optimizer.zero_grad()
        model.loss(step).backward()
        if step % 3 == 1:  # a parameter that some steps do not reach has a count of its own
            model.down_proj.weight.grad = None
        optimizer.step(1 / (1 + step))


@settings(deadline=None, max_examples=24)
@given(
    split=st.integers(0, STEPS), config=st.sampled_from(CONFIGS), dtype=st.sampled_from([torch.float32, torch.float64])
)
def test_a_run_goes_on_bit_for_bit(split: int, config: OptimizerConfig, dtype: torch.dtype) -> None:
    whole = Small(dtype=dtype)
    through = config.build(dict(whole.named_parameters()))
    run(whole, through, 0, STEPS)

    before = Small(dtype=dtype)
    stopped = config.build(dict(before.named_parameters()))
    run(before, stopped, 0, split)
    saved = {key: value.clone() for key, value in stopped.state().items()}
    after = Small(seed=1, dtype=dtype)
    after.load_state_dict(before.state_dict())
    # groups in another order: only names count
    resumed = config.build(dict(reversed(list(after.named_parameters()))))
    resumed.load_state(saved)
    run(after, resumed, split, STEPS)

    weights = whole.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in after.state_dict().items())
    assert resumed.state().keys() == through.state().keys()
    assert all(torch.equal(value, through.state()[key]) for key, value in resumed.state().items())


def test_resuming_without_the_state_is_seen() -> None:
    one, other = Small(), Small()
    first = AdamWConfig().build(dict(one.named_parameters()))
    run(one, first, 0, 4)
    other.load_state_dict(one.state_dict())
    run(one, first, 4, 5)
    run(other, AdamWConfig().build(dict(other.named_parameters())), 4, 5)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_the_state_is_the_tensors_themselves() -> None:
    model = Small()
    optimizer = AdamWConfig().build(dict(model.named_parameters()))
    state = optimizer.state()
    run(model, optimizer, 0, 1)
    assert state["up_proj.weight/step"].item() == 1
    assert state["spare.weight/step"].item() == 0
    assert state["up_proj.weight/exp_avg"].abs().sum() > 0


def test_a_state_that_does_not_fit_is_refused_whole() -> None:
    optimizer = AdamWConfig().build(dict(Small().named_parameters()))
    full = {key: torch.ones_like(value) for key, value in optimizer.state().items()}
    less = {key: value for key, value in full.items() if key != "up_proj.bias/exp_avg"}
    wrong = full | {"up_proj.bias/exp_avg": torch.ones(4)}
    half = full | {"up_proj.bias/exp_avg": torch.ones(5, dtype=torch.float16)}
    more = full | {"up_proj.bias/exp_ave": torch.ones(5)}
    for state, said in (
        (less, "lacks 'up_proj.bias/exp_avg'"),
        (wrong, r"'up_proj.bias/exp_avg' has shape and dtype ((4,), torch.float32)"),
        (half, "torch.float16"),
        (more, "has 'up_proj.bias/exp_ave', which is not there to be filled; did you mean 'up_proj.bias/exp_avg'"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            optimizer.load_state(state)
        assert all(not value.any() for value in optimizer.state().values())


def test_bad_settings_are_refused_by_name() -> None:
    parameters = dict(Small().named_parameters())
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        AdamWConfig().build({})
    with pytest.raises(ValueError, match=r"'up_proj.weigth'.*did you mean 'up_proj.weight'"):
        AdamWConfig().build(parameters, {"up_proj.weigth": Multipliers()})
    with pytest.raises(ValueError, match=r"learning rate of 'up_proj.weight' by 0.5.*optimizer.adamw"):
        MuonConfig().build(parameters, {"up_proj.weight": Multipliers(lr=0.5)})
    for make in (
        lambda: AdamWConfig(lr=-1.0),
        lambda: AdamWConfig(beta2=1.0),
        lambda: AdamWConfig(eps=-1e-8),
        lambda: AdamATan2Config(a=0.0),
        lambda: MuonConfig(momentum=1.0),
        lambda: MuonConfig(scale="spectral"),
        lambda: AdamWConfig(decay="none"),
    ):
        with pytest.raises(ValueError, match=r"^optimizer\.\w+: \w+="):
            make()


def test_multipliers_reach_the_groups() -> None:
    rule = Multipliers(lr=0.5, eps=4.0, weight_decay=2.0)
    config = AdamWConfig(lr=0.1, eps=1e-6, weight_decay=0.2)
    optimizer = config.build(dict(Small().named_parameters()), {"up_proj.weight": rule, "up_proj.bias": rule})
    by_name = {name: group for group in optimizer.groups for name in group["names"]}
    scaled, bias, plain = (by_name[name] for name in ("up_proj.weight", "up_proj.bias", "down_proj.weight"))
    assert [scaled[key] for key in ("base_lr", "eps", "weight_decay")] == [0.05, 4e-6, 0.4]
    assert [bias[key] for key in ("base_lr", "eps", "weight_decay")] == [0.05, 4e-6, 0.0]
    assert [plain[key] for key in ("base_lr", "eps", "weight_decay")] == [0.1, 1e-6, 0.2]


@pytest.mark.parametrize("config", CONFIGS)
def test_configs_go_through_json(config: OptimizerConfig) -> None:
    assert from_dict(to_dict(config)) == config
