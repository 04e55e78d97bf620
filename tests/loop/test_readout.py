"""Losses over iterations against sums written out token by token.

Shapes: R iterations, B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from loopwise.loop import readout
from loopwise.loop.halting import exit_log_pdf

R, B, T, V, D = 4, 2, 5, 7, 3


def draw(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_()


@pytest.fixture(name="labels_BT")
def labels_bt():
    labels = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(9))
    labels[0, 1] = labels[1, 4] = labels[1, 0] = readout.IGNORE
    return labels


@pytest.fixture(name="mask_BT")
def mask_bt(labels_BT):
    return labels_BT != readout.IGNORE


@pytest.fixture(name="losses_RBT")
def losses_rbt():
    return draw(R, B, T, seed=3).abs().detach().requires_grad_()


def valid(mask_BT):
    return [(b, t) for b in range(B) for t in range(T) if mask_BT[b, t]]


def log_softmax(row):
    total = math.log(sum(math.exp(v) for v in row))
    return [v - total for v in row]


def pdf(logits, b, t):
    probabilities, survival = [], 1.0
    for n in range(R - 1):
        lam = 1 / (1 + math.exp(-logits[n, b, t].item()))
        probabilities.append(lam * survival)
        survival *= 1 - lam
    return [*probabilities, survival]


def mean(values, num_items=None):
    values = list(values)
    return sum(values) / (len(values) if num_items is None else num_items)


def test_token_losses_ignore_and_match_the_definition(labels_BT):
    logits = draw(R, B, T, V)
    losses = readout.token_losses(logits, labels_BT)
    assert losses.shape == (R, B, T)
    for n in range(R):
        for b in range(B):
            for t in range(T):
                label = labels_BT[b, t].item()
                want = 0.0 if label == readout.IGNORE else -log_softmax(logits[n, b, t].tolist())[label]
                assert losses[n, b, t].item() == pytest.approx(want, abs=1e-12)
    assert torch.equal(readout.token_losses(logits[2], labels_BT), losses[2])
    assert readout.token_losses(logits[0].bfloat16(), labels_BT).dtype == torch.float32
    assert torch.autograd.gradcheck(lambda z: readout.token_losses(z, labels_BT), logits)


def test_shifted_labels_are_the_next_tokens():
    assert readout.shift_labels(torch.tensor([[4, 5, 6], [7, -100, 9]])).tolist() == [[5, 6, -100], [-100, 9, -100]]


def test_the_final_loss_is_that_of_a_transformers_model(labels_BT):
    logits, shifted = draw(1, B, T, V), readout.shift_labels(labels_BT)
    want = F.cross_entropy(logits[0, :, :-1].flatten(0, 1), labels_BT[:, 1:].flatten())
    got = readout.final(readout.token_losses(logits, shifted), shifted != readout.IGNORE)
    torch.testing.assert_close(got, want)


def test_means_count_valid_tokens_only(losses_RBT, mask_BT):
    poisoned = torch.where(mask_BT, losses_RBT, torch.nan)
    want = mean(losses_RBT[-1, b, t].item() for b, t in valid(mask_BT))
    assert readout.final(poisoned, mask_BT).item() == pytest.approx(want)
    (gradient,) = torch.autograd.grad(readout.final(poisoned, mask_BT), losses_RBT)
    assert torch.equal(gradient[-1], mask_BT.double() / mask_BT.sum()) and not gradient[:-1].any()


def test_num_items_joins_micro_batches(losses_RBT, mask_BT):
    total = int(mask_BT.sum())
    parts = [readout.final(losses_RBT[:, b : b + 1], mask_BT[b : b + 1], num_items=total) for b in range(B)]
    torch.testing.assert_close(sum(parts), readout.final(losses_RBT, mask_BT))
    as_tensor = readout.final(losses_RBT, mask_BT, num_items=torch.tensor(total))
    torch.testing.assert_close(as_tensor, readout.final(losses_RBT, mask_BT))


def test_no_valid_token_gives_zero_and_no_gradient(losses_RBT):
    loss = readout.final(losses_RBT, torch.zeros(B, T, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(loss, losses_RBT)
    assert loss.item() == 0 and not gradient.any()


@pytest.mark.parametrize("window", [1, 3, 4, 9])
def test_last_mean(losses_RBT, mask_BT, window):
    want = mean(losses_RBT[n, b, t].item() for n in range(max(0, R - window), R) for b, t in valid(mask_BT))
    assert readout.last_mean(losses_RBT, mask_BT, window).item() == pytest.approx(want)


@pytest.mark.parametrize(
    ("weights", "want"),
    [("uniform", [0.25] * 4), ("linear", [0.1, 0.2, 0.3, 0.4]), ("intermediate", [0.2, 0.2, 0.2, 1.0])],
)
def test_deep_supervision(losses_RBT, mask_BT, weights, want):
    loss = readout.deep_supervision(losses_RBT, mask_BT, weights, coefficient=0.2)
    terms = [mean(losses_RBT[n, b, t].item() for b, t in valid(mask_BT)) for n in range(R)]
    assert loss.item() == pytest.approx(sum(w * x for w, x in zip(want, terms, strict=True)))


def test_expected_loss_and_entropy(losses_RBT, mask_BT):
    gate = draw(R, B, T, seed=5)
    want = []
    for b, t in valid(mask_BT):
        p = pdf(gate, b, t)
        want.append(sum(p[n] * losses_RBT[n, b, t].item() + 0.1 * p[n] * math.log(p[n]) for n in range(R)))
    loss = readout.expected(losses_RBT, exit_log_pdf(gate), mask_BT, beta=0.1)
    assert loss.item() == pytest.approx(mean(want))
    assert readout.expected(losses_RBT, exit_log_pdf(gate), mask_BT, beta=0.1, num_items=30).item() == pytest.approx(
        mean(want, 30)
    )


def test_expected_logits_are_the_mean_under_the_gate():
    gate, logits = draw(R, B, T, seed=5), draw(R, B, T, V)
    mixed = readout.expected_logits(logits, exit_log_pdf(gate))
    for b in range(B):
        for t in range(T):
            want = sum(p * logits[n, b, t] for n, p in enumerate(pdf(gate, b, t)))
            torch.testing.assert_close(mixed[b, t], want)


def test_gate_loss_follows_the_paper(losses_RBT, mask_BT):
    gate, want = draw(R, B, T, seed=5), 0.0
    for n in range(1, R):
        terms = []
        for b, t in valid(mask_BT):
            gain = max(0.0, losses_RBT[n - 1, b, t].item() - losses_RBT[n, b, t].item())
            go_on = 1 / (1 + math.exp(-50 * (gain - 0.005)))
            lam = 1 / (1 + math.exp(-gate[n, b, t].item()))
            terms.append(-(go_on * math.log(1 - lam) + (1 - go_on) * math.log(lam)))
        want += mean(terms) / R
    loss = readout.gate_loss(gate, losses_RBT, mask_BT)
    assert loss.item() == pytest.approx(want)
    gradients = torch.autograd.grad(loss, [gate, losses_RBT], allow_unused=True)
    assert gradients[1] is None, "the language model must not learn from the gate's loss"
    assert not gradients[0][0].any() and gradients[0][1:, mask_BT].ne(0).all()


def test_the_gate_loss_is_least_at_its_target(losses_RBT, mask_BT):
    gain = (losses_RBT[:-1] - losses_RBT[1:]).clamp(min=0)
    target = -20 * (gain - 0.01)
    best = torch.cat([torch.zeros(1, B, T, dtype=torch.float64), target]).detach().requires_grad_()
    loss = readout.gate_loss(best, losses_RBT, mask_BT, slope=20, margin=0.01)
    (gradient,) = torch.autograd.grad(loss, best)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("rate", [0.2, 0.9])
@pytest.mark.parametrize("num_iterations", [1, 4, 20])
def test_the_geometric_prior_sums_to_one(rate, num_iterations):
    prior = readout.geometric_log_prior(rate, num_iterations).exp()
    weights = [rate * (1 - rate) ** n for n in range(num_iterations)]
    assert prior.tolist() == pytest.approx([w / sum(weights) for w in weights]) and prior.sum() == pytest.approx(1)


@pytest.mark.parametrize("rate", [0, 1, 1.5])
def test_a_prior_without_a_rate_is_refused(rate):
    with pytest.raises(ValueError, match="of the geometric prior must be between 0 and 1"):
        readout.geometric_log_prior(rate, 3)


def test_prior_kl_is_that_of_the_paper_and_not_its_reverse(mask_BT):
    gate, prior = draw(R, B, T, seed=5), readout.geometric_log_prior(0.3, R)
    forward, reverse = [], []
    for b, t in valid(mask_BT):
        p, g = pdf(gate, b, t), prior.exp().tolist()
        forward.append(sum(x * math.log(x / y) for x, y in zip(p, g, strict=True)))
        reverse.append(sum(y * math.log(y / x) for x, y in zip(p, g, strict=True)))
    got = readout.prior_kl(exit_log_pdf(gate), prior, mask_BT).item()
    assert got == pytest.approx(mean(forward)) and abs(got - mean(reverse)) > 0.01


def test_entropy_is_a_divergence_to_the_uniform_distribution(losses_RBT, mask_BT):
    log_pdf = exit_log_pdf(draw(R, B, T, seed=5))
    uniform = torch.full([R], -math.log(R), dtype=torch.float64)
    kl = readout.prior_kl(log_pdf, uniform, mask_BT)
    with_entropy = readout.expected(losses_RBT, log_pdf, mask_BT, beta=0.7)
    plain = readout.expected(losses_RBT, log_pdf, mask_BT, beta=0.0)
    torch.testing.assert_close(with_entropy, plain + 0.7 * (kl - math.log(R)))


@pytest.mark.parametrize("name", ["expected", "kl", "gate", "deep", "shortcut", "distillation"])
def test_gradients_equal_finite_differences(name, losses_RBT, mask_BT):
    gate, prior = draw(R, B, T, seed=5), readout.geometric_log_prior(0.2, R)
    losses = losses_RBT
    functions = {
        "expected": (lambda x, z: readout.expected(x, exit_log_pdf(z), mask_BT), (losses, gate)),
        "kl": (lambda z: readout.prior_kl(exit_log_pdf(z), prior, mask_BT), (gate,)),
        "gate": (lambda z: readout.gate_loss(z, losses.detach(), mask_BT), (gate,)),
        "deep": (lambda x: readout.deep_supervision(x, mask_BT, "linear"), (losses,)),
        "shortcut": (
            lambda x, y, s: readout.shortcut(x, y, draw(B, T, D).detach(), s),
            (draw(1)[0].detach().requires_grad_(), draw(1, seed=1)[0].detach().requires_grad_(), draw(B, T, D, seed=2)),
        ),
        "distillation": (
            lambda s: readout.distillation(s, draw(B, T, V).detach(), mask_BT, temperature=2.0),
            (draw(B, T, V, seed=1),),
        ),
    }
    function, inputs = functions[name]
    assert torch.autograd.gradcheck(function, inputs)


def test_kl_gradients_survive_saturated_gates(mask_BT):
    gate = (draw(R, B, T, seed=5, scale=300.0).detach().float()).requires_grad_()
    loss = readout.prior_kl(exit_log_pdf(gate), readout.geometric_log_prior(0.2, R), mask_BT)
    (gradient,) = torch.autograd.grad(loss, gate)
    assert loss.isfinite() and gradient.isfinite().all()


def test_shortcut_consistency(mask_BT):
    long_BTD, short_BTD = draw(B, T, D), draw(B, T, D, seed=1)
    loss_long, loss_short = draw(1)[0], draw(1, seed=1)[0]
    square = [
        (long_BTD[b, t, d] - short_BTD[b, t, d]).item() ** 2 for b in range(B) for t in range(T) for d in range(D)
    ]
    loss = readout.shortcut(loss_long, loss_short, long_BTD, short_BTD)
    assert loss.item() == pytest.approx(loss_long.item() + 0.1 * loss_short.item() + 0.1 * mean(square))
    assert torch.autograd.grad(loss, long_BTD, allow_unused=True) == (None,), "the long output is the target"
    masked = readout.shortcut(loss_long, loss_short, long_BTD, short_BTD, mask_BT=mask_BT, consistency_weight=1.0)
    want = mean((long_BTD[b, t, d] - short_BTD[b, t, d]).item() ** 2 for b, t in valid(mask_BT) for d in range(D))
    assert masked.item() == pytest.approx(loss_long.item() + 0.1 * loss_short.item() + want)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_distillation_is_forward_kl(mask_BT, tau):
    student, teacher, want = draw(B, T, V), draw(B, T, V, seed=1), []
    for b, t in valid(mask_BT):
        s, p = (log_softmax([x / tau for x in z[b, t].tolist()]) for z in (student, teacher))
        want.append(tau**2 * sum(math.exp(y) * (y - x) for x, y in zip(s, p, strict=True)))
    loss = readout.distillation(student, teacher, mask_BT, temperature=tau)
    assert loss.item() == pytest.approx(mean(want))
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)
    assert readout.distillation(teacher, teacher, mask_BT, temperature=tau).item() == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="temperature=0 must be above 0"):
        readout.distillation(student, teacher, mask_BT, temperature=0)
