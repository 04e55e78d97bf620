"""Law 5 of width growth over many architectures: the function stays, copies part in training, gradients reach all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from laws import assert_close
from tiny import tiny_config, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM

import loopwise
from loopwise.edit.apply import apply
from loopwise.edit.axes import derives_head_size, saved_tensors, sizes_of
from loopwise.edit.expand import FRESH, group_heads, replicate
from loopwise.edit.text import parse
from loopwise.edit.width import Upcycle, Widen
from loopwise.models.attach import set_hooks
from loopwise.models.mixers import AttentionConfig, QKNormConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.norms import NormConfig
from loopwise.models.rotary import RotaryConfig
from tests.edit.decoders import block, decoder, ids_of
from tests.models.common import logits

# RMS and layer norms, norms behind branches, (1 + w) gains, scaled embeddings, tied heads, biases, fused projections,
# learned positions, grouped queries, norms on queries and keys, experts
FREE_HEADS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "phi3", "cohere", "glm4"]
EXPERTS = ["mixtral", "qwen3_moe", "granitemoe"]
DERIVED_HEADS = ["gpt2", "gpt_neox", "opt", "stablelm", "phi"]
TYPES = FREE_HEADS + EXPERTS + DERIVED_HEADS
LOOPED = "0 core:(1-3)x2 4-5"


def grown(model, axis, **options):
    """The operator that grows one axis of a model."""
    old = sizes_of(model)
    sizes = {
        "hidden": {"hidden": 2 * old["hidden"]},
        "hidden by half": {"hidden": 3 * old["hidden"] // 2},
        "mlp": {"mlp": 3 * old["mlp"] // 2} if "mlp" in old else {},
        "experts' mlp": {"expert_mlp": 3 * old.get("expert_mlp", 0) // 2},
        "heads": {"heads": 2 * old["heads"]},
        "groups": {"heads": 2 * old["heads"], "kv_heads": 2 * old.get("kv_heads", 0)},
        "split groups": {"kv_heads": old["heads"]},
    }[axis]
    return Widen(**sizes, **options)


def redrawn(model, seed=0):
    """The model with vectors far from their first values, so that no gain or bias can be missed."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))
    return model


def gradients(model, ids_BT):
    """Gradients of a loss in which every logit has a weight of its own."""
    model.zero_grad(set_to_none=True)
    logits_BTV = model(ids_BT, use_cache=False).logits
    (logits_BTV * torch.linspace(-1, 1, logits_BTV.numel()).view_as(logits_BTV)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}


def folded(source, gradient, like):
    """The gradient of an old tensor that follows from that of the new one, by the chain rule through its copies."""
    for axis, index in enumerate(source.index):
        if index is None:
            continue
        shape = [1] * gradient.dim()
        shape[axis] = -1
        value = torch.ones(len(index)) if source.value[axis] is None else source.value[axis].float()
        weight = (value * (index != FRESH)).view(shape)
        total = torch.zeros([*gradient.shape[:axis], like.shape[axis], *gradient.shape[axis + 1 :]])
        gradient = total.index_add(axis, index.clamp(min=0), gradient * weight)
    return gradient


def axes_of(model_type):
    axes = ["hidden"]
    axes += ["mlp"] if model_type != "granitemoe" else []
    axes += ["experts' mlp"] if model_type == "qwen3_moe" else []
    return axes + (["hidden by half", "heads", "groups", "split groups"] if model_type not in DERIVED_HEADS else [])


CASES = [(model_type, axis) for model_type in TYPES for axis in axes_of(model_type)]


@pytest.mark.parametrize(("model_type", "axis"), CASES)
def test_the_function_is_kept(model_type, axis):
    model = redrawn(tiny_model(model_type, num_layers=2))
    ids_BT = tiny_inputs(model)
    want, state = logits(model, ids_BT), torch.random.get_rng_state()
    before = {name: tensor.clone() for name, tensor in saved_tensors(model).items()}
    edit = grown(model, axis).edit(model)
    assert type(edit.model) is type(model) and not edit.model.training
    assert torch.equal(torch.random.get_rng_state(), state), "global random numbers were drawn"
    assert all(torch.equal(tensor, before[name]) for name, tensor in saved_tensors(model).items())
    larger = sum(p.numel() for p in edit.model.parameters())
    assert larger > sum(p.numel() for p in model.parameters())
    assert_close(logits(edit.model, ids_BT), want, axis)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(edit.model.generate(ids_BT, **options), model.generate(ids_BT, **options))


