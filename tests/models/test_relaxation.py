"""Offsets per visit of shared layers: laws 1 to 4 with them, gradients, and what does not go with them.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from laws import as_good_as, assert_close, difference
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM

import loopwise
from loopwise.loop.depth import LoopCounts
from loopwise.models.hub import layer_list
from loopwise.models.realise import materialize
from loopwise.models.relaxation import add_relaxation, relaxation_of
from loopwise.models.wrapper import COMPONENTS_FILE
from loopwise.train.optim.roles import role_of
from loopwise.train.parallel import checkpoint_loops, compile_blocks
from tests.models.common import BREADTH, LOOPED, logits, looped
from tests.models.test_recompute import ours

# Types that are unrolled without offsets too: DeepSeek and Zamba fix by number what a layer is.
UNROLLS = [model_type for model_type in BREADTH if model_type not in ("deepseek_v3", "zamba")]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def layers_of(model):
    return layer_list(model).layers


def offsets_of(model):
    return {name: p for name, p in model.named_parameters() if ".relaxation." in name}


def filled(model, std=0.05):
    """The model with random offsets, other ones at every visit."""
    generator = torch.Generator().manual_seed(3)
    for parameter in offsets_of(model).values():
        parameter.data.normal_(std=std, generator=generator)
    return model


def relaxed(model_type="llama", rank=2, plan=LOOPED, **options):
    model, ids_BT = looped(model_type, plan)
    return filled(add_relaxation(model, rank, **options)), ids_BT


@pytest.mark.parametrize("model_type", BREADTH)
def test_fresh_offsets_change_nothing(model_type):
    model, ids_BT = looped(model_type)
    want = logits(model, ids_BT)
    assert torch.equal(logits(add_relaxation(model, 2), ids_BT), want)
    assert not torch.equal(logits(filled(model), ids_BT), want)


@pytest.mark.parametrize("model_type", UNROLLS)
def test_an_unrolled_layer_has_the_tensors_of_its_visit(model_type):
    """Law 2; whether a layer multiplies twice or forms the sum first, the product is the same."""
    model, ids_BT = relaxed(model_type)
    plain = materialize(model)
    assert not any("relaxation" in name for name in plain.state_dict())
    assert_close(logits(model, ids_BT, use_cache=False), logits(plain, ids_BT, use_cache=False), "unrolled")


@pytest.mark.parametrize("model_type", BREADTH)
def test_cached_generation_equals_recomputation(model_type):
    """Law 3."""
    model, ids_BT = relaxed(model_type)

    def error(model):
        options = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
        found = [model.generate(ids_BT, use_cache=flag, **options) for flag in (True, False)]
        return difference(*(torch.stack(item.logits) for item in found), "cached against recomputed")

    as_good_as(error, model, tiny_model(model_type), "cached against recomputed")


@pytest.mark.parametrize("model_type", BREADTH)
def test_a_saved_model_computes_the_same(model_type, tmp_path):
    """Law 4, through our own door and that of transformers."""
    model, ids_BT = relaxed(model_type)
    loopwise.save(model, tmp_path / "saved")
    for again in (loopwise.load(tmp_path / "saved"), AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()):
        assert torch.equal(logits(again, ids_BT), logits(model, ids_BT))
        ours_, theirs = model.state_dict(), again.state_dict()
        assert ours_.keys() == theirs.keys() and all(torch.equal(ours_[name], theirs[name]) for name in ours_)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loopwise.load(tmp_path / "again"), ids_BT), logits(model, ids_BT))


@pytest.mark.parametrize("model_type", UNROLLS)
def test_every_offset_gets_the_gradient_of_its_visit(model_type):
    """The gradient of an offset is that of the tensor of the unrolled layer, and a shared tensor gets their sum."""
    model, ids_BT = relaxed(model_type, rank=2, plan="0 core:(1-4)x2 5")
    plain = materialize(model)
    for each in (model, plain):
        each(ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    plain_layers = layers_of(plain)
    for number in range(1, 5):
        layer, copies = layers_of(model)[number], [plain_layers[number], plain_layers[number + 4]]
        relaxation = relaxation_of(layer)
        for name in relaxation.names:
            if name not in dict(layer.named_parameters()):
                continue
            grads = [unrolled.get_parameter(name).grad for unrolled in copies]
            if grads[0] is None:  # no token has reached this expert, or torch knows no gradient of it
                continue
            same_gradient(layer.get_parameter(name).grad, grads[0] + grads[1], name)
            offset = relaxation.of(name)
            for visit, grad in enumerate(grads):
                if hasattr(offset, "A"):
                    grad = grad.mT if offset.is_transposed else grad
                    same_gradient(offset.A.grad[visit], offset.B[visit].mT @ grad, f"A of {name}")
                    same_gradient(offset.B.grad[visit], grad @ offset.A[visit].mT, f"B of {name}")
                else:
                    same_gradient(offset.offset.grad[visit], grad, f"offset of {name}")


def same_gradient(got, want, name):
    """Up to rounding; the bias of keys has a gradient of rounding alone."""
    assert (got - want).abs().max() <= 1e-4 * want.abs().max() + 1e-6, name


def test_optimizers_take_offsets_of_vectors_for_vectors():
    roles = {name.rpartition(".")[2]: role_of(name, p.shape) for name, p in offsets_of(relaxed()[0]).items()}
    assert roles == {"A": "matrix", "B": "matrix", "offset": "vector"}


def test_layers_are_the_shared_ones_between_visits():
    model, ids_BT = relaxed()
    names = [name for name, _ in model.named_parameters()]
    before = {name: parameter for name, parameter in model.named_parameters()}
    logits(model, ids_BT)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    with pytest.raises(ValueError, match="a part of its model only"):
        layers_of(model)[1](torch.zeros(1, 1, 32))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_inside_a_layer_leaves_the_shared_one(error):
    model, ids_BT = relaxed()
    want, before = logits(model, ids_BT), dict(model.named_parameters())

    def fail(*_):
        raise error

    handle = layers_of(model)[2].mlp.register_forward_hook(fail)
    with pytest.raises(error):
        logits(model, ids_BT)
    handle.remove()
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert torch.equal(logits(model, ids_BT), want)


def test_copies_and_pickles_stand_on_their_own():
    model, ids_BT = relaxed()
    want = logits(model, ids_BT)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    filled(model, std=0.3)
    for twin in twins:
        assert torch.equal(logits(twin, ids_BT), want)
        logits(filled(twin, std=0.3), ids_BT)
        assert torch.equal(logits(twin, ids_BT), logits(model, ids_BT))


def test_detach_takes_the_offsets_away():
    model, ids_BT = relaxed()
    loopwise.detach(model)
    plain = tiny_model("llama")
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(logits(model, ids_BT), logits(plain, ids_BT))


def test_loop_counts_beyond_the_known_visits():
    model, ids_BT = relaxed()
    with pytest.raises(ValueError, match="past the 2 that this delta knows"):
        logits(model, ids_BT, loops=3)
    assert not torch.equal(logits(model, ids_BT, loops=1), logits(model, ids_BT))
    for beyond, source in (("last", [0, 1, 1]), ("cycle", [0, 1, 0])):
        model, _ = relaxed(beyond=beyond)
        known, _ = relaxed(visits=dict.fromkeys(range(1, 5), 3))
        for name, parameter in offsets_of(known).items():
            parameter.data = offsets_of(model)[name].data[source]
        assert torch.equal(logits(model, ids_BT, loops=3), logits(known, ids_BT, loops=3))


def test_visits_are_counted_in_plan_order_through_overlapping_spans():
    model, ids_BT = relaxed(plan="0-3 core:(2-4)x2 5")
    plain = materialize(model)
    assert relaxation_of(layers_of(model)[2]).num_visits == 3 and relaxation_of(layers_of(model)[4]).num_visits == 2
    assert_close(logits(model, ids_BT), logits(plain, ids_BT), "unrolled")


@pytest.mark.parametrize("rank", [0, 1, None])
def test_ranks(rank):
    model, _ = relaxed(rank=rank)
    names = relaxation_of(layers_of(model)[1]).names
    assert ("mlp.up_proj.weight" in names) == (rank != 0) and "input_layernorm.weight" in names
    if rank != 0:
        assert relaxation_of(layers_of(model)[1]).of("mlp.up_proj.weight").A.shape == (2, rank or 32, 32)


def test_checkpointed_loops_and_windows_give_the_same_gradients():
    model, ids_BT = relaxed(plan="0 core:(1-4)x2 5", beyond="last")
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_loops(model)
        for options in ({}, {"loops": 3, "window": 1}):
            model.zero_grad()
            model(ids_BT, labels=ids_BT, use_cache=False, **options).loss.backward()
            found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for plain, again in ((found[0], found[2]), (found[1], found[3])):
        for name, grad in plain.items():
            assert (grad is None) == (again[name] is None) and (grad is None or torch.equal(grad, again[name])), name
    first = found[1]["model.layers.1.relaxation.offsets.mlp/up_proj/weight.B"]
    assert not first[0].any() and first[1].any()  # iterations 1 and 2 use the last offsets, of which 2 has a gradient


def test_bf16():
    model, ids_BT = relaxed()
    want = logits(model, ids_BT)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert_close(logits(half, ids_BT).float(), want, "bf16", 0.1)
    assert_close(logits(half, ids_BT).float(), logits(materialize(half), ids_BT).float(), "bf16 unrolled", 0.05)


def test_adapters_on_top():
    model, ids_BT = relaxed()
    want = logits(model, ids_BT)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    assert not torch.allclose(logits(adapted, ids_BT), want, atol=1e-3)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, ids_BT), want)
    after = logits(adapted, ids_BT)
    assert_close(logits(adapted.merge_and_unload(), ids_BT), after, "merged")
    with pytest.raises(ValueError, match="merge them first"):
        add_relaxation(get_peft_model(looped()[0], LoraConfig(r=2, target_modules=["q_proj"])), 2)


def test_compiled_layers():
    """No part of a layer is left out, and two programs do for all visits."""
    model, ids_BT = relaxed(plan="core:(0-1)x4")
    want = model(ids_BT, labels=ids_BT, use_cache=False)
    want.loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in offsets_of(model).items()}
    model.zero_grad()
    torch._dynamo.reset()
    compile_blocks(model, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=2):
        got = model(ids_BT, labels=ids_BT, use_cache=False)
    got.loss.backward()
    assert_close(got.logits, want.logits, "compiled")
    for name, parameter in offsets_of(model).items():
        assert_close(parameter.grad, grads[name], f"gradient of {name}")


def test_our_own_decoder(tmp_path):
    model = filled(add_relaxation(ours().eval(), 2))
    ids_BT = torch.arange(10).view(2, 5)
    model.save_pretrained(tmp_path / "saved")
    again = loopwise.load(tmp_path / "saved")
    assert torch.equal(logits(again, ids_BT), logits(model, ids_BT))
    assert_close(logits(materialize(model), ids_BT), logits(model, ids_BT), "unrolled")
    tokens = [model.generate(ids_BT, use_cache=flag, **GREEDY) for flag in (True, False)]
    assert torch.equal(*tokens)


def test_tensors_of_several_layers_stay_shared():
    model, ids_BT = relaxed("zamba", rank=1)
    shared = [layer for layer in layers_of(model)[1:5] if hasattr(layer, "shared_transf")]
    names = relaxation_of(shared[0]).names
    assert names and not any(name.startswith("shared_transf.") for name in names)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="no plan"):
        add_relaxation(tiny_model("llama"), 2)
    model, ids_BT = relaxed()
    with pytest.raises(ValueError, match="offsets per visit already"):
        add_relaxation(model, 2)
    with pytest.raises(ValueError, match="one depth for the batch"):
        model(ids_BT, loops=LoopCounts(no_grad_B=torch.tensor([0, 0]), grad_B=torch.tensor([1, 2])))
    with pytest.raises(ValueError, match="rank=-1 must be at least 0"):
        add_relaxation(looped()[0], -1)
    with pytest.raises(ValueError, match="names layer 9"):
        add_relaxation(looped()[0], 2, visits={9: 2})
    with pytest.raises(ValueError, match="nothing to relax"):
        add_relaxation(looped(plan="0-5")[0], 2)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="use checkpoint_loops"):
        model.train()(ids_BT, use_cache=False)
    model.eval()
    with pytest.raises(ValueError, match="'auto_map' does not hold relaxation"):
        loopwise.save(model, tmp_path / "code", format="auto_map")
    loopwise.save(model, tmp_path / "saved")
    with pytest.raises(ValueError, match="made for the plan"):
        loopwise.load(tmp_path / "saved", plan="0-5")


def test_a_damaged_file_of_components_is_named(tmp_path):
    model, _ = relaxed()
    loopwise.save(model, tmp_path / "saved")
    path = tmp_path / "saved" / COMPONENTS_FILE
    tensors = load_file(path)
    name = next(iter(sorted(tensors)))
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(ValueError, match=f"lacks tensor {name}"):
        loopwise.load(tmp_path / "saved")
    save_file(tensors | {name: torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=f"tensor {name} is .3., expected"):
        loopwise.load(tmp_path / "saved")
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        loopwise.load(tmp_path / "saved")
    path.unlink()
    with pytest.raises(ValueError, match=f"has no {COMPONENTS_FILE}"):
        loopwise.load(tmp_path / "saved")
