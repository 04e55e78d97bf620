"""Parcae: parity with the reference, caching, depth, round trips, other sizes, and what is refused."""

import pytest
import torch

import loopwise
from loopwise.checkpoints.loading import import_checkpoint
from loopwise.checkpoints.parcae import PARCAE
from tests.checkpoints.foreign import (
    GOLDENS,
    REMOVED,
    assert_round_trip,
    config_of,
    random_checkpoint,
    spoiled,
    tensors_of,
)

GOLDEN = GOLDENS / "parcae"
ATOL = 2e-5
ZERO = torch.zeros(1)
CONFIG = config_of(GOLDEN)
SMALL = CONFIG | {
    "n_embd": 32,
    "recurrent_embedding_dimension": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "recurrent_intermediation_embedding_dimension": 28,
    "padded_vocab_size": 24,
    "vocab_size": 20,
    "block_size": 16,
}


@pytest.fixture(scope="module")
def model():
    return import_checkpoint(GOLDEN)


@pytest.fixture(scope="module")
def inputs():
    return tensors_of(GOLDEN, "inputs")


@pytest.mark.parametrize("name", sorted(tensors_of(GOLDEN, "expected")))
@torch.no_grad()
def test_outputs_are_those_of_the_reference(model, inputs, name):
    what, loops, start, _ = name.split("_")
    state = inputs["input_states"] if start == "given" else ZERO
    output = model(inputs["input_ids"], loops=int(loops[1:]), initial_state=state, output_loops=True)
    ours = output.logits if what == "logits" else torch.stack(output.loop_states)
    torch.testing.assert_close(ours, tensors_of(GOLDEN, "expected")[name], atol=ATOL, rtol=0)


def test_plan(model):
    assert str(loopwise.plan_of(model)) == "0-1 core:(2-3)x4 4-5"


def greedy(model, ids, **options):
    """Uncached greedy decoding, written out."""
    for _ in range(5):
        ids = torch.cat([ids, model(ids, initial_state=ZERO, use_cache=False, **options).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("loops", [1, 4, 7])
@torch.no_grad()
def test_cached_decoding_equals_uncached_at_every_depth(model, inputs, loops):
    ids = inputs["input_ids"]
    cached = model.generate(ids, max_new_tokens=5, do_sample=False, loops=loops, initial_state=ZERO)
    assert torch.equal(cached, greedy(model, ids, loops=loops))
    with loopwise.use_loops(model, loops):
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, initial_state=ZERO), cached)


@torch.no_grad()
def test_left_padding_changes_nothing(model, inputs):
    ids = inputs["input_ids"].clone()
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, initial_state=ZERO)
    alone = model.generate(ids[:1, 4:], max_new_tokens=5, do_sample=False, initial_state=ZERO)
    assert torch.equal(batch[:1, 4:], alone)


