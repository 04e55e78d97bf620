"""Block influence, angular distances and knees, against naive loops over patched layers; the loss of an edit."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from tiny import tiny_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import loopwise
from loopwise.measure import influence as module
from loopwise.measure.influence import influence, knee
from loopwise.measure.loss_jump import RowLosses, loss_jump, row_losses
from loopwise.models.blocks import BlockConfig
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.hub import layer_list
from loopwise.models.mixers import AttentionConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.playing import looping_of

TYPES = "llama gpt2 mixtral mamba2 jamba qwen3_next gemma3_text olmo2 bloom gpt_neox".split()


def ids(rows: int = 3, tokens: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 99, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def states(model: nn.Module, ids_BT: torch.Tensor) -> list[torch.Tensor]:
    """What goes into every layer and what comes out of the last one, kept by replaced forwards."""
    kept: list[torch.Tensor] = []
    model = copy.deepcopy(model).eval()
    for layer in layer_list(model).layers:

        def forward(*args, run=layer.forward, **kwargs):
            kept.append(args[0] if args else kwargs["hidden_states"])
            output = run(*args, **kwargs)
            kept.append(output if isinstance(output, torch.Tensor) else output[0])
            return output

        layer.forward = forward
    model(ids_BT, use_cache=False)
    return [kept[0], *kept[1::2]]


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)


@pytest.mark.parametrize("model_type", TYPES)
def test_measures_are_those_of_the_boundaries(model_type: str) -> None:
    model, ids_BT = tiny_model(model_type), ids()
    found, h = influence(model, [ids_BT]), states(model, ids_BT)
    assert (found.rows, found.tokens, found.layers) == (3, 21, tuple(range(6)))
    for s in range(6):
        assert found.influence[s] == pytest.approx(1 - cosine(h[s], h[s + 1]).mean().item(), abs=1e-9)
        for r in range(s, 6):
            want = cosine(h[s + 1] - h[s], h[r + 1] - h[r]).mean().item()
            assert found.update_cosine[s, r] == pytest.approx(want, abs=1e-4)  # float32 differences there
            angle = cosine(h[s], h[r + 1]).clamp(-1, 1).arccos() / math.pi
            assert found.distances(r + 1 - s, "all")[s] == pytest.approx(angle.mean().item(), abs=1e-9)
            assert found.distances(r + 1 - s)[s] == pytest.approx(angle[:, -1].mean().item(), abs=1e-9)
            assert found.grid()[r - s, s] == found.distances(r + 1 - s)[s]


def test_the_last_boundary_is_before_the_final_norm() -> None:
    """`hidden_states[-1]` is not the last layer's output, so that its influence would be wrong."""
    model, ids_BT = tiny_model("llama"), ids()
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(-1, 2, 32))
        listed = model(ids_BT, output_hidden_states=True).hidden_states
    found = influence(model, [ids_BT])
    wrong = 1 - cosine(listed[-2], listed[-1]).mean().item()
    right = 1 - cosine(listed[-2], states(model, ids_BT)[-1]).mean().item()
    assert found.influence[-1] == pytest.approx(right, abs=1e-9)
    assert abs(right - wrong) > 0.1