@pytest.mark.parametrize(("model_type", "axis"), [case for case in CASES if case[0] in ("llama", "gemma", "gpt2")])
@pytest.mark.parametrize("split", ["unequal", "even"])
def test_gradients_of_the_copies_add_up_to_the_old_one(model_type, axis, split):
    model = redrawn(tiny_model(model_type, num_layers=2))
    ids_BT = tiny_inputs(model)
    edit = grown(model, axis, split=split).edit(model)
    old, new = gradients(model, ids_BT), gradients(edit.model, ids_BT)
    for name, gradient in old.items():
        got = folded(edit.sources[name], new[name], gradient)
        assert_close(got, gradient, name, tolerance=2e-4)


@pytest.mark.parametrize(
    ("axis", "split"),
    [("mlp", "unequal"), ("heads", "unequal"), ("groups", "unequal"), ("hidden", "even"), ("groups", "even")],
)
@pytest.mark.parametrize("model_type", ["qwen3", "gemma", "gpt2"])
def test_moments_move_as_gradients_do(model_type, axis, split):
    model = redrawn(tiny_model(model_type, num_layers=2))
    if derives_head_size(model) and axis in ("heads", "groups"):
        return
    ids_BT = tiny_inputs(model)
    edit = grown(model, axis, split=split).edit(model)
    old, new = gradients(model, ids_BT), gradients(edit.model, ids_BT)
    squares = {name: gradient**2 for name, gradient in old.items()}
    for name, gradient in new.items():
        first, second = edit.sources[name].moments(old, squares)
        assert_close(first, gradient, name, tolerance=2e-4)
        assert_close(second, gradient**2, name, tolerance=2e-4)


def copies(index):
    """Pairs of new units that copy the same old one."""
    first = {}
    for number, unit in enumerate(index.tolist()):
        if unit in first:
            yield first[unit], number
        first.setdefault(unit, number)


@pytest.mark.parametrize(("model_type", "axis"), [("llama", "mlp"), ("llama", "groups"), ("gpt2", "mlp")])
@pytest.mark.parametrize(("optimizer", "steps"), [("SGD", 1), ("AdamW", 2)])
@pytest.mark.parametrize("split", ["unequal", "even"])
def test_copies_part_in_training_when_their_shares_differ(model_type, axis, optimizer, steps, split):
    model = tiny_model(model_type, num_layers=2)
    ids_BT = tiny_inputs(model)
    edit = grown(model, axis, split=split).edit(model)
    name = {"mlp": "c_fc.bias" if model_type == "gpt2" else "up_proj.weight", "groups": "q_proj.weight"}[axis]
    name = next(full for full in edit.sources if full.endswith(name))
    rows = edit.model.get_parameter(name)
    pairs = list(copies(edit.sources[name].index[0]))
    assert pairs and all(torch.equal(rows[one], rows[two]) for one, two in pairs)
    stepper = getattr(torch.optim, optimizer)(edit.model.parameters(), lr=1e-3)
    for _ in range(steps):
        gradients(edit.model, ids_BT)
        stepper.step()
    apart = [(rows[one] - rows[two]).abs().max().item() for one, two in pairs]
    if split == "unequal":
        assert min(apart) > 1e-7, "two copies are still the same"
    else:
        assert max(apart) < 1e-5, "copies with even shares have nothing to part by"


def test_channels_part_in_training_too():
    model = tiny_model("gemma", num_layers=2)
    ids_BT = tiny_inputs(model)
    edit = Widen(hidden=64).edit(model)
    name = "model.layers.0.mlp.down_proj.weight"
    rows = edit.model.get_parameter(name)
    stepper = torch.optim.SGD(edit.model.parameters(), lr=1e-3)
    gradients(edit.model, ids_BT)
    stepper.step()
    assert all(not torch.equal(rows[one], rows[two]) for one, two in copies(edit.sources[name].index[0]))


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "gemma2", "cohere"])
@pytest.mark.parametrize("axis", ["hidden", "hidden by half", "mlp", "groups"])
def test_gradients_reach_all_new_units(model_type, axis):
    model = tiny_model(model_type, num_layers=2)
    ids_BT = tiny_inputs(model, batch=4)
    new = grown(model, axis).edit(model).model
    stepper = torch.optim.SGD(new.parameters(), lr=1e-2)
    seen = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in new.named_parameters()}
    for _ in range(3):  # what reads channels that are zero at first learns later, a norm of such channels last
        for name, gradient in gradients(new, ids_BT).items():
            if name in seen:
                seen[name] |= gradient != 0
        stepper.step()
    for name, reached in seen.items():
        if "embed" in name or "lm_head" in name:
            reached = reached.any(0)
        assert reached.float().mean() > 0.99, f"{name} has entries without gradient"


