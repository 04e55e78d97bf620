"""The Universal Transformer against loops written out, and its losses against finite differences.

Shapes: B rows, T tokens, D width, R iterations.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from loopwise.loop.act import ActHalting
from loopwise.loop.halting import HazardHalting, PonderHalting
from loopwise.loop.signals import CoordinatesConfig
from loopwise.models.attach import set_cache
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.encoder import LoopwiseEncoder, LoopwiseEncoderConfig
from loopwise.models.readouts import exit_distribution, loop_loss
from loopwise.models.universal import universal_transformer

SIZES = {"vocab_size": 11, "hidden_size": 8, "num_heads": 2, "intermediate_size": 12, "num_iterations": 4}
IDS_BT = torch.tensor([[1, 4, 2, 9, 3, 3], [5, 10, 7, 2, 2, 8]])
RULES = ["accumulated", "basic"]


def build(*, seed=3, **fields):
    torch.manual_seed(seed)
    model = LoopwiseForCausalLM(universal_transformer(**(SIZES | fields))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter += 0.4 * torch.randn_like(parameter)
    return model


def act(rule="accumulated", **fields):
    return build(halting=ActHalting(rule=rule, epsilon=0.2), **fields)


def naive_block(model, state_TD):
    """The one block, on one row."""
    layer = model.model.layers[0]
    size, heads = state_TD.shape[-1], 2
    q, k, v = (
        p(state_TD).view(-1, heads, size // heads) for p in (layer.mixer.q_proj, layer.mixer.k_proj, layer.mixer.v_proj)
    )
    mixed = torch.zeros_like(q)
    for head in range(heads):
        for t in range(len(state_TD)):
            scores = q[t, head] @ k[: t + 1, head].T / math.sqrt(size // heads)
            mixed[t, head] = scores.softmax(-1) @ v[: t + 1, head]

    def norm(value, at):
        return F.layer_norm(value, (size,), at.weight, at.bias, 1e-6)

    state_TD = norm(state_TD + layer.mixer.o_proj(mixed.flatten(1)), layer.mixer_norm_out)
    inner = layer.mlp.down_proj(torch.relu(layer.mlp.up_proj(state_TD)))
    return norm(state_TD + inner, layer.mlp_norm_out)


def naive_signal(num_tokens, size, iteration):
    signal_TD = torch.zeros(num_tokens, size)
    for i in range(num_tokens):
        for j in range(size // 2):
            rate = 10000 ** (-2 * j / size)
            signal_TD[i, 2 * j] = math.sin(i * rate) + math.sin((iteration + 1) * rate)
            signal_TD[i, 2 * j + 1] = math.cos(i * rate) + math.cos((iteration + 1) * rate)
    return signal_TD


def naive(model, ids_T, rule=None, epsilon=0.2):
    """One row, token by token: logits, states, gate probabilities, ponder cost."""
    state_TD = model.model.embed_tokens(ids_T) * math.sqrt(8)
    num_tokens = len(ids_T)
    output, mass = torch.zeros_like(state_TD), [0.0] * num_tokens
    steps, remainder = [0] * num_tokens, [0.0] * num_tokens
    halted, states, gates = [False] * num_tokens, [], []
    for iteration in range(4):
        state_TD = state_TD + naive_signal(num_tokens, 8, iteration)
        before = state_TD
        state_TD = naive_block(model, state_TD)
        states.append(state_TD)
        gate = model.model.loops["core"].gate if rule or hasattr(model, "asks") else None
        gates.append(gate(before if rule else state_TD).sigmoid() if gate else None)
        for t in range(num_tokens):
            if rule is None or halted[t]:
                continue
            p = gates[-1][t].item()
            steps[t] += 1
            stops = iteration == 3 or mass[t] + p > 1 - epsilon
            weight = 1 - mass[t] if stops else p
            kept = 1.0 if rule == "accumulated" else 1 - weight
            output[t] = weight * state_TD[t] + kept * output[t]
            if stops:
                halted[t], remainder[t] = True, 1 - mass[t]
            mass[t] += weight
    read = state_TD if rule is None else output
    ponder = torch.tensor([n + r for n, r in zip(steps, remainder, strict=True)])
    return read @ model.model.embed_tokens.weight.T, states, gates, ponder


class Count:
    """Tokens that pass through the block."""

    def __init__(self, model):
        self.tokens = 0
        model.model.layers[0].register_forward_pre_hook(self.add)

    def add(self, _, args):
        self.tokens += args[0].shape[:2].numel()


@torch.no_grad()
def test_the_signal_is_that_of_the_paper():
    signal = CoordinatesConfig().build(8)
    for iteration in (0, 3):
        got = signal(torch.zeros(1, 6, 8), iteration, torch.arange(6)[None])
        torch.testing.assert_close(got[0], naive_signal(6, 8, iteration))
    shifted = signal(torch.zeros(2, 3, 8), 1, torch.tensor([[0, 1, 2], [3, 4, 5]]))
    torch.testing.assert_close(shifted[1], naive_signal(6, 8, 1)[3:])
    with pytest.raises(ValueError, match="width 7 is odd"):
        CoordinatesConfig().build(7)


@torch.no_grad()
def test_without_halting():
    model = build(gate=True)
    model.asks = True
    output = model(IDS_BT, output_loops=True)
    for b in range(2):
        logits, states, gates, _ = naive(model, IDS_BT[b])
        torch.testing.assert_close(output.logits[b], logits, atol=1e-5, rtol=1e-5)
        for i in range(4):
            torch.testing.assert_close(output.loop_states[i][b], states[i], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(output.gates[b, :, i], gates[i], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_adaptive_computation_time(rule):
    model = act(rule)
    output = model(IDS_BT, output_loops=True)
    for b in range(2):
        logits, states, gates, ponder = naive(model, IDS_BT[b], rule)
        torch.testing.assert_close(output.logits[b], logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.ponder[b], ponder, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.loop_states[3][b], states[3], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.gates[b, :, 2], gates[2], atol=1e-5, rtol=1e-5)
    assert output.exits.unique().numel() > 1, "the test needs tokens of different depths"
    want = (
        F.cross_entropy(output.logits[:, :-1].flatten(0, 1), IDS_BT[:, 1:].flatten())
        + 0.01 * output.ponder[:, :-1].mean()
    )
    torch.testing.assert_close(loop_loss(output, IDS_BT, loss="act"), want)


LOSSES = {
    "act-accumulated": ({"halting": ActHalting(rule="accumulated", epsilon=0.2)}, {"kind": "act", "weight": 0.3}),
    "act-basic": ({"halting": ActHalting(rule="basic", epsilon=0.2)}, {"kind": "act", "weight": 0.3}),
    "ponder": ({"gate": True}, {"kind": "ponder", "beta": 0.3, "rate": 0.4}),
    "expected": ({"gate": True}, {"kind": "expected", "beta": 0.2}),
    "expected-logits": ({"gate": True}, "expected_logits"),
    "deep": ({"gate": True}, {"kind": "deep_supervision", "weights": "linear"}),
}


@pytest.mark.parametrize("case", LOSSES)
def test_gradients_equal_finite_differences(case):
    """In float64, for every parameter, along a random direction."""
    fields, loss = LOSSES[case]
    model = build(**fields).double()
    labels_BT = IDS_BT.clone()
    labels_BT[0, 2] = -100

    def value():
        output = model(IDS_BT, output_loops=True)
        return loop_loss(output, labels_BT, loss=loss), output

    total, output = value()
    assert total.dtype == torch.float64
    if "act" in case:
        assert output.exits.unique().numel() > 1
    total.backward()
    generator = torch.Generator().manual_seed(0)
    step, num_checked = 1e-6, 0
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert "gate" in name and case == "deep", name
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        want = (parameter.grad * direction).sum().item()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step * direction
                shifted, after = value()
                parameter -= sign * step * direction
            assert torch.equal(after.exits, output.exits), "a token changed its depth: no derivative there"
            ends.append(shifted.item())
        assert abs((ends[0] - ends[1]) / (2 * step) - want) <= 1e-6 * max(1.0, abs(want)), name
        num_checked += 1
    assert num_checked >= 12
    if case != "deep":
        assert model.model.loops["core"].gate.linear.weight.grad.abs().max() > 1e-4


def test_the_ponder_cost_lowers_the_number_of_iterations():
    """The same training with and without the time penalty."""
    depths = {}
    for weight in (0.0, 1.0):
        model = build(halting=ActHalting()).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
        losses = []
        for _ in range(40):
            output = model(IDS_BT)
            total = loop_loss(output, IDS_BT, loss={"kind": "act", "weight": weight})
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses.append(loop_loss(output, IDS_BT, loss="final").item())
        depths[weight] = output.ponder.mean().item()
        assert losses[-1] < 0.6 * losses[0]
    assert depths[1.0] < depths[0.0] - 0.2


def test_the_divergence_draws_the_gate_to_its_prior():
    model = build(gate=True).train()
    optimizer = torch.optim.Adam(model.model.loops.parameters(), lr=5e-2)
    loss = {"kind": "ponder", "beta": 100.0, "rate": 0.5}
    for _ in range(150):
        optimizer.zero_grad()
        loop_loss(model(IDS_BT, output_loops=True), IDS_BT, loss=loss).backward()
        optimizer.step()
    pdf = exit_distribution(model(IDS_BT, output_loops=True)).detach()
    prior = torch.tensor([8, 4, 2, 1]) / 15
    torch.testing.assert_close(pdf[:, :-1].mean((0, 1)), prior, atol=0.03, rtol=0)
    torch.testing.assert_close(pdf.sum(-1), torch.ones(2, 6))


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_cached_decoding_equals_recomputation(rule):
    model = act(rule)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    want = model.generate(IDS_BT, use_cache=False, **options)
    assert torch.equal(model.generate(IDS_BT, use_cache=True, **options), want)
    mask_BT = torch.ones_like(IDS_BT)
    mask_BT[1, :2] = 0
    padded = model.generate(IDS_BT, attention_mask=mask_BT, **options)
    assert torch.equal(padded[1:, 2:], model.generate(IDS_BT[1:, 2:], **options))


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("policy", [None, "selected", "last"])
def test_tokens_that_have_halted_need_not_be_visited(rule, policy):
    model = act(rule)
    count = Count(model)
    if policy is not None:
        set_cache(model, policy)
    skip = model(IDS_BT, on_exit="skip", use_cache=policy is not None)
    assert count.tokens == int((skip.exits + 1).sum()) < 4 * IDS_BT.numel()
    for b in range(2):
        alone = model(IDS_BT[b : b + 1], on_exit="skip", use_cache=policy is not None)
        torch.testing.assert_close(skip.logits[b : b + 1], alone.logits, atol=1e-5, rtol=1e-5)
    if policy is not None:
        cache, logits = None, []
        for t in range(6):
            output = model(IDS_BT[:, t : t + 1], past_key_values=cache, on_exit="skip", use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        torch.testing.assert_close(torch.cat(logits, 1), skip.logits, atol=1e-5, rtol=1e-5)
    # tokens that never see a missing key are those before the first exit: the first token of each row
    dense = model(IDS_BT)
    torch.testing.assert_close(skip.logits[:, 0], dense.logits[:, 0], atol=1e-5, rtol=1e-5)
    assert torch.equal(skip.exits[:, 0], dense.exits[:, 0])


@torch.no_grad()
def test_ponder_net_halts_at_random_as_its_gate_says():
    model = build(gate=True)
    want = exit_distribution(model(IDS_BT, output_loops=True))
    generator = torch.Generator().manual_seed(5)
    counts = torch.zeros(2, 6, 4)
    for _ in range(400):
        exits = model(IDS_BT, halting=PonderHalting(), on_exit="select", generator=generator).exits
        counts += F.one_hot(exits, 4)
    torch.testing.assert_close(counts / 400, want, atol=0.1, rtol=0)
    with pytest.raises(ValueError, match="generator is None"):
        model(IDS_BT, halting=PonderHalting(), on_exit="select")


@torch.no_grad()
def test_a_saved_model_is_the_same_bit_for_bit(tmp_path):
    model = act()
    model.save_pretrained(tmp_path / "ut")
    loaded = LoopwiseForCausalLM.from_pretrained(tmp_path / "ut").eval()
    assert torch.equal(loaded(IDS_BT).logits, model(IDS_BT).logits)
    assert torch.equal(loaded(IDS_BT).ponder, model(IDS_BT).ponder)


def test_gates_start_open_for_adaptive_computation_time():
    model = LoopwiseForCausalLM(universal_transformer(**SIZES, halting=ActHalting()))
    assert model.model.loops["core"].gate.linear.bias.item() == 1.0
    model = LoopwiseForCausalLM(universal_transformer(**SIZES, gate=True))
    assert model.model.loops["core"].gate.linear.bias.item() == 0.0


@torch.no_grad()
def test_the_encoder_form():
    """The same loop over bidirectional blocks: a later token changes earlier ones."""
    config = universal_transformer(**SIZES, halting=ActHalting(epsilon=0.2)).to_dict()
    block = config["blocks"][0]
    config |= {"blocks": [block | {"mixer": block["mixer"] | {"mask": "bidirectional"}}], "embedding_size": 8}
    config |= {"heads": ["tokens"], "pools": False, "num_positions": None, "tie_word_embeddings": False}
    torch.manual_seed(0)
    model = LoopwiseEncoder(LoopwiseEncoderConfig(**config)).eval()
    output = model(IDS_BT, output_loops=True)
    assert output.ponder.shape == (2, 6) and output.prediction_logits.shape == (2, 6, 11)
    other = IDS_BT.clone()
    other[:, -1] = 0
    assert (model(other).prediction_logits[:, 0] - output.prediction_logits[:, 0]).abs().max() > 1e-4
    skip = model(IDS_BT, on_exit="skip")
    assert skip.prediction_logits.shape == (2, 6, 11)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="hidden_size=9 must be even"):
        universal_transformer(**(SIZES | {"hidden_size": 9}))
    model = build()
    with pytest.raises(ValueError, match="halting.hazard needs a gate"):
        model(IDS_BT, halting=HazardHalting(threshold=0.5), use_cache=False)
    with pytest.raises(ValueError, match="the output has no gate"):
        exit_distribution(model(IDS_BT, output_loops=True))
    with pytest.raises(ValueError, match="no logits of every iteration"):
        loop_loss(model(IDS_BT), IDS_BT, loss="deep_supervision")
    with pytest.raises(ValueError, match="ponder_BT is missing"):
        loop_loss(model(IDS_BT), IDS_BT, loss="act")
    with pytest.raises(ValueError, match="is not driven by a gate"):
        build(gate=True)(IDS_BT, halting={"kind": "latent", "threshold": 0.1}, use_cache=False)
    with pytest.raises(ValueError, match="gate='wide'"):
        LoopwiseForCausalLM(universal_transformer(**SIZES, loops={"core": {"gate": "wide"}}))
    with pytest.raises(ValueError, match="needs a gate"):
        LoopwiseForCausalLM(universal_transformer(**SIZES, loops={"core": {"halting": {"kind": "act"}}}))
