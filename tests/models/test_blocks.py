"""Blocks against the written-out block, over all families and the combinations they do not cover."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from loopwise.models.blocks import AdaLNConfig, BlockConfig
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.mixers import AttentionConfig, QKNormConfig, TokenMixerConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.norms import LayerNorm, NormConfig, RMSNorm
from loopwise.models.rotary import RotaryConfig
from tests.models import naive_blocks
from tests.models.block_families import (
    FAMILIES,
    HALF,
    SWIGLU,
    TOKENS,
    WIDTH,
    build,
    extras,
    model_config,
    noise,
    tables,
)

MORE = {
    "head_norm_and_qk_bias": BlockConfig(
        hidden_size=WIDTH,
        mixer=AttentionConfig(
            num_heads=2, head_dim=6, rope=HALF, qk_bias=True, qk_norm=QKNormConfig(), scale=0.2, output_gate="channel"
        ),
        mlp=MLPConfig(intermediate_size=7, activation="relu", bias=True),
        placement="stream",
    ),
    "biases_everywhere": BlockConfig(
        hidden_size=WIDTH,
        mixer=AttentionConfig(num_heads=4, num_kv_heads=1, qkv_bias=True, out_bias=True, output_gate="channel"),
        mlp=MLPConfig(intermediate_size=7, activation="relu2", gated=False, bias=True),
        norm=NormConfig(bias=True, eps=None),
        placement="branch",
    ),
    "token_mixer_with_weights": BlockConfig(
        hidden_size=WIDTH,
        mixer=TokenMixerConfig(length=TOKENS, mlp=MLPConfig(intermediate_size=3, gated=False, bias=True)),
        mlp=SWIGLU,
        norm=NormConfig(type="layer", bias=True),
        placement="stream",
    ),
    "narrow_conditioning": BlockConfig(
        hidden_size=WIDTH, mixer=AttentionConfig(num_heads=4), mlp=SWIGLU, adaln=AdaLNConfig(conditioning_size=3)
    ),
}
ALL = FAMILIES | MORE


def seen_by(config: BlockConfig) -> naive_blocks.Seen:
    bidirectional = isinstance(config.mixer, AttentionConfig) and config.mixer.mask == "bidirectional"
    return naive_blocks.everything if bidirectional else naive_blocks.causal


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ALL)
def test_equals_the_written_out_block_with_gradients(name: str, implementation: str) -> None:
    config = ALL[name]
    block = build(config, implementation).double()
    weight = noise(2, TOKENS, WIDTH, seed=2).double()
    leaves = {"hidden_states": noise(2, TOKENS, WIDTH, seed=3), **extras(config)}
    ours = {key: value.double().requires_grad_() for key, value in leaves.items()}
    naive = {key: value.double().requires_grad_() for key, value in leaves.items()}
    parameters = dict(block.named_parameters())
    tensors = {key: value.detach().clone().requires_grad_() for key, value in parameters.items()}

    result = block(**ours, **tables(config))
    expected = naive_blocks.block(
        naive["hidden_states"],
        config,
        tensors,
        seen_by(config),
        values_BTE=naive.get("value_embeddings"),
        conditioning_BC=naive.get("conditioning"),
    )
    # Both run in float64, but the rotary tables are float32.
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-6)
    got = torch.autograd.grad((result * weight).sum(), [*parameters.values(), *ours.values()])
    want = torch.autograd.grad((expected * weight).sum(), [*tensors.values(), *naive.values()])
    largest = max(gradient.abs().max().item() for gradient in want)
    for key, mine, other in zip([*tensors, *ours], got, want, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6 * largest, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


def test_gradients_equal_finite_differences() -> None:
    config = MORE["head_norm_and_qk_bias"]
    block = build(config).double()
    hidden = noise(1, 3, WIDTH).double().requires_grad_()
    turn = tables(config, 3)
    assert torch.autograd.gradcheck(lambda x: block(x, **turn), (hidden,), fast_mode=True)


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_stays_near_float32(name: str) -> None:
    config = ALL[name]
    block, hidden = build(config), noise(2, TOKENS, WIDTH, seed=3)
    more = extras(config)
    expected = block(hidden, **tables(config), **more)
    low = build(config).bfloat16()
    result = low(hidden.bfloat16(), **tables(config), **{key: value.bfloat16() for key, value in more.items()})
    assert result.dtype == torch.bfloat16
    assert (result.float() - expected).abs().max() <= 0.06 * expected.abs().max()
    result.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in low.parameters())


@pytest.mark.parametrize("name", ALL)
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    config = ALL[name]
    gradients = []
    for is_on in (False, True):
        block = build(config).train()
        block.gradient_checkpointing = is_on
        calls = []

        def run(function, *args, calls=calls):
            calls.append(function)
            return checkpoint(function, *args, use_reentrant=False)

        block._gradient_checkpointing_func = run
        hidden = noise(2, TOKENS, WIDTH, seed=4)
        block(hidden, **tables(config), **extras(config)).square().sum().backward()
        assert len(calls) == is_on
        gradients.append([p.grad for p in block.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_without_its_extras_a_gate_has_no_effect() -> None:
    config = FAMILIES["parcae"]
    plain = dataclasses.replace(config, mixer=dataclasses.replace(config.mixer, value_gate_channels=None))
    gated = build(config)
    without = build(plain)
    without.load_state_dict({k: v for k, v in gated.state_dict().items() if "value_gate" not in k})
    hidden = noise(2, TOKENS, WIDTH)
    assert torch.equal(gated(hidden, **tables(config)), without(hidden, **tables(config), **extras(config)))


def test_adaln_starts_as_the_identity_and_takes_a_vector_per_token() -> None:
    config = FAMILIES["loopformer"]
    hidden, row = noise(2, TOKENS, WIDTH), extras(config)["conditioning"]
    assert torch.equal(config.build(model_config(), 0)(hidden, conditioning=row), hidden)
    block = build(config)
    per_token = row[:, None].expand(-1, TOKENS, -1)
    torch.testing.assert_close(block(hidden, conditioning=per_token), block(hidden, conditioning=row))
    changed = per_token.clone()
    changed[:, -1] += 1
    difference = block(hidden, conditioning=changed) - block(hidden, conditioning=per_token)
    assert difference[:, :-1].abs().max() < 1e-5 and difference[:, -1].abs().max() > 1e-2


def test_a_new_model_starts_its_blocks_as_they_ask() -> None:
    def parameters(name: str) -> dict[str, torch.Tensor]:
        blocks = [FAMILIES[name].to_dict()]
        config = LoopwiseDecoderConfig(
            vocab_size=7, hidden_size=WIDTH, num_hidden_layers=1, blocks=blocks, plan="0", norm={"eps": 1e-5}
        )
        return LoopwiseForCausalLM(config).state_dict()

    loopformer, huginn = parameters("loopformer"), parameters("huginn")
    assert not loopformer["model.layers.0.adaln.weight"].any() and not loopformer["model.layers.0.adaln.bias"].any()
    assert not huginn["model.layers.0.mixer.qk_bias"].any()
    assert (huginn["model.layers.0.mixer_norm_in.weight"] == 1).all()
    assert 0.01 < huginn["model.layers.0.mixer.q_proj.weight"].std() < 0.03


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_equal_those_of_torch(kind: str) -> None:
    hidden = 3 * noise(7, WIDTH) + 1
    config = NormConfig(type=kind, eps=None, bias=kind == "layer", weight_in_float32=True)
    ours = config.build(WIDTH)
    other = torch.nn.RMSNorm(WIDTH) if kind == "rms" else torch.nn.LayerNorm(WIDTH, eps=2.0**-23)
    assert isinstance(ours, RMSNorm if kind == "rms" else LayerNorm)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    other.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(hidden), other(hidden), atol=1e-6, rtol=0)
    low = hidden.bfloat16()
    torch.testing.assert_close(ours.bfloat16()(low), other.bfloat16()(low), atol=0, rtol=0)
    ours.reset_parameters()
    assert all((p == (name == "weight")).all() for name, p in ours.named_parameters())


def test_where_the_weight_multiplies_shows_below_float32_only() -> None:
    hidden = noise(64, WIDTH)
    first, second = (NormConfig(weight_in_float32=flag).build(WIDTH) for flag in (False, True))
    torch.nn.init.normal_(first.weight)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(hidden), second(hidden))
    assert not torch.equal(first.bfloat16()(hidden.bfloat16()), second.bfloat16()(hidden.bfloat16()))


@pytest.mark.parametrize("name", ALL)
def test_json_round_trip(name: str) -> None:
    data = json.loads(json.dumps(ALL[name].to_dict()))
    assert BlockConfig.from_dict(data) == ALL[name]
    assert hash(BlockConfig.from_dict(data)) == hash(ALL[name])


def attend(**fields) -> AttentionConfig:
    return AttentionConfig(**{"num_heads": 4, **fields})


def block_of(**fields) -> BlockConfig:
    return BlockConfig(**{"hidden_size": WIDTH, "mixer": attend(), "mlp": SWIGLU, **fields})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormConfig(type="rsm"), r"NormConfig.type is 'rsm': .*did you mean rms"),
        (lambda: NormConfig(eps=-1.0), "NormConfig.eps is -1.0"),
        (lambda: NormConfig(eps="1e-6"), "NormConfig.eps is '1e-6': use a finite number or None"),
        (lambda: NormConfig(weight=1), "NormConfig.weight is 1: use true or false"),
        (lambda: RotaryConfig(dim=4, theta=float("inf")), "RotaryConfig.theta is inf: use a finite number"),
        (lambda: RotaryConfig(dim=4, scaling={"type": "linear", "factor": 0.0}), "frequencies are not finite"),
        (lambda: RotaryConfig(dim=4, scaling={"type": "linear", "factor": "2"}), "does not take these values"),
        (lambda: MLPConfig(intermediate_size=0), "MLPConfig.intermediate_size is 0"),
        (lambda: MLPConfig(intermediate_size=8, activation="relu3"), "MLPConfig.activation is 'relu3'.*did you mean"),
        (lambda: MLPConfig(intermediate_size=8, dropout=1.0), "MLPConfig.dropout is 1.0"),
        (lambda: RotaryConfig(dim=5), "RotaryConfig.dim is 5: use an even number"),
        (lambda: RotaryConfig(dim=4, theta=0.0), "RotaryConfig.theta is 0.0"),
        (lambda: RotaryConfig(dim=4, style="halves"), "RotaryConfig.style is 'halves'.*did you mean half"),
        (lambda: RotaryConfig(dim=4, scaling={"rope_type": "dynamic", "factor": 2.0}), "changes with the length"),
        (lambda: RotaryConfig(dim=4, scaling={"type": "yern", "factor": 2.0}), "type yern is not known"),
        (lambda: RotaryConfig(dim=4, scaling={"type": "linear"}), "type linear needs factor"),
        (lambda: RotaryConfig(dim=4, scaling={"rope_theta": 5.0}), "RotaryConfig.scaling.*rope_theta differs"),
        (lambda: RotaryConfig(dim=4, scaling={"partial_rotary_factor": 0.5}), "as dim instead"),
        (lambda: QKNormConfig(over="heads"), "QKNormConfig.over is 'heads'.*did you mean head"),
        (lambda: QKNormConfig(over="width", when="after_rope"), "QKNormConfig.over is 'width'"),
        (lambda: attend(num_kv_heads=3), "AttentionConfig.num_kv_heads is 3: use a divisor of num_heads 4"),
        (lambda: attend(num_kv_heads=2, qk_bias=True), "AttentionConfig.qk_bias is True"),
        (lambda: attend(mask="prefx"), "AttentionConfig.mask is 'prefx'.*did you mean prefix"),
        (lambda: attend(mask="prefix", sliding_window=2), "AttentionConfig.sliding_window is 2: .*mask 'prefix'"),
        (lambda: attend(output_gate="head"), "AttentionConfig.output_gate is 'head'"),
        (lambda: attend(head_dim=2, rope=HALF), "AttentionConfig.head_dim is 2: the rotation takes 4"),
        (lambda: attend(rope={"dim": 4}), "AttentionConfig.rope is .*: use RotaryConfig"),
        (lambda: attend(dropout=-0.1), "AttentionConfig.dropout is -0.1"),
        (lambda: TokenMixerConfig(length=0, mlp=SWIGLU), "TokenMixerConfig.length is 0"),
        (lambda: block_of(hidden_size=True), "BlockConfig.hidden_size is True"),
        (lambda: block_of(placement="sandwich"), "BlockConfig.placement is 'sandwich'"),
        (lambda: block_of(placement="post", adaln=AdaLNConfig()), "BlockConfig.placement is 'post': adaln"),
        (lambda: block_of(mixer=TokenMixerConfig(length=4, mlp=SWIGLU), adaln=AdaLNConfig()), "BlockConfig.adaln"),
        (lambda: block_of(mixer=SWIGLU), "BlockConfig.mixer is .*: use AttentionConfig or TokenMixerConfig"),
        (lambda: build(block_of(mixer=attend(num_heads=3))), "AttentionConfig.num_heads is 3: .*hidden_size 16"),
        (lambda: build(block_of(mixer=attend(rope=RotaryConfig(dim=8)))), "AttentionConfig.rope.*head size 4"),
        (lambda: build(block_of(mixer=attend(value_gate_channels=32))), "AttentionConfig.value_gate_channels is 32"),
        (lambda: BlockConfig.from_dict(block_of().to_dict() | {"placment": "pre"}), "did you mean placement"),
        (lambda: BlockConfig.from_dict({"hidden_size": 4}), "BlockConfig needs the field 'mixer'"),
        (
            lambda: BlockConfig.from_dict(block_of().to_dict() | {"mixer": {"kind": "atention"}}),
            "BlockConfig.mixer has kind 'atention'.*did you mean attention",
        ),
        (lambda: BlockConfig.from_dict(block_of().to_dict() | {"mlp": 3}), "MLPConfig is made from a dict"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.sampled_from(["", "pre", "rms", "linear", "1"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["rope_type", "factor", "dim", "kind", "x"]), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(ALL)), st.data())
def test_any_json_value_is_taken_or_refused_in_one_line(name: str, data: st.DataObject) -> None:
    config = ALL[name].to_dict()
    place = config
    while True:
        field = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[field], dict) or data.draw(st.booleans()):
            break
        place = place[field]
    place[field] = data.draw(VALUES)
    try:
        made = BlockConfig.from_dict(config)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert BlockConfig.from_dict(made.to_dict()) == made


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("huginn", {}, "pass position_embeddings"),
        ("huginn", {"position_embeddings": (torch.ones(1, 5, 2),) * 2}, "2 channels but RotaryConfig.dim is 4"),
        ("loopformer", {}, "BlockConfig.adaln is .*pass conditioning"),
        ("trm_mlp_t", {"attention_mask": torch.ones(2, 1, 5, 5)}, "TokenMixerConfig takes no attention_mask"),
        ("albert", {"past_key_values": object()}, "AttentionConfig.mask is 'bidirectional': .*no cache"),
    ],
)
def test_wrong_arguments_are_refused(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(FAMILIES[name])(noise(2, TOKENS, WIDTH), **arguments)


def test_a_token_mixer_has_one_length() -> None:
    with pytest.raises(ValueError, match="TokenMixerConfig.length is 5: the input has 4 tokens"):
        build(FAMILIES["trm_mlp_t"])(noise(2, 4, WIDTH))


def test_dropout_acts_in_training_only() -> None:
    config = block_of(
        mixer=attend(dropout=0.5, out_dropout=0.5), mlp=MLPConfig(intermediate_size=8, dropout=0.5), placement="pre"
    )
    block, hidden = build(config), noise(2, TOKENS, WIDTH)
    assert torch.equal(block(hidden), block(hidden))
    block.train()
    assert not torch.equal(block(hidden), block(hidden))