def test_fresh_channels_are_not_written_at_first_and_read_by_new_weights():
    model = tiny_model("llama", num_layers=2)
    edit = Widen(hidden=40).edit(model)
    assert not edit.model.get_parameter("model.layers.0.mlp.down_proj.weight")[32:].any()
    assert not edit.model.get_parameter("model.embed_tokens.weight")[:, 32:].any()
    read = edit.model.get_parameter("model.layers.0.self_attn.q_proj.weight")[:, 32:]
    assert 0.5 < (read.std() / model.get_parameter("model.layers.0.self_attn.q_proj.weight").std()).item() < 2


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
def test_rounding_in_bfloat16_stays_small(model_type):
    model = tiny_model(model_type, num_layers=3).bfloat16()
    size = {"hidden": 2 * sizes_of(model)["hidden"], "mlp": 96}
    edit = Widen(**size).edit(model)
    assert edit.model.dtype == torch.bfloat16 and 0 < edit.error < 5e-2
    ids_BT = tiny_inputs(model)
    # What is left when the arithmetic is exact: split columns add up to the old ones after rounding too.
    assert_close(logits(edit.model.float(), ids_BT), logits(model.float(), ids_BT), "rounded weights", 5e-3)


def test_a_looped_model_keeps_its_plan():
    model = loopwise.attach(tiny_model("llama"), LOOPED, cache="last")
    ids_BT = tiny_inputs(model)
    new = apply(model, "widen(hidden=64, mlp=96, heads=8)")
    assert loopwise.plan_of(new) == loopwise.plan_of(model)
    assert_close(logits(new, ids_BT), logits(model, ids_BT), "looped")
    assert_close(logits(new, ids_BT, loops=3), logits(model, ids_BT, loops=3), "more loops")


def test_width_and_depth_go_together():
    model = tiny_model("qwen3", num_layers=3)
    ids_BT = tiny_inputs(model)
    want = logits(apply(model, "stack(2)"), ids_BT)
    assert_close(logits(apply(model, ["widen(mlp=96)", "stack(2)"]), ids_BT), want, "widen, then stack")
    assert_close(logits(apply(model, ["stack(2)", "widen(mlp=96, hidden=48)"]), ids_BT), want, "stack, then widen")
    with pytest.raises(ValueError, match="alias"):
        apply(model, "widen(mlp=96)", mode="alias")


def modern(**fields):
    """A block of our own with grouped queries, their norm, and RMS norms."""
    mixer = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, rope=RotaryConfig(dim=8), qk_norm=QKNormConfig())
    made = {"mixer": mixer, "mlp": MLPConfig(intermediate_size=24), "norm": NormConfig()} | fields
    fields = {name: made.pop(name) for name in list(made) if name not in ("mixer", "mlp")}
    return replace(block(**fields), **made)


