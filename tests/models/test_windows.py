"""Gradient windows and depths per row: against models written out, and against rows that run alone.

Shapes: B rows, T tokens, D width.
"""

from __future__ import annotations

import pytest
import torch
from laws import assert_close
from tiny import tiny_inputs, tiny_model

import loopwise
from loopwise.loop.depth import LoopCount, LoopCounts
from loopwise.loop.state import NormalState, RowSeeds
from loopwise.loop.update import AddConfig, ConcatConfig, DecayConfig
from loopwise.models.hub import layer_list
from loopwise.models.playing import looping_of
from loopwise.models.regression import LoopwiseForRegression
from loopwise.train.models import DecoderModel, Loop, RegressionModel
from tests.models.common import logits, looped

PLAN = "0 core:(1-4)x3 5"
SLICED = ["llama", "gpt2", "bloom", "gemma3_text", "mixtral", "mamba2", "qwen3_next", "bert"]
COUNTS = LoopCounts(no_grad_B=torch.tensor([0, 2, 1, 0]), grad_B=torch.tensor([1, 1, 2, 3]))
SIZES = {"layers": 3, "width": 16, "heads": 2, "plan": "0 core:(1)x2 2", "init_std": 0.3}
OURS = {
    "plain": {},
    "add": {"loop": Loop(update=AddConfig())},
    "random state": {"loop": Loop(state=NormalState(std=0.5), update=ConcatConfig(), turn_norm=True)},
    "decay": {"loop": Loop(state=NormalState(std=0.5), update=DecayConfig())},
    "ends with the loop": {"loop": Loop(update=AddConfig(), turn_norm=True), "plan": "0-1 core:(2)x2"},
    "exit norm": {"extra": {"loops": {"core": {"exit": {"type": "rms"}, "entry": {"type": "rms"}}}}},
    "signal": {"extra": {"loops": {"core": {"signal": {"kind": "signal.coordinates"}}}}},
    "post norm": {"placement": "post", "norm": "layer", "positions": "learned"},
}


def ours(name):
    model, _ = DecoderModel(**(SIZES | OURS[name])).build(13, seed=0)
    return model, torch.randint(0, 13, (4, 6), generator=torch.Generator().manual_seed(1))


def gradients(model, loss):
    """What the loss gives to every parameter; zeros are left out, as a window may leave either."""
    model.zero_grad()
    loss.backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: gradient for name, gradient in named.items() if bool(gradient.any())}


def assert_same(got, want):
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    scale = max(float(gradient.abs().max()) for gradient in want.values())
    for name, gradient in want.items():  # the gradient of a key's bias is rounding alone
        error = float((got[name] - gradient).abs().max())
        assert error <= 2e-5 * max(float(gradient.abs().max()), 1e-3 * scale), f"{name}: {error:.2g} of {scale:.2g}"


def squares(model, ids_BT, **options):
    """A scalar in which every logit counts."""
    return model(input_ids=ids_BT, use_cache=False, **options).logits.square().mean()


def unrolled_window(model, ids_BT, window):
    """Gradients of the layers copied in visit order, cut where the window begins, summed over the copies of a layer."""
    plan = loopwise.plan_of(model)
    copied = loopwise.materialize(model).train()
    first = next(i for i, slot in enumerate(plan.slots) if slot.iterations and slot.iterations[0] >= 3 - window)

    def cut(_, args, kwargs):
        kwargs = {name: v.detach() if name == "hidden_states" else v for name, v in kwargs.items()}
        return (args[0].detach(), *args[1:]) if args else args, kwargs

    layer_list(copied).layers[first].register_forward_pre_hook(cut, with_kwargs=True)
    total = {}
    for name, gradient in gradients(copied, squares(copied, ids_BT)).items():
        path = layer_list(copied).path + "."
        if name.startswith(path):
            index, _, rest = name.removeprefix(path).partition(".")
            name = f"{path}{plan.layers[int(index)]}.{rest}"
        total[name] = total.get(name, 0) + gradient
    return total


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mamba2"])
def test_a_window_is_the_unrolled_model_cut_where_it_begins(model_type, window):
    model, ids_BT = looped(model_type, plan=PLAN)
    model.train()
    want = unrolled_window(model, ids_BT, window)
    assert_same(gradients(model, squares(model, ids_BT, window=window)), want)
    assert torch.equal(logits(model, ids_BT, window=window), logits(model, ids_BT))