@torch.no_grad()
def test_random_state_needs_a_generator(model, inputs):
    ids = inputs["input_ids"]
    with pytest.raises(ValueError, match="generator"):
        model(ids)
    a, b, c = (model(ids, generator=torch.Generator().manual_seed(seed)).logits for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


@torch.no_grad()
def test_round_trip(model, inputs, tmp_path):
    _, again = assert_round_trip(GOLDEN, tmp_path)
    call = {"input_ids": inputs["input_ids"], "initial_state": inputs["input_states"]}
    assert torch.equal(again(**call).logits, model(**call).logits)


# (prelude, core, coda, mean iterations, gradient window) -> layers with a table, layers with a gate; from the reference
LAYOUTS = {
    (2, 2, 2, 4, 2): ([1, 3, 5], [1, 3, 5]),
    (1, 1, 1, 3, 2): ([0, 2], [1]),
    (1, 2, 2, 3, 1): ([0, 2, 4], [1, 3]),
    (2, 3, 1, 3, 3): ([1, 3, 5], [0, 2, 4]),
    (3, 1, 0, 5, 3): ([1, 3], [0, 2]),
    (0, 2, 1, 4, 2): ([0, 2], [1]),
    (1, 3, 1, 2, 1): ([0, 2, 4], [0, 2]),
    (2, 3, 2, 3, 3): ([0, 2, 4, 6], [0, 2, 4, 6]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_tables_and_gates_of_other_depths(layout, tmp_path):
    prelude, core, coda, recurrence, window = layout
    config = SMALL | {
        "n_layers_in_prelude": prelude,
        "n_layers_in_recurrent_block": core,
        "n_layers_in_coda": coda,
        "mean_recurrence": recurrence,
        "mean_backprop_depth": window,
    }
    tables, gates = LAYOUTS[layout]
    source = random_checkpoint(PARCAE, config, tmp_path / "source")
    names = set(tensors_of(source))
    assert {name for name in names if name.startswith("value_embeds.")} == {f"value_embeds.{i}.weight" for i in tables}
    assert sum(name.endswith("ve_gate.weight") for name in names) == len(gates)
    model, _ = assert_round_trip(source, tmp_path)
    assert [i for i, layer in enumerate(model.model.layers) if layer.mixer.value_gate is not None] == gates

    ids = torch.arange(10)[None]
    before = model(ids, loops=2, initial_state=ZERO).logits
    for table in tables:
        weight = model.model.value_embeddings[str(table)].weight
        weight.mul_(2)
        changes = not torch.equal(model(ids, loops=2, initial_state=ZERO).logits, before)
        assert changes == (table in gates)
        weight.div_(2)
    for gate in gates:
        weight = model.model.layers[gate].mixer.value_gate.weight
        weight.mul_(2)
        changes = not torch.equal(model(ids, loops=2, initial_state=ZERO).logits, before)
        assert changes == (gate in tables)
        weight.div_(2)


@pytest.mark.parametrize(
    "changes",
    [
        {"injection_type": "linear"},
        {"injection_type": "add"},
        {"injection_type": "linear", "bias": True},
        {"norm_class_name": "LayerNorm", "prelude_norm": False},
        {"mlp_class_name": "GatedMLP", "nonlin_name": "SiLU"},
        {"qk_norm": False, "qk_bias": True},
        {"tie_embeddings": False, "init_strategy": "takase", "state_init": "zero"},
        {"rope_settings": {"use_rope": True, "rope_base": 1000, "rope_condense_ratio": 2}},
        {"rope_settings": {"use_rope": False}, "randomize_positions_from": 40},
        {"_class_name": REMOVED, "padded_vocab_size": None, "padding_multiple": 16},
    ],
    ids=lambda changes: " ".join(changes),
)
@torch.no_grad()
def test_other_members_of_the_family(changes, tmp_path):
    config = {name: value for name, value in (SMALL | changes).items() if value is not REMOVED}
    model, again = assert_round_trip(random_checkpoint(PARCAE, config, tmp_path / "source"), tmp_path)
    ids = torch.arange(10)[None]
    logits = model(ids, initial_state=ZERO).logits
    assert logits.isfinite().all() and torch.equal(again(ids, initial_state=ZERO).logits, logits)
    cached = model.generate(ids, max_new_tokens=5, do_sample=False, initial_state=ZERO)
    assert torch.equal(cached, greedy(model, ids))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"transformer.C.weight": REMOVED}, "lacks tensor transformer.C.weight"),
        ({"value_embeds.3.weight": REMOVED}, "lacks tensor value_embeds.3.weight"),
        ({"value_embeds.2.weight": torch.zeros(48, 36)}, "does not know: value_embeds.2.weight"),
        ({"transformer.adapter.A_log": torch.zeros(35)}, r"transformer.adapter.A_log has shape \[35\].* \[36\]"),
        ({"lm_head.weight": torch.zeros(48, 36)}, "lm_head.weight must be tied to transformer.wte.weight"),
        ({"freqs_cis": torch.zeros(1, 32, 1, 6, 2)}, "freqs_cis is not what the configuration makes of it"),
        ({"freqs_cis": torch.zeros(1, 31, 1, 6, 2)}, r"freqs_cis has shape \[1, 31"),
    ],
    ids=["missing", "missing table", "extra table", "misshapen", "untied", "wrong table", "short table"],
)
def test_wrong_tensors_are_named(tensors, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        import_checkpoint(spoiled("parcae", tmp_path / "bad", tensors=tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"injection_type": "gate"}, "injection_type='gate'"),
        ({"nonlin_name": "Tanh"}, "nonlin_name='Tanh'"),
        ({"state_init": "unit"}, "state_init='unit'"),
        ({"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ({"logit_softcap": 15.0}, "logit_softcap=15.0"),
        ({"recurrent_embedding_dimension": 48}, "recurrent_embedding_dimension=48"),
        ({"recurrent_num_attention_heads": 6}, "recurrent_num_attention_heads=6"),
        ({"use_fused_head": "full-triton", "tie_embeddings": False}, "use_fused_head='full-triton'"),
        ({"mean_backprop_depth": REMOVED}, "lacks the field mean_backprop_depth"),
        ({"n_layers_in_recurrent_block": 0}, "n_layers_in_recurrent_block=0"),
        ({"mean_recurrence": "many"}, "mean_recurrence='many'"),
        ({"num_key_value_heads": 1}, "value_embeddings of layer 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_unsupported_configurations_are_named(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        import_checkpoint(spoiled("parcae", tmp_path / "bad", config=changes))
    assert "\n" not in str(error.value)


def test_value_embeddings_need_tokens(model):
    with pytest.raises(ValueError, match="pass input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 36), initial_state=ZERO)


def test_gradients_reach_every_tensor_that_acts(inputs):
    model = import_checkpoint(GOLDEN)
    ids = inputs["input_ids"]
    model(ids, initial_state=inputs["input_states"], labels=ids, loops=2).loss.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert still == []