@pytest.mark.parametrize("model_type", TYPES)
def test_a_plan_changes_nothing_but_the_visits(model_type: str) -> None:
    model, ids_BT = tiny_model(model_type), ids()
    plain = influence(model, [ids_BT])
    loopwise.attach(model, "0-5")
    attached = influence(model, [ids_BT])
    np.testing.assert_allclose(plain.last_angle, attached.last_angle, atol=1e-7)  # arccos near 1
    np.testing.assert_allclose(plain.update_cosine, attached.update_cosine, atol=1e-12)
    loopwise.detach(model)
    loopwise.attach(model, "0 core:(1-4)x2 5")
    looped = influence(model, [ids_BT])
    assert looped.layers == (0, 1, 2, 3, 4, 1, 2, 3, 4, 5)
    np.testing.assert_allclose(looped.angle[:6, :6], plain.angle[:6, :6], atol=1e-7)
    looping = looping_of(model)
    assert looping is not None and not looping.hooks


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_padding_does_not_count(model_type: str, side: str) -> None:
    model, rows = tiny_model(model_type), [ids(1, length)[0] for length in (3, 8, 5)]
    padded, mask = torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 8, dtype=torch.int64)
    for number, row in enumerate(rows):
        place = slice(8 - len(row), 8) if side == "left" else slice(0, len(row))
        padded[number, place], mask[number, place] = row, 1
    for attached in (False, True):
        if attached:
            loopwise.attach(model, "0 core:(1-4)x2 5")
        want = influence(model, [row[None] for row in rows])
        got = influence(model, [{"input_ids": padded, "attention_mask": mask}])
        assert (got.rows, got.tokens) == (want.rows, want.tokens) == (3, 16)
        for name in ("influence", "angle", "last_angle", "update_cosine"):
            np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=2e-5)
        apart = row_losses(model, [row[None] for row in rows])
        both = row_losses(model, [{"input_ids": padded, "attention_mask": mask}])
        assert list(both.counts) == [2, 7, 4] == list(apart.counts)
        np.testing.assert_allclose(both.sums, apart.sums, rtol=1e-5)


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    whole = influence(model, [ids(4)])
    monkeypatch.setattr(module, "CHUNK", 700)
    parts = influence(model, [ids(4)[:1], ids(4)[1:]])
    for name in ("influence", "state_cosine", "angle", "last_angle", "update_cosine"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), atol=1e-6)


def test_a_layer_that_does_nothing_is_found() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.zero_()
        model.model.layers[3].self_attn.o_proj.weight.zero_()
    found = influence(model, [ids()])
    assert found.influence[3] == pytest.approx(0, abs=1e-12) and found.influence.argmin() == 3
    assert found.distances(1)[3] == pytest.approx(0, abs=1e-7)
    assert not found.update_cosine[3].any()
    json.dumps(found.to_json(), allow_nan=False)


def test_several_streams_are_one_state() -> None:
    """Gemma-3n carries states of [streams, B, T, D]."""
    model, ids_BT = tiny_model("gemma3n_text"), ids()
    found, h = influence(model, [ids_BT]), states(model, ids_BT)
    assert h[0].ndim == 4 and h[0].shape[1:3] == ids_BT.shape
    flat = [state.permute(1, 2, 0, 3).flatten(2) for state in h]
    for s in range(len(found.layers)):
        assert found.influence[s] == pytest.approx(1 - cosine(flat[s], flat[s + 1]).mean().item(), abs=1e-9)


def test_our_own_decoder() -> None:
    block = BlockConfig(hidden_size=32, mixer=AttentionConfig(num_heads=2), mlp=MLPConfig(intermediate_size=48))
    config = LoopwiseDecoderConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=4,
        blocks=[block.to_dict()],
        norm={"type": "rms"},
        plan="0 core:(1-2)x3 3",
        loops={"core": {"state": {"kind": "state.zeros"}, "update": {"kind": "update.add"}}},
    )
    found = influence(LoopwiseForCausalLM(config), [ids()])
    assert found.layers == (0, 1, 2, 1, 2, 1, 2, 3)
    assert np.isfinite(found.angle).all()


@pytest.mark.parametrize(
    ("curve", "at"),
    [
        ([9, 5, 1, 0.9, 0.8, 0.7, 0.6], 2),
        ([1, 0.1, 0.1, 0.1, 0.1, 0.1, 1], 1),
        ([0, 1, 2, 3], 0),  # flat from the start, as nothing falls
        ([3, 2, 1, 0], None),  # a line
        ([1, 1, 1], None),
        ([1, 0], None),
        ([], None),
    ],
)
def test_knee(curve: list[float], at: int | None) -> None:
    assert knee(np.array(curve)) == at