def test_a_window_by_name_by_number_and_as_a_count_are_the_same():
    model, ids_BT = looped(plan=PLAN)
    want = gradients(model, squares(model, ids_BT, loops=4, window=2))
    for options in ({"loops": {"core": 4}, "window": {"core": 2}}, {"loops": LoopCount(no_grad=2, grad=2)}):
        assert_same(gradients(model, squares(model, ids_BT, **options)), want)
    unnamed, _ = looped(plan="0 (1-4)x3 5")
    assert_same(gradients(unnamed, squares(unnamed, ids_BT, loops=4, window=2)), want)
    assert len(gradients(model, squares(model, ids_BT))) > len(want), "the embedding is before the window"


def test_a_window_is_of_one_call_only():
    model, ids_BT = looped(plan=PLAN)
    want = gradients(model, squares(model, ids_BT))
    squares(model, ids_BT, window=1)
    with pytest.raises(ValueError, match="no loop 'heart'"):
        model(ids_BT, window={"heart": 1})
    assert_same(gradients(model, squares(model, ids_BT)), want)
    assert looping_of(model).window is None and looping_of(model).hooks == []


def test_a_window_of_our_decoder_keeps_the_gradient_of_what_re_enters():
    model, ids_BT = ours("add")
    layers, norm = model.model.layers, model.model.norm
    positions = torch.arange(6)[None]
    arguments = model.model._arguments(model.model.embed_tokens(ids_BT), None, positions, None)

    def run(index, state_BTD):
        return layers[index](
            state_BTD, position_ids=positions, past_key_values=None, use_cache=False, **arguments[index]
        )

    entered_BTD = run(0, model.model.embed_tokens(ids_BT))
    state_BTD = entered_BTD
    for iteration in range(5):
        with torch.set_grad_enabled(iteration >= 3):
            state_BTD = run(1, state_BTD + entered_BTD)
    want_BTV = model.lm_head(norm(run(2, state_BTD)))
    want = gradients(model, want_BTV.square().mean())
    assert "model.embed_tokens.weight" in want
    got = model(ids_BT, loops=LoopCount(no_grad=3, grad=2), use_cache=False).logits
    assert_close(got, want_BTV, "logits")
    assert_same(gradients(model, squares(model, ids_BT, loops=5, window=2)), want)


def test_a_window_of_the_call_replaces_that_of_the_configuration():
    model, _ = DecoderModel(**SIZES, extra={"loops": {"core": {"grad": 1}}}).build(13, seed=0)
    plain, ids_BT = ours("plain")
    assert_same(gradients(model, squares(model, ids_BT)), gradients(plain, squares(plain, ids_BT, window=1)))
    assert_same(gradients(model, squares(model, ids_BT, window=2)), gradients(plain, squares(plain, ids_BT)))


def alone(model, ids_BT, **options):
    """Logits and summed gradients of every row by itself at its own counts."""
    rows, total = [], {}
    for row, (no_grad, grad) in enumerate(zip(COUNTS.no_grad_B.tolist(), COUNTS.grad_B.tolist(), strict=True)):
        own = {name: seeds.at(seeds.place, torch.tensor([row])) for name, seeds in options.items()}
        count = LoopCount(no_grad=no_grad, grad=grad)
        rows.append(model(input_ids=ids_BT[row : row + 1], use_cache=False, loops=count, **own).logits)
        for name, gradient in gradients(model, rows[-1].square().mean() / len(ids_BT)).items():
            total[name] = total.get(name, 0) + gradient
    return torch.cat(rows), total


def assert_rows(model, ids_BT, **options):
    want_BTV, want = alone(model, ids_BT, **options)
    got_BTV = model(input_ids=ids_BT, use_cache=False, loops=COUNTS, **options).logits
    assert_close(got_BTV, want_BTV, "logits")
    assert_same(gradients(model, got_BTV.square().mean()), want)


