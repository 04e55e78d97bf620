"""The puzzle model: segments in training and evaluation, what it refuses, how it starts, how it is saved.

Parity with published models is in tests/checkpoints/test_hrm.py.
"""

from __future__ import annotations

import pytest
import torch

import loopwise
from loopwise.loop.carry import Carry
from loopwise.models.puzzle import LoopwisePuzzleConfig, LoopwisePuzzleModel

WIDTH = 12
ATTENTION = {"kind": "attention", "num_heads": 3, "mask": "bidirectional", "rope": {"dim": 4}}
BLOCK = {
    "hidden_size": WIDTH,
    "mixer": ATTENTION,
    "mlp": {"intermediate_size": 16},
    "norm": {"weight": False, "eps": 1e-5},
    "placement": "post",
}
ADD = {"kind": "update.add"}


def config(**changes) -> LoopwisePuzzleConfig:
    values = {
        "vocab_size": 7,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "blocks": [BLOCK],
        "plan": "cycle:(low:(0)x2 high:(1))x2",
        "loops": {
            "cycle": {"grad": 1},
            "low": {"update": ADD, "stream": "z_L", "reads": ["z_H", "x"], "grad": 1},
            "high": {"update": ADD, "stream": "z_H", "reads": ["z_L"]},
        },
        "streams": {"x": "input"},
        "carried": ["z_H", "z_L"],
        "norm": None,
        "embedding_scale": WIDTH**0.5,
        "num_puzzles": 4,
        "puzzle_size": 10,
        "puzzle_positions": 2,
        "halting": {"kind": "halting.segments", "max_steps": 3, "rule": "greater"},
    }
    return LoopwisePuzzleConfig(**(values | changes))


def build(**changes) -> LoopwisePuzzleModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LoopwisePuzzleModel(config(**changes)).eval()


def batch(rows: int = 3, tokens: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(7, (rows, tokens), generator=generator), torch.randint(4, (rows,), generator=generator)


def equal(one: Carry, other: Carry) -> bool:
    return all(torch.equal(one.streams[name], other.streams[name]) for name in one.streams)


def test_shapes() -> None:
    model, (inputs, ids) = build(), batch()
    output = model(inputs, ids, output_embeddings=True, output_loops="low")
    assert output.logits.shape == (3, 5, 7)
    assert output.q_halt_logits.shape == output.q_continue_logits.shape == (3,)
    assert output.input_embeddings.shape == (3, 7, WIDTH)
    assert [state.shape for state in output.loop_states] == [(3, 7, WIDTH)] * 4
    assert model(inputs, ids).loop_states is None and model(inputs, ids).input_embeddings is None


def test_no_carry_is_the_initial_carry() -> None:
    model, (inputs, ids) = build(), batch()
    carry = model.initial_carry(inputs)
    assert carry.steps.tolist() == [0, 0, 0] and carry.halted.all()
    assert torch.equal(model(inputs, ids).logits, model(inputs, ids, carry).logits)


def test_a_later_token_reaches_an_earlier_one() -> None:
    model, (inputs, ids) = build(), batch()
    changed = inputs.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 7
    moved = (model(inputs, ids).logits - model(changed, ids).logits).abs().amax(-1)
    assert (moved[0] > 0).all() and (moved[1:] == 0).all()


@torch.no_grad()
def test_evaluation_never_restarts() -> None:
    model, (inputs, ids) = build(), batch()
    carry, steps = None, []
    for _ in range(5):
        before = carry
        carry = model(inputs, ids, carry).carry
        steps.append((carry.steps.tolist(), carry.halted.tolist()))
        assert before is None or not equal(before, carry)
    assert steps[1] == ([2] * 3, [False] * 3) and steps[2] == ([3] * 3, [True] * 3) and steps[4][0] == [5] * 3
    assert not equal(carry, model(inputs, ids).carry)


@torch.no_grad()
def test_training_restarts_rows_that_have_halted() -> None:
    model, (inputs, ids) = build().train(), batch()
    first = model(inputs, ids)
    carry = Carry(streams=first.carry.streams, steps=torch.tensor([1, 1, 1]), halted=torch.tensor([False, True, False]))
    mixed = model(inputs, ids, carry)
    assert mixed.carry.steps.tolist() == [2, 1, 2]
    torch.testing.assert_close(mixed.logits[1], first.logits[1])
    assert (mixed.logits[0] - first.logits[0]).abs().max() > 1e-3


@torch.no_grad()
def test_training_halts_by_the_logits() -> None:
    model, (inputs, ids) = build().train(), batch()
    model.q_head.bias.copy_(torch.tensor([1.0, 0.0]))
    assert model(inputs, ids).carry.halted.all()
    assert not model.eval()(inputs, ids).carry.halted.any()
    model.train().q_head.bias.copy_(torch.tensor([-1.0, 0.0]))
    assert not model(inputs, ids).carry.halted.any()


def test_exploration_needs_a_generator_in_training() -> None:
    model, (inputs, ids) = build(halting={"kind": "halting.segments", "exploration": 0.5}), batch()
    model(inputs, ids)
    with pytest.raises(ValueError, match="generator"):
        model.train()(inputs, ids)
    model.train()(inputs, ids, generator=torch.Generator().manual_seed(0))


def test_a_window_of_the_call() -> None:
    """The window of the configuration keeps one call of each stack; one of the call keeps all."""
    model, (inputs, ids) = build(), batch()
    grads = []
    for window in (None, {"cycle": 2, "low": 2}):
        model.zero_grad()
        model(inputs, ids, gradient_window=window).logits.square().sum().backward()
        grads.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
    assert (grads[0] - grads[1]).abs().max() > 1e-2 * grads[1].abs().max()


def test_set_loops() -> None:
    model, (inputs, ids) = build(), batch()
    deeper = model(inputs, ids, loops={"low": 4}).logits
    assert not torch.equal(deeper, model(inputs, ids).logits)
    loopwise.set_loops(model, low=4)
    assert str(loopwise.plan_of(model)) == "cycle:(low:(0)x4 high:(1))x2"
    assert torch.equal(deeper, model(inputs, ids).logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_can_be_switched(implementation: str) -> None:
    model, (inputs, ids) = build(), batch()
    expected = model(inputs, ids).logits
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(inputs, ids).logits, expected, atol=1e-5, rtol=0)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    grads = []
    for checkpointed in (False, True):
        model, (inputs, ids) = build().train(), batch()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(inputs, ids).logits.square().sum().backward()
        grads.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, msg=name)


