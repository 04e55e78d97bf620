"""Ouro: parity with the published file, export, cached decoding, and exits that save visits.

Shapes: B rows, T tokens, D width, R iterations.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loopwise
from loopwise.checkpoints.loading import export_checkpoint, import_checkpoint
from loopwise.checkpoints.ouro import OURO
from loopwise.checkpoints.tensors import export_tensors
from loopwise.loop.halting import HazardHalting, cdf_exit
from loopwise.models.attach import set_cache
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.readouts import exit_distribution, expected_logits, loop_loss, selected_logits
from loopwise.models.rotary import rotary_tables

GOLDEN = Path(__file__).parents[1] / "goldens" / "ouro"
ATOL = 2e-5
EXPECTED = load_file(GOLDEN / "expected.safetensors")
IDS_BT = load_file(GOLDEN / "inputs.safetensors")["input_ids"]
CONFIG = json.loads((GOLDEN / "config.json").read_text(encoding="utf-8"))


@pytest.fixture
def model():
    return import_checkpoint(GOLDEN)


def assert_golden(got, name):
    torch.testing.assert_close(got, EXPECTED[name], atol=ATOL, rtol=0)


def assert_close(got, want):
    torch.testing.assert_close(got, want, atol=ATOL, rtol=0)


class Count:
    """How many tokens pass through the layers, counted where it costs: at the layers themselves."""

    def __init__(self, model):
        self.tokens = 0
        for layer in model.model.layers:
            layer.register_forward_pre_hook(self.add)

    def add(self, _, args):
        self.tokens += args[0].shape[:2].numel()

    def of(self, call):
        self.tokens = 0
        return call(), self.tokens


def one_by_one(model, ids_BT, **options):
    """Logits, exits and cache of single-token calls."""
    cache, logits, exits = None, [], []
    for t in range(ids_BT.shape[1]):
        output = model(ids_BT[:, t : t + 1], past_key_values=cache, use_cache=True, **options)
        cache = output.past_key_values
        logits.append(output.logits)
        exits.append(output.exits)
    return torch.cat(logits, 1), None if exits[0] is None else torch.cat(exits, 1), cache


def write(folder, config, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder


def changed(tmp_path, tensors=None, **fields):
    source = load_file(GOLDEN / "model.safetensors")
    return write(tmp_path / "changed", CONFIG | fields, tensors(source) if tensors else source)


@torch.no_grad()
def test_every_iteration_equals_the_published_one(model):
    output = model(IDS_BT, output_loops=True)
    assert_golden(output.logits, "logits_default")
    for i in range(4):
        assert_golden(output.loop_logits[i], f"logits_loop{i + 1}")
        assert_golden(model(IDS_BT, loops=i + 1).logits, f"logits_loop{i + 1}")
    assert_golden(torch.stack(output.loop_states), "hidden_loops")
    assert_golden(output.gates, "gate_lambda")
    assert_golden(exit_distribution(output), "exit_pdf")
    assert_golden(expected_logits(output), "logits_expected")
    kept = model(IDS_BT, output_loops=True, logits_to_keep=2)
    torch.testing.assert_close(kept.loop_logits[1], output.loop_logits[1][:, -2:])


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.5, 0.75])
def test_selection_equals_the_published_one(model, threshold):
    rule = HazardHalting(threshold=threshold)
    output = model(IDS_BT, halting=rule, on_exit="select")
    assert_golden(output.logits, f"logits_threshold_{threshold}")
    assert torch.equal(output.exits, EXPECTED[f"exit_loop_threshold_{threshold}"])
    logits, exits = selected_logits(model(IDS_BT, output_loops=True), threshold)
    torch.testing.assert_close(logits, output.logits)
    assert torch.equal(exits, output.exits)


@torch.no_grad()
def test_the_selection_of_the_configuration_is_the_default(tmp_path):
    model = import_checkpoint(changed(tmp_path, early_exit_threshold=0.5))
    assert_golden(model(IDS_BT).logits, "logits_threshold_0.5")


@torch.no_grad()
def test_a_fixed_exit_step_of_the_configuration_is_a_number_of_iterations(tmp_path):
    model = import_checkpoint(changed(tmp_path, early_exit_step=1, early_exit_threshold=0.5))
    assert_golden(model(IDS_BT).logits, "logits_loop2")


@torch.no_grad()
def test_losses_of_the_paper_and_of_the_published_file(model):
    output = model(IDS_BT, output_loops=True)
    assert_golden(loop_loss(output, IDS_BT, loss="expected_logits")[None], "loss_hf_labels")
    # the paper's first stage written out: sum_t p_t CE_t - 0.1 H(p)
    total = 0.0
    for b, t in ((b, t) for b in range(2) for t in range(8)):
        p = EXPECTED["exit_pdf"][b, t]
        ce = torch.stack([-EXPECTED[f"logits_loop{i + 1}"][b, t].log_softmax(-1)[IDS_BT[b, t + 1]] for i in range(4)])
        total += (p * ce).sum() + 0.1 * (p * p.log()).sum()
    torch.testing.assert_close(loop_loss(output, IDS_BT, loss="expected"), total / 16)
    ignored = torch.full_like(IDS_BT, -100)
    assert loop_loss(output, ignored).item() == 0


def test_gradients_reach_gate_and_layers_through_the_expected_loss(model):
    loop_loss(model(IDS_BT, output_loops=True), IDS_BT).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_export_gives_the_same_tensors(model, tmp_path):
    export_checkpoint(model, tmp_path / "out")
    want, got = load_file(GOLDEN / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8")) == CONFIG


@torch.no_grad()
def test_a_saved_model_is_the_same_bit_for_bit(model, tmp_path):
    model.save_pretrained(tmp_path / "own")
    loaded = LoopwiseForCausalLM.from_pretrained(tmp_path / "own").eval()
    assert torch.equal(loaded(IDS_BT).logits, model(IDS_BT).logits)
    export_checkpoint(loaded, tmp_path / "out")
    want, got = load_file(GOLDEN / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(want[name], got[name]) for name in want)


@torch.no_grad()
@pytest.mark.parametrize("loops", [None, 2, 6])
@pytest.mark.parametrize("padded", [False, True])
def test_cached_decoding_equals_recomputation(model, loops, padded):
    ids_BT, mask_BT = IDS_BT.clone(), torch.ones_like(IDS_BT)
    if padded:
        mask_BT[1, :3] = 0
    if loops is not None:
        loopwise.set_loops(model, loops)
    options = {"attention_mask": mask_BT, "max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids_BT, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids_BT, use_cache=False, **options))
    if padded:
        alone = model.generate(ids_BT[1:, 3:], max_new_tokens=7, do_sample=False, pad_token_id=0)
        assert torch.equal(cached[1:, 3:], alone)


@torch.no_grad()
def test_the_number_of_iterations_of_one_generation(model):
    want = model.generate(IDS_BT, max_new_tokens=5, do_sample=False, loops=2)
    loopwise.set_loops(model, core=2)
    assert torch.equal(model.generate(IDS_BT, max_new_tokens=5, do_sample=False), want)


# --- exits that save visits ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("policy", [None, "selected", "last"])
def test_thresholds_at_the_ends(model, policy):
    """1 visits everything and changes nothing; 0 runs one iteration."""
    count, options = Count(model), {"use_cache": policy is not None}
    if policy is not None:
        set_cache(model, policy)
    (whole, full), tokens = count.of(
        lambda: (model(IDS_BT, **options).logits, model(IDS_BT, loops=1, **options).logits)
    )
    per_iteration = IDS_BT.numel() * 2
    assert tokens == 5 * per_iteration
    never, visits = count.of(lambda: model(IDS_BT, halting=HazardHalting(threshold=1.0), **options))
    assert torch.equal(never.logits, whole) and visits == 4 * per_iteration
    assert bool((never.exits == 3).all())
    at_once, visits = count.of(lambda: model(IDS_BT, halting=HazardHalting(threshold=0.0), **options))
    assert torch.equal(at_once.logits, full) and visits == per_iteration
    assert bool((at_once.exits == 0).all())


def naive_skip(model, ids_T, threshold):
    """One row, written out: tokens that have left are neither queries nor keys. Returns logits, exits, visits."""
    state_TD = model.model.embed_tokens(ids_T)
    survival = [1.0] * len(ids_T)
    running, exits, visits = list(range(len(ids_T))), [3] * len(ids_T), 0
    for iteration in range(4):
        part_1tD = state_TD[running][None]
        for layer in model.model.layers:
            tables = rotary_tables(torch.tensor([running]), layer.block_config.mixer.rope)
            part_1tD = layer(part_1tD, position_embeddings=tables)
            visits += len(running)
        part_1tD = model.model.norm(part_1tD)
        state_TD = state_TD.index_copy(0, torch.tensor(running), part_1tD[0])
        chance = model.model.loops["core"].gate(part_1tD)[0].sigmoid().tolist()
        for t, value in zip(list(running), chance, strict=True):
            survival[t] *= 1 - value
            if 1 - survival[t] >= threshold:
                exits[t] = iteration
                running.remove(t)
        if not running:
            break
    return model.lm_head(state_TD), exits, visits


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.75, 0.9])
def test_skipped_visits_equal_the_row_by_row_oracle(model, threshold):
    count, rule = Count(model), HazardHalting(threshold=threshold)
    output, visits = count.of(lambda: model(IDS_BT, halting=rule, use_cache=False))
    want = 0
    for b in range(2):
        (logits, exits, _), tokens = count.of(lambda b=b: naive_skip(model, IDS_BT[b], threshold))
        assert_close(output.logits[b], logits)
        assert output.exits[b].tolist() == exits
        want += tokens
    assert visits == want == 2 * int((output.exits + 1).sum())
    assert visits < 4 * 2 * IDS_BT.numel()
    # where the gate has been asked so far, it is asked again: before the first exit, skipping and selecting agree
    select = model(IDS_BT, halting=rule, on_exit="select", output_loops=True)
    skip = model(IDS_BT, halting=rule, use_cache=False, output_loops=True)
    assert_close(skip.gates[..., 0], select.gates[..., 0])
    assert bool(skip.gates.isnan().any()) and len(skip.loop_states) == 4


@torch.no_grad()
@pytest.mark.parametrize("policy", ["selected", "last", "first"])
@pytest.mark.parametrize("threshold", [0.5, 0.75])
def test_exits_with_a_cache_equal_recomputation_and_do_not_depend_on_batch_mates(model, policy, threshold):
    set_cache(model, policy)
    options = {"halting": HazardHalting(threshold=threshold)}
    logits, exits, _ = one_by_one(model, IDS_BT, **options)
    if policy == "selected":  # the exact policy: as if there were no cache
        whole = model(IDS_BT, use_cache=False, **options)
        prefilled = model(IDS_BT, **options)
        assert_close(prefilled.logits, whole.logits)
        assert torch.equal(prefilled.exits, whole.exits)
    else:
        whole = model(IDS_BT, **options)
    assert_close(logits, whole.logits)
    assert torch.equal(exits, whole.exits)
    for b in range(2):
        alone, alone_exits, _ = one_by_one(model, IDS_BT[b : b + 1], **options)
        assert_close(logits[b : b + 1], alone)
        assert torch.equal(exits[b : b + 1], alone_exits)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["selected", "last"])
def test_one_row_leaves_exactly_where_the_selection_says(model, policy):
    """On the same states: the same cache and token, all iterations run, and read by the published rule."""
    set_cache(model, policy)
    threshold, cache, early = 0.6, None, 0
    count, rule = Count(model), HazardHalting(threshold=threshold)
    for t in range(IDS_BT.shape[1]):
        token = IDS_BT[:1, t : t + 1]
        options = {"use_cache": True, "halting": rule}
        full = model(token, past_key_values=copy.deepcopy(cache), on_exit="select", output_loops=True, **options)
        want = cdf_exit(full.gate_logits.sigmoid().movedim(-1, 0), threshold)
        output, visits = count.of(
            lambda token=token, cache=cache, options=options: model(token, past_key_values=cache, **options)
        )
        cache = output.past_key_values
        assert torch.equal(output.exits, want) and torch.equal(full.exits, want)
        assert_close(output.logits, full.loop_logits[int(want)])
        assert visits == 2 * (int(want) + 1)
        early += int(want < 3)
    assert early >= 3


@torch.no_grad()
def test_a_row_that_has_left_keeps_the_keys_and_values_of_its_exit(model):
    set_cache(model, "last")
    rule = HazardHalting(threshold=0.6)
    _, exits, cache = one_by_one(model, IDS_BT, halting=rule)
    assert exits.unique().numel() == 4
    for b in range(2):
        # token by token, a cache in which every token ran exactly its own number of iterations
        alone = None
        for t in range(IDS_BT.shape[1]):
            token, loops = IDS_BT[b : b + 1, t : t + 1], int(exits[b, t]) + 1
            alone = model(token, past_key_values=alone, use_cache=True, loops=loops).past_key_values
        for entry, own in zip(cache.layers, alone.layers, strict=True):
            assert_close(entry.keys[b], own.keys[0])
            assert_close(entry.values[b], own.values[0])


@torch.no_grad()
@pytest.mark.parametrize("policy", ["selected", "last", "own/last"])
def test_generation_with_exits(model, policy):
    """Left-padded rows generate what they generate alone, with fewer visits than without exits."""
    set_cache(model, policy)
    count, rule = Count(model), HazardHalting(threshold=0.6)
    ids_BT, mask_BT = IDS_BT.clone(), torch.ones_like(IDS_BT)
    mask_BT[1, :3] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    both, visits = count.of(lambda: model.generate(ids_BT, attention_mask=mask_BT, halting=rule, **options))
    alone = model.generate(ids_BT[1:, 3:], halting=rule, **options)
    assert torch.equal(both[1:, 3:], alone)
    _, all_visits = count.of(lambda: model.generate(ids_BT, attention_mask=mask_BT, **options))
    assert visits < all_visits
    if policy != "own/last":
        uncached = model.generate(ids_BT, attention_mask=mask_BT, halting=rule, use_cache=False, **options)
        assert torch.equal(both, uncached)


def test_exits_are_refused_where_they_would_leave_gaps(model):
    rule = HazardHalting(threshold=0.5)
    with pytest.raises(ValueError, match="missing in a cache of policy own"):
        model(IDS_BT, halting=rule)
    set_cache(model, "ring(2)")
    with pytest.raises(ValueError, match=r"policy ring\(2\)"):
        model(IDS_BT, halting=rule)
    with pytest.raises(ValueError, match="on_exit='later'"):
        model(IDS_BT, halting=rule, on_exit="later", use_cache=False)
    with pytest.raises(ValueError, match="halting.hazzard.*halting.hazard"):
        model(IDS_BT, halting={"kind": "hazzard"})
    set_cache(model, "own")
    with pytest.raises(ValueError, match="not visited again"):
        loop_loss(model(IDS_BT, halting=rule, use_cache=False, output_loops=True), IDS_BT)


# --- other checkpoints of the family ---------------------------------------------------------------------------------

OTHER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "use_sliding_window": True,
    "sliding_window": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 6,
    "hidden_act": "gelu",
    "rope_theta": 500.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "tie_word_embeddings": True,
    "total_ut_steps": 5,
    "vocab_size": 31,
}


def random_tensors(config):
    torch.manual_seed(0)
    model = OURO.build(config, frozenset())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return export_tensors(OURO.rules(config, frozenset()), dict(model.state_dict()))


@torch.no_grad()
def test_other_sizes_round_trip(tmp_path):
    config = CONFIG | OTHER
    tensors = random_tensors(config)
    assert tensors["model.layers.2.self_attn.k_proj.weight"].shape == (18, 24) and "lm_head.weight" not in tensors
    model = import_checkpoint(write(tmp_path / "other", config, tensors))
    assert str(loopwise.plan_of(model)) == "core:(0-2)x5"
    export_checkpoint(model, tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == tensors.keys() and all(torch.equal(got[name], tensors[name]) for name in got)
    ids_BT = IDS_BT % 31
    cached = model.generate(ids_BT, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, model.generate(ids_BT, max_new_tokens=6, do_sample=False, use_cache=False))
    wide = import_checkpoint(write(tmp_path / "wide", config | {"sliding_window": 99}, tensors))
    assert (wide(ids_BT).logits - model(ids_BT).logits).abs().max() > 0.01
    assert_close(wide(ids_BT[:, :3]).logits, model(ids_BT[:, :3]).logits)
    # exits with a window: the row-subset writer keeps fewer tokens than it returns
    set_cache(model, "last")
    rule = HazardHalting(threshold=0.5)
    logits, exits, _ = one_by_one(model, ids_BT, halting=rule)
    assert exits.unique().numel() > 1
    for b in range(2):
        alone, _, _ = one_by_one(model, ids_BT[b : b + 1], halting=rule)
        assert_close(logits[b : b + 1], alone)


@torch.no_grad()
def test_windows_without_layer_types_follow_max_window_layers(tmp_path):
    config = {key: value for key, value in (CONFIG | OTHER).items() if key != "layer_types"}
    config |= {"max_window_layers": 1, "num_key_value_heads": None, "head_dim": None}
    model = import_checkpoint(write(tmp_path / "other", config, random_tensors(config)))
    assert [layer.block_config.mixer.sliding_window for layer in model.model.layers] == [None, 3, 3]
    assert model.model.layers[0].mixer.k_proj.weight.shape == (24, 24)


def test_a_tied_head_must_be_equal(tmp_path):
    config = CONFIG | OTHER
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    with pytest.raises(ValueError, match="lm_head.weight must be tied to model.embed_tokens.weight"):
        import_checkpoint(write(tmp_path / "untied", config, tensors))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"}, "lacks tensor model.norm.weight"),
        (lambda t: t | {"model.extra": torch.zeros(1)}, "does not know: model.extra"),
        (
            lambda t: t | {"model.early_exit_gate.weight": torch.zeros(2, 32)},
            r"early_exit_gate.weight has shape \[2, 32\]",
        ),
    ],
)
def test_the_first_wrong_tensor_is_named(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message) as error:
        import_checkpoint(changed(tmp_path, tensors))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "tanh"}, "hidden_act='tanh'"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"total_ut_steps": 0}, "total_ut_steps=0"),
        ({"early_exit_threshold": 1.5}, "early_exit_threshold=1.5"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers='2'"),
    ],
)
def test_unsupported_values_are_named(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message) as error:
        import_checkpoint(changed(tmp_path, **fields))
    assert "\n" not in str(error.value)