@pytest.mark.parametrize("model_type", SLICED)
def test_rows_of_transformers_models_are_what_they_are_alone(model_type):
    model = loopwise.attach(tiny_model(model_type), PLAN)
    assert_rows(model, tiny_inputs(model, batch=4))
    assert looping_of(model).hooks == []


@pytest.mark.parametrize("name", OURS)
def test_rows_of_our_decoder_are_what_they_are_alone(name):
    model, ids_BT = ours(name)
    assert_rows(model, ids_BT, generator=RowSeeds(seed=1, step=2, rows=(4, 5, 6, 7)))


def test_finished_rows_are_not_computed():
    model, ids_BT = looped(plan=PLAN)
    ids_BT = tiny_inputs(model, batch=4)
    model(ids_BT, loops=COUNTS, use_cache=False)  # learns how to slice
    sizes = []
    layer_list(model).layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    model(ids_BT, loops=COUNTS, use_cache=False)
    assert sizes == [2, 1, 4, 2, 1] and sum(sizes) == int(COUNTS.total_B.sum())


def test_rows_of_points_are_what_they_are_alone():
    model, _ = RegressionModel(
        layers=1, width=16, heads=2, inputs=2, plan="core:(0)x2", loop=Loop(update=AddConfig())
    ).build(0, seed=0)
    assert isinstance(model, LoopwiseForRegression)
    xs_BNI = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    ys_BN = xs_BNI.sum(-1)
    got_BN = model(xs_BNI, ys_BN, loops=COUNTS)[-1]
    for row in range(4):
        count = LoopCount(no_grad=int(COUNTS.no_grad_B[row]), grad=int(COUNTS.grad_B[row]))
        assert_close(got_BN[row], model(xs_BNI[row : row + 1], ys_BN[row : row + 1], loops=count)[-1, 0], f"row {row}")


def test_random_states_belong_to_a_row_of_a_step():
    model, ids_BT = ours("random state")
    seeds = RowSeeds(seed=1, step=2, rows=(0, 1, 2, 3))
    whole = model(ids_BT, generator=seeds).logits
    assert torch.equal(whole, model(ids_BT, generator=seeds).logits), "drawing again gives it again"
    part = model(ids_BT[2:], generator=RowSeeds(seed=1, step=2, rows=(2, 3))).logits
    assert_close(part, whole[2:], "the second micro-batch")
    for other in (RowSeeds(seed=2, step=2, rows=(0, 1, 2, 3)), RowSeeds(seed=1, step=3, rows=(0, 1, 2, 3))):
        assert not torch.allclose(model(ids_BT, generator=other).logits, whole, atol=1e-3)
    with pytest.raises(ValueError, match="seeds of 2 rows for a batch of 4"):
        model(ids_BT, generator=RowSeeds(seed=1, step=2, rows=(0, 1)))


def test_what_has_no_depth_per_row_is_named():
    model, ids_BT = looped(plan=PLAN)
    with pytest.raises(ValueError, match="given for 4 rows, the batch has 2"):
        model(ids_BT, loops=COUNTS, use_cache=False)
    with pytest.raises(ValueError, match="window=1: LoopCounts says itself"):
        model(ids_BT, loops=COUNTS, window=1)
    flat, _ = looped(plan="0-5")
    with pytest.raises(ValueError, match="no loop"):
        flat(ids_BT, loops=COUNTS)
    gated, _ = DecoderModel(**SIZES, loop=Loop(gate=True)).build(13, seed=0)
    with pytest.raises(ValueError, match="loop 'core' has an exit gate at work"):
        gated(tiny_inputs(model, batch=4) % 13, loops=COUNTS, output_loops=True)


def test_logits_of_single_tokens_are_those_of_all():
    model, ids_BT = ours("ends with the loop")
    keep_BT = torch.rand(ids_BT.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    whole = model(ids_BT, output_loops=True)
    some = model(ids_BT, output_loops=True, logits_to_keep=keep_BT)
    assert_close(some.logits, whole.logits[keep_BT], "logits")
    for got, want in zip(some.loop_logits, whole.loop_logits, strict=True):
        assert_close(got, want[keep_BT], "logits of an iteration")
