"""Huginn and the models retrofitted in its layout, against the outputs of their reference implementations.

Shapes: B rows, T tokens, D width, R iterations.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import loopwise
from loopwise.checkpoints.huginn import HUGINN, RETROFIT
from loopwise.checkpoints.loading import export_checkpoint, import_checkpoint
from loopwise.checkpoints.tensors import export_tensors
from tests.checkpoints.foreign import (
    GOLDENS,
    REMOVED,
    assert_round_trip,
    assert_same_tensors,
    config_of,
    spoiled,
    tensors_of,
    write,
)

FAMILIES = {"huginn": HUGINN, "retrofit_llama": RETROFIT}
TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def golden(request):
    folder = GOLDENS / request.param
    return (
        request.param,
        import_checkpoint(folder),
        load_file(folder / "inputs.safetensors"),
        load_file(folder / "expected.safetensors"),
    )


def start(inputs, name):
    return torch.zeros(1) if "zero" in name else inputs["input_states"]


@torch.no_grad()
def test_every_output_is_that_of_the_reference(golden):
    family, model, inputs, expected = golden
    seen = 0
    for name, want in expected.items():
        kind, *rest = name.split("_")
        if kind not in ("logits", "states", "state"):
            continue
        loops = next(int(part[1:]) for part in rest if part[0] == "r" and part[1:].isdigit())
        output = model(inputs["input_ids"], loops=loops, initial_state=start(inputs, name), output_loops=True)
        got = {
            "logits": lambda o: o.logits,
            "states": lambda o: torch.stack(o.loop_states),
            "state": lambda o: o.loop_states[-1],
        }
        torch.testing.assert_close(got[kind](output), want, atol=TOLERANCE, rtol=0, msg=name)
        seen += 1
    assert seen >= 6, family


@torch.no_grad()
@pytest.mark.parametrize("loops", [1, 3, 6])
def test_cached_greedy_decoding_equals_recomputation_left_padded(golden, loops):
    _, model, inputs, _ = golden
    ids_BT = inputs["input_ids"]
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :3] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": mask_BT, "loops": loops}
    options["initial_state"] = torch.zeros(1)
    cached = model.generate(ids_BT, **options)
    assert torch.equal(cached, model.generate(ids_BT, use_cache=False, **options))
    alone = options | {"attention_mask": mask_BT[:1, 3:]}
    assert torch.equal(cached[:1, 3:], model.generate(ids_BT[:1, 3:], **alone))


@torch.no_grad()
def test_depth_changes_at_run_time_and_saving_is_exact(golden, tmp_path):
    _, model, inputs, _ = golden
    call = {"input_ids": inputs["input_ids"], "initial_state": torch.zeros(1)}
    three = model(**call, loops=3).logits
    with loopwise.use_loops(model, core=3):
        assert torch.equal(model(**call).logits, three)
    assert not torch.allclose(model(**call, loops=1).logits, three, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**call, loops=3).logits, three)


@torch.no_grad()
def test_a_random_state_takes_a_generator(golden):
    _, model, inputs, _ = golden

    def draw(seed):
        return model(inputs["input_ids"], loops=1, generator=torch.Generator().manual_seed(seed)).logits

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    with pytest.raises(ValueError, match="generator"):
        model(inputs["input_ids"])


def test_round_trip(golden, tmp_path):
    assert_round_trip(GOLDENS / golden[0], tmp_path)


SHAPES = {
    "huginn": {
        "n_embd": 24,
        "n_heads": 3,
        "num_key_value_heads": 3,
        "n_layers_in_prelude": 1,
        "n_layers_in_recurrent_block": 2,
        "n_layers_in_coda": 3,
    },
    "retrofit_llama": {"n_embd": 24, "n_heads": 6, "num_key_value_heads": 3, "n_layers_in_coda": 1, "head_dim": 4},
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_other_shapes(family, tmp_path):
    changes = SHAPES[family] | {"vocab_size": 37, "padded_vocab_size": 40, "intermediate_size": 20, "block_size": 16}
    check_shape(
        FAMILIES[family],
        config_of(GOLDENS / family) | {"head_dim": None} | changes,
        frozenset(tensors_of(GOLDENS / family)),
        tmp_path,
    )


def test_retrofitted_olmo(tmp_path):
    names = frozenset(tensors_of(GOLDENS / "retrofit_llama")) | {"transformer.prelude.0.attn.q_norm.weight"}
    check_shape(RETROFIT, config_of(GOLDENS / "retrofit_llama"), names, tmp_path)


def check_shape(family, config, names, folder):
    """A random checkpoint of the layout that `names` tells, imported and exported again."""
    model = family.build(config, names)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    source = write(folder / "source", config, export_tensors(family.rules(config, names), dict(model.state_dict())))
    again = import_checkpoint(source)
    call = {"input_ids": torch.arange(12).view(2, 6), "initial_state": torch.zeros(1), "loops": 2}
    assert torch.equal(again(**call).logits, model.eval()(**call).logits)
    export_checkpoint(again, folder / "back")
    assert_same_tensors(tensors_of(folder / "back"), tensors_of(source))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"transformer.adapter.weight": REMOVED}, "lacks tensor transformer.adapter.weight"),
        ({"transformer.extra.weight": torch.zeros(2)}, "transformer.extra.weight"),
        ({"transformer.ln_f.weight": torch.zeros(3)}, "transformer.ln_f.weight has shape"),
        ({"lm_head.weight": torch.ones(53, 32)}, "lm_head.weight must be tied"),
    ],
)
def test_wrong_tensors_are_named(tensors, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        import_checkpoint(spoiled("huginn", tmp_path / "bad", tensors=tensors))


@pytest.mark.parametrize(
    ("changes", "message"), [({"injection_type": "gate"}, "injection_type"), ({"n_embd": REMOVED}, "n_embd")]
)
def test_unsupported_configurations_are_named(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        import_checkpoint(spoiled("huginn", tmp_path / "bad", config=changes))


def test_a_decoder_of_our_own_keeps_its_plan(golden):
    _, model, _, _ = golden
    with pytest.raises(ValueError, match="cannot be taken away"):
        loopwise.detach(model)
    with pytest.raises(ValueError, match="components of their own"):
        loopwise.materialize(model)
    assert loopwise.plan_of(model) is not None


@torch.no_grad()
def test_catching_up_starts_from_the_given_state(golden):
    _, model, inputs, _ = golden
    ids_BT = inputs["input_ids"]
    call = {"initial_state": torch.full((1,), 0.3), "use_cache": True}
    loopwise.set_cache(model, "own", on_deeper="catch_up")
    try:
        cache = model(ids_BT[:, :-1], loops=1, **call).past_key_values
        got = model(ids_BT[:, -1:], loops=3, past_key_values=cache, **call).logits
        with pytest.raises(ValueError, match="per token"):
            cache = model(ids_BT[:, :-1], loops=1, **call).past_key_values
            state = torch.zeros(2, 2, model.config.hidden_size)
            model(ids_BT[:, -2:], loops=3, past_key_values=cache, use_cache=True, initial_state=state)
    finally:
        loopwise.set_cache(model, "own")
    want = model(ids_BT, loops=3, initial_state=call["initial_state"], use_cache=False).logits[:, -1:]
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