def test_saved_and_loaded(tmp_path) -> None:
    model, (inputs, ids) = build(), batch()
    model.save_pretrained(tmp_path)
    again = LoopwisePuzzleModel.from_pretrained(tmp_path).eval()
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(again.first["z_L"], model.first["z_L"])
    assert torch.equal(again(inputs, ids).logits, model(inputs, ids).logits)


def test_how_it_starts() -> None:
    wide = {**BLOCK, "hidden_size": 96, "mlp": {"intermediate_size": 256}}
    model = build(
        hidden_size=96, blocks=[{**wide, "mixer": {**ATTENTION, "rope": None}}], vocab_size=500, puzzle_size=90
    )
    assert not model.puzzles.weight.any() and not model.q_head.weight.any() and (model.q_head.bias == -5).all()
    std = model.model.layers[0].mlp.down_proj.weight.std().item()
    assert std == pytest.approx(256**-0.5, rel=0.05)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(96**-0.5, rel=0.05)
    assert model.lm_head.weight.std().item() == pytest.approx(96**-0.5, rel=0.05)
    assert {name for name, _ in model.named_buffers()} == {"first.z_H", "first.z_L"}
    assert 0.7 < model.first["z_H"].std().item() < 1.3


def test_models_without_puzzle_vectors() -> None:
    model, (inputs, _) = build(num_puzzles=0, puzzle_size=0, puzzle_positions=0), batch()
    assert model(inputs).logits.shape == (3, 5, 7)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"carried": ["z_H"]}, "carried"),
        ({"carried": None}, "carried"),
        ({"streams": None}, "stream x"),
        ({"puzzle_positions": 0}, "puzzle_positions"),
        ({"num_puzzles": 0}, "num_puzzles 0"),
        ({"puzzle_size": 25}, "room for 1 to 24"),
        ({"halting": {"kind": "halting.hazard"}}, "halting.hazard"),
        ({"vocab_size": 0}, "vocab_size"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build(**changes)


def test_calls_that_do_not_fit_are_refused() -> None:
    model, (inputs, ids) = build(), batch()
    carry = model(inputs, ids).carry
    cases = {
        "puzzle_ids is missing": lambda: model(inputs),
        r"puzzle_ids is of shape \[2\]": lambda: model(inputs, ids[:2]),
        "rows of tokens": lambda: model(inputs[0], ids),
        r"stream z_H of the carry has shape \[3, 7, 12\]": lambda: model(inputs[:, :4], ids, carry),
        "the carry has streams z_H": lambda: model(
            inputs, ids, Carry(streams={"z_H": carry.streams["z_H"]}, steps=carry.steps, halted=carry.halted)
        ),
        "no loop 'lwo'": lambda: model(inputs, ids, output_loops="lwo"),
        "'lwo'": lambda: model(inputs, ids, loops={"lwo": 2}),
    }
    for says, call in cases.items():
        with pytest.raises(ValueError, match=says):
            call()
    learned = build(learned_positions=6)
    with pytest.raises(ValueError, match="7 positions, learned_positions is 6"):
        learned(inputs, ids)
    assert torch.equal(model(inputs, ids).logits, model(inputs, ids).logits)  # refused calls leave nothing behind
