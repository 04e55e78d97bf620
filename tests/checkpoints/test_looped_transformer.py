"""Looped in-context learners: parity with the reference, windows, round trips, other sizes, and what is refused."""

import pytest
import torch

import loopwise
from loopwise.checkpoints.loading import import_checkpoint
from loopwise.checkpoints.looped_transformer import LOOPED_TRANSFORMER
from tests.checkpoints.foreign import (
    GOLDENS,
    REMOVED,
    assert_round_trip,
    config_of,
    random_checkpoint,
    spoiled,
    tensors_of,
)

GOLDEN = GOLDENS / "looped_transformer"
ATOL = 5e-6
CONFIG = config_of(GOLDEN)
PRODUCT = {"loop_func": "z=f(x*z)"}


@pytest.fixture(scope="module")
def model():
    return import_checkpoint(GOLDEN)


@pytest.fixture(scope="module")
def points():
    inputs = tensors_of(GOLDEN, "inputs")
    return inputs["xs"], inputs["ys"]


@pytest.mark.parametrize(
    ("name", "loops", "loop_start"),
    [("predictions_b5", 5, 0), ("predictions_b12", 12, 0), ("predictions_b5_start2", 5, 2)],
)
@torch.no_grad()
def test_predictions_are_those_of_the_reference(model, points, name, loops, loop_start):
    ours = model(*points, loops=loops, loop_start=loop_start)
    torch.testing.assert_close(ours, tensors_of(GOLDEN, "expected")[name], atol=ATOL, rtol=0)


@torch.no_grad()
def test_product_update(points, tmp_path):
    model = import_checkpoint(spoiled("looped_transformer", tmp_path / "product", config=PRODUCT))
    expected = tensors_of(GOLDEN, "expected")["predictions_b5_product"]
    torch.testing.assert_close(model(*points, loops=5), expected, atol=ATOL, rtol=0)


@torch.no_grad()
def test_depth_is_set_like_that_of_any_model(points):
    model = import_checkpoint(GOLDEN)
    assert str(loopwise.plan_of(model)) == "core:(0)x30"
    predictions = model(*points)
    assert predictions.shape == (30, 2, 9)
    loopwise.set_loops(model, 12)
    torch.testing.assert_close(model(*points), predictions[:12])
    torch.testing.assert_close(model(*points, loops={"core": 3}), predictions[:3])


@torch.no_grad()
def test_a_prediction_sees_neither_its_value_nor_later_points(model, points):
    xs, ys = points
    before = model(xs, ys, loops=3)
    later = ys.clone()
    later[:, 4:] += 1
    moved = xs.clone()
    moved[:, 5:] += 1
    assert torch.equal(model(moved, later, loops=3)[..., :5], before[..., :5])
    assert not torch.equal(model(xs, later, loops=3)[..., 5:], before[..., 5:])


def test_the_window_cuts_the_gradient(points):
    """Against the loop written out with the state detached before the window."""
    model = import_checkpoint(GOLDEN)
    xs, ys = points
    model(xs, ys, loops=5, loop_start=3).square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    model.eval()
    state = torch.zeros(2, 18, 32)
    entered = model.read_in(model.prompt(xs, ys))
    positions = model.model.loops["core"].signal.table.weight[:18]
    losses = []
    for iteration in range(5):
        state = model.model.norm(model.model.layers[0](state + entered + positions))
        if iteration < 3:
            state = state.detach()
        else:
            losses.append(model.read_out(state[:, ::2, :])[..., 0].square())
    torch.stack(losses).mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_round_trip(model, points, tmp_path):
    _, again = assert_round_trip(GOLDEN, tmp_path)
    assert torch.equal(again(*points, loops=4), model(*points, loops=4))


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({"n_layer": 3, "n_embd": 24, "n_head": 3, "n_dims": 7, "n_positions": 5}, (6, 3, 5)),
        ({"pred_type": "classification", "n_dims": 1} | PRODUCT, (6, 3, 5, 2)),
    ],
    ids=["three layers", "classification"],
)
@torch.no_grad()
def test_other_members_of_the_family(changes, shape, tmp_path):
    config = CONFIG | changes
    source = random_checkpoint(LOOPED_TRANSFORMER, config, tmp_path / "source")
    model, again = assert_round_trip(source, tmp_path)
    points = torch.randn(3, 5, config["n_dims"]), torch.randn(3, 5)
    predictions = model(*points, loops=6)
    assert predictions.shape == shape and predictions.isfinite().all()
    assert torch.equal(again(*points, loops=6), predictions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 9, 4), torch.zeros(2, 9), 2, 0), r"xs has shape \[2, 9, 4\]"),
        ((torch.zeros(2, 9, 5), torch.zeros(2, 8), 2, 0), r"ys has shape \[2, 8\]"),
        ((torch.zeros(2, 12, 5), torch.zeros(2, 12), 2, 0), "position 23 is past the 23"),
        ((torch.zeros(2, 9, 5), torch.zeros(2, 9), 2, 2), "loop_start is 2, the loop runs 2 iterations"),
        ((torch.zeros(2, 9, 5), torch.zeros(2, 9), {"cor": 2}, 0), "cor"),
    ],
    ids=["xs", "ys", "too many points", "loop_start", "loop name"],
)
def test_bad_calls_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(*arguments)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"_backbone.transformer.ln_f.bias": REMOVED}, "lacks tensor _backbone.transformer.ln_f.bias"),
        ({"_backbone.transformer.wte.weight": torch.zeros(3, 32)}, "does not know: _backbone.transformer.wte.weight"),
        ({"_backbone.transformer.wpe.weight": torch.zeros(22, 32)}, r"wpe.weight has shape \[22, 32\].*\[23, 32\]"),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_wrong_tensors_are_named(tensors, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        import_checkpoint(spoiled("looped_transformer", tmp_path / "bad", tensors=tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loop_func": "z=f(z)"}, r"loop_func='z=f\(z\)'"),
        ({"loop_func": REMOVED}, "lacks the field loop_func"),
        ({"pred_type": "ranking"}, "pred_type='ranking'"),
        ({"n_head": 5}, "num_heads is 5"),
        ({"n_dims": 0}, "n_dims=0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_unsupported_configurations_are_named(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        import_checkpoint(spoiled("looped_transformer", tmp_path / "bad", config=changes))
    assert "\n" not in str(error.value)
