"""The learned mix: the operator's formula by hand, the fit, and the plain model that it leaves."""

from __future__ import annotations

import pytest
import torch
from laws import assert_close
from tiny import tiny_inputs, tiny_model

import loopwise
from loopwise.edit.axes import sizes_of
from loopwise.edit.mix import LearnedMix, mix
from loopwise.models.hub import layer_list
from tests.models.common import logits

ALL = {"num_layers": 4, "hidden": 48, "mlp": 80}
PERIOD = 3


def periodic(seed, rows=8, length=18):
    """Rows in which every token is the one three places before: `[rows, length]`."""
    first = torch.randint(5, 13, (rows, PERIOD), generator=torch.Generator().manual_seed(seed))
    return first.repeat(1, length // PERIOD)


def trained(model_type, steps=100):
    """A small model that has learned some of the task."""
    model = tiny_model(model_type, num_layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        ids_BT = periodic(step)
        optimizer.zero_grad()
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
    return model


def loss(model, batches):
    with torch.no_grad():
        return sum(model(input_ids=ids_BT, labels=ids_BT).loss.item() for ids_BT in batches) / len(batches)


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("llama", ALL), ("gpt2", ALL | {"hidden": 64}), ("olmo2", {"num_layers": 3}), ("gemma", {"mlp": 96})],
)
def test_the_fit_lowers_the_loss_of_the_unfitted_mix(model_type, sizes):
    model = trained(model_type)
    batches, held_out = [periodic(1000 + n) for n in range(25)], [periodic(2000 + n) for n in range(4)]
    unfitted, none = mix(model, batches=batches, steps=0, **sizes)
    fitted, history = mix(model, batches=batches, steps=25, **sizes)
    assert none == [] and len(history) == 25
    assert history[-1] < history[0]
    assert loss(fitted, held_out) < loss(unfitted, held_out) - 0.01
    got = {"num_layers": len(layer_list(fitted).layers)} | sizes_of(fitted)
    assert all(got[name] == size for name, size in sizes.items())


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "gemma3_text", "mixtral", "olmo2"])
def test_what_is_baked_is_the_operator(model_type):
    model = tiny_model(model_type, num_layers=2)
    learned = LearnedMix(model, **(ALL | {"hidden": 64}), seed=1)
    ids_BT = tiny_inputs(model)
    learned.fit([ids_BT] * 2, steps=2, lr=0.01)
    with torch.no_grad():
        want = learned(input_ids=ids_BT).logits
    baked = learned.bake()
    assert type(baked) is type(model) and torch.equal(logits(baked, ids_BT), want)
    assert all(not parameter.grad_fn for parameter in baked.parameters())


def test_the_formula_by_hand():
    model = tiny_model("llama", num_layers=2)
    learned = LearnedMix(model, **ALL)
    made = {name: tensor.detach() for name, tensor in learned.tensors().items()}
    hidden = torch.cat([torch.eye(32), learned.width["hidden"].detach()])
    units = torch.cat([torch.eye(64), learned.width["mlp_3"].detach()])
    weights = learned.depth["model_layers_mlp_up_proj_weight"].detach()[3]
    assert 0.9 < weights[1] < 1 and torch.allclose(weights.sum(), torch.ones(()))
    mixed = sum(weights[n] * model.get_parameter(f"model.layers.{n}.mlp.up_proj.weight") for n in range(2))
    assert_close(made["model.layers.3.mlp.up_proj.weight"], units @ mixed @ hidden.T, "rows and columns")
    assert_close(made["model.embed_tokens.weight"], model.get_input_embeddings().weight @ hidden.T, "table")
    assert_close(made["model.norm.weight"], hidden @ model.get_parameter("model.norm.weight"), "gain")
    assert torch.allclose(learned.width["hidden"].sum(1), torch.ones(16))


def test_the_old_model_and_global_random_numbers_are_left_alone():
    model = tiny_model("llama", num_layers=2).train()
    ids_BT = tiny_inputs(model)
    before, state = [p.clone() for p in model.parameters()], torch.random.get_rng_state()
    one, first = mix(model, num_layers=3, hidden=40, batches=[ids_BT], steps=3)
    two, second = mix(model, num_layers=3, hidden=40, batches=[ids_BT], steps=3)
    other, _ = mix(model, num_layers=3, hidden=40, batches=[ids_BT], steps=3, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert first == second and one.training
    pairs = [zip(one.parameters(), model.parameters(), strict=True) for model in (two, other)]
    assert all(torch.equal(a, b) for a, b in pairs[0]) and not all(torch.equal(a, b) for a, b in pairs[1])


def test_the_mix_can_be_looped():
    model = tiny_model("llama", num_layers=2)
    big, _ = mix(model, num_layers=4, batches=[tiny_inputs(model)], steps=1)
    looped = loopwise.attach(big, "0 (1-2)x2 3")
    assert logits(looped, tiny_inputs(model)).shape[-1] == 99


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "give at least one of num_layers"),
        ({"num_layers": 2}, "above its present value"),
        ({"num_layers": 1}, "num_layers=1 is below the present 2"),
        ({"hidden": 16}, "hidden=16 is below the present 32"),
        ({"mlp": 96, "batches": []}, "batches is empty"),
        ({"mlp": 96, "steps": -1}, "steps=-1 must be at least 0"),
        ({"mlp": 96, "batches": [{"input_ids": torch.ones(1, 4, dtype=torch.int64)}]}, "no labels"),
    ],
)
def test_bad_input_is_refused_in_one_line(sizes, message):
    model = tiny_model("llama", num_layers=2)
    with pytest.raises(ValueError, match=message) as caught:
        mix(model, **({"batches": [tiny_inputs(model)]} | sizes))
    assert "\n" not in str(caught.value)


def test_a_looped_model_is_untied_first():
    model = loopwise.attach(tiny_model("llama", num_layers=2), "(0-1)x2")
    with pytest.raises(ValueError, match=r"untie\(\) it first"):
        mix(model, mlp=96, batches=[tiny_inputs(model)])
