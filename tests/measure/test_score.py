"""Perplexity: every token once, whatever the windows are."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_inputs, tiny_model
from torch import nn

import loopwise
from loopwise.edit.apply import apply
from loopwise.measure import Score, perplexity

LENGTH = 23


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def ids(model: nn.Module) -> torch.Tensor:
    return tiny_inputs(model, batch=1, length=LENGTH)


def by_hand(model: nn.Module, ids: torch.Tensor, window: int, stride: int) -> list[float]:
    """One forward pass per predicted token, on the context that its window gives it."""
    values = []
    for target in range(1, ids.shape[1]):
        # The first window that predicts this token.
        start = 0
        while target > start + window:
            start += stride
        with torch.no_grad():
            logits = model(ids[:, start:target]).logits[0, -1]
        values.append(-logits.log_softmax(-1)[ids[0, target]].item())
    return values


@pytest.mark.parametrize(
    ("window", "stride"),
    [(w, s) for w in (1, 2, 5, 7, 11, 21, 22, 23, 512) for s in (1, 3, None) if s is None or s <= w],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_equals_one_forward_pass_per_token(
    model: nn.Module, ids: torch.Tensor, window: int, stride: int | None, batch_size: int
) -> None:
    score = perplexity(model, ids, window=window, stride=stride, batch_size=batch_size, per_token=True)
    expected = by_hand(model, ids, window, stride or window)
    assert score.tokens == len(expected) == LENGTH - 1
    assert score.token_nll is not None and score.token_nll.dtype == torch.float32
    assert score.token_nll.tolist() == pytest.approx(expected, rel=1e-4)
    assert score.nll == pytest.approx(math.fsum(expected) / len(expected), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(score.nll))
    assert score.bits_per_token == pytest.approx(math.log2(score.perplexity))


def test_one_window_is_the_loss_of_transformers(model: nn.Module, ids: torch.Tensor) -> None:
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert perplexity(model, ids).nll == pytest.approx(loss, rel=1e-5)


def test_forms_of_the_text(model: nn.Module, ids: torch.Tensor) -> None:
    nll = perplexity(model, ids).nll
    assert perplexity(model, ids[0]).nll == nll
    assert perplexity(model, ids[0].tolist()).nll == nll
    assert perplexity(model, ids.to(torch.int32)).nll == nll
    assert perplexity(model, ids).token_nll is None


def test_a_looped_model_scores_as_its_unrolled_twin(ids: torch.Tensor) -> None:
    looped = loopwise.attach(tiny_model("llama"), "0-1 (2-3)x2 4-5")
    twin = loopwise.materialize(looped)
    score, expected = (perplexity(m, ids, window=8, stride=4, per_token=True) for m in (looped, twin))
    assert score.token_nll is not None and expected.token_nll is not None
    assert torch.equal(score.token_nll, expected.token_nll)
    assert score.nll != perplexity(loopwise.detach(looped), ids, window=8, stride=4).nll


def test_modes_and_gradients_are_left_alone(model: nn.Module, ids: torch.Tensor) -> None:
    model.train()
    model.model.layers[0].eval()
    perplexity(model, ids)
    assert model.training and not model.model.layers[0].training
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())
    model.eval()


def test_half_precision_losses_are_computed_in_fp32(ids: torch.Tensor) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    with torch.no_grad():
        logits = model(ids).logits.float()
    expected = nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert perplexity(model, ids).nll == pytest.approx(expected.item(), rel=1e-3)


def test_a_hopeless_text_has_infinite_perplexity() -> None:
    assert Score(tokens=1, nll=1000.0).perplexity == math.inf
    assert Score(tokens=1, nll=math.inf).perplexity == math.inf
    assert math.isnan(Score(tokens=1, nll=math.nan).perplexity)


@pytest.mark.parametrize(
    ("input_ids", "arguments", "message"),
    [
        ([], {}, "0 tokens"),
        ([5], {}, "1 tokens"),
        ([[5, 6], [7, 8]], {}, "one text"),
        ([5.0, 6.0], {}, "integers"),
        ([5, 6, 7], {"window": 0}, "window"),
        ([5, 6, 7], {"window": 4, "stride": 5}, "stride"),
        ([5, 6, 7], {"stride": 0}, "stride"),
        ([5, 6, 7], {"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_arguments(model: nn.Module, input_ids: list, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        perplexity(model, input_ids, **arguments)
    assert "\n" not in str(caught.value)


def test_a_loop_that_starts_at_random_is_scored_by_a_seed(model: nn.Module, ids: torch.Tensor) -> None:
    layers = model.config.num_hidden_layers
    looped = apply(model, f"retrofit(0, {layers}, 0, adapter=random, iterations=2)")
    first, again, other = (perplexity(looped, ids, seed=seed).nll for seed in (1, 1, 2))
    assert first == again != other