def test_split_by_knees() -> None:
    model = tiny_model("llama", num_layers=8)
    with torch.no_grad():
        for layer in (2, 3, 4, 5, 6):
            for weight in (
                model.model.layers[layer].mlp.down_proj.weight,
                model.model.layers[layer].self_attn.o_proj.weight,
            ):
                weight.mul_(0.01)
    split = influence(model, [ids()]).split()
    assert split is not None and (split.prelude, split.core, split.coda) == (2, 5, 1)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batch"),
        ([torch.zeros(2, 0, dtype=torch.int64)], "no token"),
        ([{"input_ids": ids(), "attention_mask": torch.zeros(3, 7, dtype=torch.int64)}], "no token"),
        ([ids()[0]], "one shape"),
        ([{"input_ids": ids(), "attention_mask": torch.ones(3, 6)}], "one shape"),
        ([ids().float()], "whole numbers"),
    ],
)
def test_what_is_no_batch(batches: list, message: str) -> None:
    for measure in (influence, row_losses):
        with pytest.raises(ValueError, match=message):
            measure(tiny_model("llama"), batches)


def test_models_without_a_stack_are_refused() -> None:
    config = T5Config(vocab_size=99, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    with pytest.raises(ValueError, match="encoder-decoder"):
        influence(T5ForConditionalGeneration(config), [ids()])
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(math.inf)
    with pytest.raises(ValueError, match="not finite"):
        influence(model, [ids()])
    with pytest.raises(ValueError, match="fewer than two tokens"):
        row_losses(tiny_model("llama"), [ids(2, 1)])


def test_loss_jump_is_paired() -> None:
    model, batches = tiny_model("llama"), [ids(4, 9), ids(3, 5, seed=1)]
    edited = copy.deepcopy(model)
    with torch.no_grad():
        edited.model.layers[2].mlp.down_proj.weight.zero_()
    found = loss_jump(model, edited, iter(batches))
    sums = []
    for batch in batches:
        for row in batch:
            losses = []
            for one in (model, edited):
                logits = one(row[None]).logits[0, :-1]
                losses.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item())
            sums.append([*losses, len(row) - 1])
    old, new, counts = np.array(sums).T
    assert (found.rows, found.tokens) == (7, 4 * 8 + 3 * 4)
    assert found.before == pytest.approx(old.sum() / counts.sum(), rel=1e-5)
    assert found.jump == pytest.approx((new - old).sum() / counts.sum(), abs=1e-5)
    # Rows of one length: the standard error of a mean of paired differences.
    same = loss_jump(model, edited, batches[:1])
    means = ((new - old) / counts)[:4]
    assert same.standard_error == pytest.approx(means.std(ddof=1) / 2, rel=1e-3)
    assert same.standard_error < loss_spread(old, counts)
    assert f"{same.jump:+.3f}" in str(same)


def loss_spread(sums: np.ndarray, counts: np.ndarray) -> float:
    return float((sums / counts)[:4].std(ddof=1) / 2)


def test_the_error_of_a_jump_is_the_spread_over_texts() -> None:
    """Over many draws of rows of different lengths, the jump varies as its error says."""
    generator = np.random.default_rng(0)
    jumps, errors = [], []
    for _ in range(600):
        counts = generator.integers(5, 60, 20)
        noise = generator.normal(0.3, 0.5, 20) * counts
        before = RowLosses(sums=3.0 * counts, counts=counts)
        found = loss_jump(before, RowLosses(sums=before.sums + noise, counts=counts))
        jumps.append(found.jump)
        errors.append(found.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(jumps), rel=0.15)


def test_jumps_that_make_no_sense() -> None:
    model = tiny_model("llama")
    losses = row_losses(model, [ids(1)])
    with pytest.raises(ValueError, match="the same model"):
        loss_jump(model, model, [ids()])
    with pytest.raises(ValueError, match="same rows"):
        loss_jump(losses, row_losses(model, [ids(2)]))
    one = loss_jump(losses, RowLosses(sums=losses.sums + 1, counts=losses.counts))
    assert math.isnan(one.standard_error) and one.to_json()["standard_error"] is None and "+-" not in str(one)