OWN = {
    "pre": ([modern()] * 3, "0 core:(1)x2 2", {}),
    "tied": ([modern()] * 3, "0 core:(1)x2 2", {"tie_word_embeddings": True, "embedding_scale": 3.0}),
    "layer norms and biases": ([block()] * 2, "0-1", {"norm": {"type": "layer", "bias": True}}),
    "both kinds of norm": ([block()] * 2, "0-1", {}),
    "post": ([block("post")] * 2, "0-1", {}),
    "stream": ([modern(placement="stream")] * 2, "0 core:(1)x3", {}),
    "branch": ([modern(placement="branch")] * 2, "0-1", {}),
    "branch_out": ([modern(placement="branch_out")] * 2, "0-1", {}),
    "concat": ([modern()] * 3, "0 core:(1)x2 2", {"loops": {"core": {"update": {"kind": "update.concat"}}}}),
    "gated, with a gate": (
        [modern()] * 3,
        "0 core:(1)x2 2",
        {"loops": {"core": {"update": {"kind": "update.gated"}, "gate": True}}},
    ),
    "streams": (
        [modern()] * 3,
        "0 core:(1)x2 2",
        {"streams": {"e": "learned"}, "loops": {"core": {"reads": ["e"], "update": {"kind": "update.add"}}}},
    ),
    "different blocks": ([modern(), modern(mlp=MLPConfig(intermediate_size=16))], "0-1", {}),
    "positions": ([modern()] * 2, "0-1", {"num_positions": 32}),
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("text", ["widen(hidden=32)", "widen(mlp=40)", "widen(heads=8)", "widen(heads=8, kv_heads=4)"])
def test_decoders_of_our_own_keep_their_function(name, text):
    blocks, plan, fields = OWN[name]
    model = decoder(blocks, plan, **fields)
    new = apply(model, text)
    assert loopwise.plan_of(new) == loopwise.plan_of(model)
    assert_close(logits(new, ids_of(model)), logits(model, ids_of(model)), name)


@pytest.mark.parametrize("name", ["pre", "tied", "layer norms and biases", "branch", "branch_out", "positions"])
def test_decoders_of_our_own_take_any_width(name):
    blocks, plan, fields = OWN[name]
    model = decoder(blocks, plan, **fields)
    assert_close(logits(apply(model, "widen(hidden=40)"), ids_of(model)), logits(model, ids_of(model)), name)


def test_fresh_channels_under_both_kinds_of_norm_are_refused():
    blocks, plan, fields = OWN["both kinds of norm"]
    with pytest.raises(ValueError, match="hidden must be a multiple"):
        apply(decoder(blocks, plan, **fields), "widen(hidden=40)")


def test_a_random_first_state_is_refused_where_it_would_differ():
    loops = {"core": {"state": {"kind": "state.normal", "std": 0.5}, "update": {"kind": "update.concat"}}}
    model = decoder([modern()] * 3, "0 core:(1)x2 2", loops=loops)
    assert Widen(mlp=40).edit(model).error < 1e-5
    with pytest.raises(ValueError, match="logits differ"):
        apply(model, "widen(hidden=32)")


def test_modes_and_frozen_parameters_are_kept():
    model = tiny_model("llama", num_layers=2).train()
    model.model.norm.weight.requires_grad_(False)
    new = apply(model, "widen(hidden=64)")
    assert new.training and not new.model.norm.weight.requires_grad and new.lm_head.weight.requires_grad


# Experts


def dense(model_type):
    if model_type != "qwen3":
        return tiny_model(model_type, num_layers=3)
    fields = {"use_sliding_window": False, "layer_types": ["full_attention"] * 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config("qwen3", num_layers=3, extra=fields)).eval()
    return redrawn(model)


@pytest.mark.parametrize(("model_type", "name"), [("llama", "mixtral"), ("mistral", "mixtral"), ("qwen3", "qwen3_moe")])
@pytest.mark.parametrize("router", ["random", "zero"])
def test_a_dense_model_becomes_a_mixture(model_type, name, router):
    model = dense(model_type)
    ids_BT = tiny_inputs(model)
    edit = Upcycle(experts=4, router=router).edit(model)
    assert edit.model.config.model_type == name and edit.model.config.num_experts_per_tok == 2
    assert_close(logits(edit.model, ids_BT), logits(model, ids_BT), model_type)


def test_new_experts_learn_and_part():
    model = dense("llama")
    ids_BT = tiny_inputs(model, batch=8, length=16)
    new = Upcycle(experts=4).edit(model).model
    experts = new.model.layers[1].mlp.experts.down_proj
    gradients(new, ids_BT)
    assert all(experts.grad[number].any() for number in range(4))
    torch.optim.SGD(new.parameters(), lr=1e-2).step()
    assert not torch.equal(experts[0], experts[1])


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_experts_multiply(model_type):
    model = tiny_model(model_type, num_layers=3)
    ids_BT = tiny_inputs(model)
    edit = Upcycle(experts=8).edit(model)
    assert edit.model.config.num_experts_per_tok == 4
    assert_close(logits(edit.model, ids_BT), logits(model, ids_BT), model_type)
    old, new = gradients(model, ids_BT), gradients(edit.model, ids_BT)
    for name, gradient in old.items():
        assert_close(folded(edit.sources[name], new[name], gradient), gradient, name, tolerance=2e-4)
    name = next(name for name in new if "experts.down_proj" in name and not name.endswith("bias"))
    experts = edit.model.get_parameter(name)
    torch.optim.SGD(edit.model.parameters(), lr=1e-2).step()
    up = edit.model.get_parameter(name.replace("down_proj", "gate_up_proj"))
    assert not torch.equal(up[0], up[4]) and not torch.equal(experts[0], experts[4])


def test_a_looped_model_becomes_a_looped_mixture():
    model = loopwise.attach(dense("llama"), "0 (1)x2 2")
    new = apply(model, "upcycle(4, top_k=1)")
    assert str(loopwise.plan_of(new)) == "0 (1)x2 2"
    assert_close(logits(new, tiny_inputs(model)), logits(model, tiny_inputs(model)), "looped")


# Maps


@pytest.mark.parametrize(("heads", "kv"), [((8, 16), (2, 2)), ((8, 16), (2, 4)), ((8, 8), (2, 4)), ((6, 15), (3, 5))])
def test_query_heads_stay_with_their_kv_head(heads, kv):
    query, keys = group_heads(heads, kv, split="unequal", key="", seed=0)
    old, new = heads[0] // kv[0], heads[1] // kv[1]
    groups = query.index // old
    assert torch.equal(groups.view(kv[1], new), keys.index[:, None].expand(kv[1], new))
    for maps, number in ((query, heads[0]), (keys, kv[0])):
        total = torch.zeros(number, dtype=torch.float64).index_add(0, maps.index, maps.share)
        assert torch.allclose(total, torch.ones_like(total)), "shares of a unit add up to 1, and no unit is lost"


def test_query_heads_need_room_in_the_copies_of_their_group():
    with pytest.raises(ValueError, match="no room for the 4 of a group"):
        group_heads((12, 12), (3, 4), split="even", key="", seed=0)


def test_units_are_copied_as_often_as_each_other():
    found = replicate(5, 17, split="unequal", key="", seed=1)
    counts = torch.bincount(found.index)
    assert counts.min() == 3 and counts.max() == 4
    total = torch.zeros(5, dtype=torch.float64).index_add(0, found.index, found.share)
    assert torch.allclose(total, torch.ones_like(total))
    again, other = (replicate(5, 17, split="unequal", key="", seed=seed) for seed in (1, 2))
    assert torch.equal(again.index, found.index) and not torch.equal(other.index, found.index)
    assert all(abs(found.share[one] - found.share[two]) > 0.01 for one, two in copies(found.index))


# Bad input


@pytest.mark.parametrize(
    ("model_type", "text", "message"),
    [
        ("llama", "widen()", "at least one of hidden"),
        ("llama", "widen(mlp=0)", "must be at least 1"),
        ("llama", "widen(mlp=32)", "below the present 64"),
        ("llama", "widen(hidden=16)", "below the present 32"),
        ("llama", "widen(mlp=64)", "has already"),
        ("llama", "widen(expert_mlp=64)", "no size 'expert_mlp'"),
        ("llama", "widen(heads=7)", "not a multiple of 2"),
        ("llama", "widen(heads=6)", "multiple of the number of attention heads"),
        ("llama", 'widen(mlp=96, split="random")', "one of 'unequal', 'even'"),
        ("gpt2", "widen(hidden=48)", "not a multiple of 32"),
        ("gpt2", "widen(heads=8)", "heads=8 must be 4"),
        ("olmo2", "widen(heads=6)", "multiple of 4"),
        ("bloom", "widen(hidden=64)", "BloomForCausalLM cannot be widened"),
        ("deepseek_v4", "widen(mlp=96)", "no tensor grows with mlp"),
        ("deepseek_v3", "widen(kv_heads=4)", "already|no tensor"),
        ("gpt2", "upcycle(4)", "no known type with experts"),
        ("llama", "upcycle(1)", "at least 2"),
        ("llama", "upcycle(4, top_k=5)", "above experts=4"),
        ("mixtral", "upcycle(6)", "multiple of the present 4"),
        ("mixtral", "upcycle(8, top_k=2)", "must be 4"),
    ],
)
def test_bad_input_is_refused_in_one_line(model_type, text, message):
    model = tiny_model(model_type, num_layers=2)
    with pytest.raises(ValueError, match=message) as caught:
        apply(model, text)
    assert "\n" not in str(caught.value)


def test_models_that_cannot_be_rebuilt_say_why():
    model = tiny_model("llama", num_layers=2)
    model.config.quantization_config = {"quant_method": "x"}
    with pytest.raises(ValueError, match="quantised"):
        apply(model, "widen(mlp=96)")
    hooked = loopwise.attach(tiny_model("llama", num_layers=2), "(0-1)x2")
    set_hooks(hooked, [Nothing()])
    with pytest.raises(ValueError, match="hooks"):
        apply(hooked, "widen(mlp=96)")
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_model("llama", num_layers=2), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapters"):
        apply(wrapped, "widen(mlp=96)")


class Nothing:
    """A hook that does nothing."""

    def before(self, visit, state_BTD):
        return state_BTD

    def after(self, visit, before_BTD, state_BTD):
        return state_BTD


def test_upcycling_our_own_decoder_is_refused_by_name():
    with pytest.raises(ValueError, match="decoder of our own has no MLP with experts"):
        apply(decoder([modern()], "0"), "upcycle(4)")


def test_texts_name_the_sizes_first():
    assert parse("widen(64, 96)") == Widen(hidden=64, mlp=96)
    assert parse(Upcycle(experts=4, seed=3).text()) == Upcycle(experts=4, seed=3)
