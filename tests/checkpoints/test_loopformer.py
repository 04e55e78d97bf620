"""LoopFormer: parity with the reference over schedules, caching, round trips, other sizes, and what is refused."""

import pytest
import torch

import loopwise
from loopwise.checkpoints.loading import export_checkpoint, import_checkpoint
from loopwise.checkpoints.loopformer import LOOPFORMER
from tests.checkpoints.foreign import (
    GOLDENS,
    REMOVED,
    assert_round_trip,
    assert_same_tensors,
    config_of,
    random_checkpoint,
    spoiled,
    tensors_of,
    write,
)

GOLDEN = GOLDENS / "loopformer"
ATOL = 3e-5
CONFIG = config_of(GOLDEN)
UNEVEN = torch.tensor([0.5, 0.25, 0.125, 0.125])


@pytest.fixture(scope="module")
def model():
    return import_checkpoint(GOLDEN)


@pytest.fixture(scope="module")
def inputs():
    return tensors_of(GOLDEN, "inputs")


@pytest.mark.parametrize("name", sorted(tensors_of(GOLDEN, "expected")))
@torch.no_grad()
def test_outputs_are_those_of_the_reference(model, inputs, name):
    what, schedule = name.split("_")
    steps, expected = inputs[f"steps_{schedule}"], tensors_of(GOLDEN, "expected")[name]
    if what == "logits":
        ours = model(inputs["input_ids"], loops=len(steps), schedule=steps).logits
    else:
        options = {"schedule": steps}
        ours = model.model(inputs["input_ids"], loops=len(steps), loop_options=options).last_hidden_state
    torch.testing.assert_close(ours, expected, atol=ATOL, rtol=0)


@torch.no_grad()
def test_even_steps_need_no_schedule(model, inputs):
    assert str(loopwise.plan_of(model)) == "core:(0-1)x8"
    expected = tensors_of(GOLDEN, "expected")
    for loops, name in ((None, "logits_uniform8"), (8, "logits_uniform8"), (4, "logits_uniform4")):
        logits = model(inputs["input_ids"], loops=loops).logits
        torch.testing.assert_close(logits, expected[name], atol=ATOL, rtol=0)


@torch.no_grad()
def test_states_of_every_iteration(model, inputs):
    steps = inputs["steps_uneven3"]
    output = model(inputs["input_ids"], loops=3, schedule=steps, output_loops=True)
    assert len(output.loop_states) == 3
    last = model.model.norm(output.loop_states[-1])
    torch.testing.assert_close(last, tensors_of(GOLDEN, "expected")["hidden_uneven3"], atol=ATOL, rtol=0)


@torch.no_grad()
def test_schedule_and_loops_must_agree(model, inputs):
    with pytest.raises(ValueError, match="the schedule has 3 steps, the loop core runs 8 iterations"):
        model(inputs["input_ids"], schedule=inputs["steps_uneven3"])


def greedy(model, ids, **options):
    """Uncached greedy decoding, written out."""
    for _ in range(5):
        ids = torch.cat([ids, model(ids, use_cache=False, **options).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize(
    "options", [{}, {"loops": 1}, {"loops": 11}, {"loops": 4, "schedule": UNEVEN}], ids=["8", "1", "11", "uneven 4"]
)
@torch.no_grad()
def test_cached_decoding_equals_uncached(model, inputs, options):
    ids = inputs["input_ids"]
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, **options), greedy(model, ids, **options))


@torch.no_grad()
def test_set_loops_up_and_down(inputs):
    model, ids = import_checkpoint(GOLDEN), inputs["input_ids"]
    for loops in (12, 2):
        loopwise.set_loops(model, loops)
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), greedy(model, ids))
        assert torch.equal(model(ids).logits, model(ids, loops={"core": loops}).logits)


@torch.no_grad()
def test_left_padding_changes_nothing(model, inputs):
    ids = inputs["input_ids"].clone()
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    alone = model.generate(ids[:1, 4:], max_new_tokens=5, do_sample=False)
    assert torch.equal(batch[:1, 4:], alone)


@torch.no_grad()
def test_positions_end(model):
    ids = torch.zeros(1, 24, dtype=torch.long)
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="past num_positions=24"):
        model(ids[:, :1], past_key_values=cache)


@torch.no_grad()
def test_round_trip(model, inputs, tmp_path):
    _, again = assert_round_trip(GOLDEN, tmp_path)
    assert torch.equal(again(inputs["input_ids"]).logits, model(inputs["input_ids"]).logits)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_layer": 1, "n_head": 2, "intermediate_dim": 33},
        {"n_layer": 3, "n_embd": 24, "n_head": 3, "vocab_size": 31, "block_size": 40},
        {"bias": True, "dropout": 0.1},
    ],
    ids=["one layer", "three layers", "bias"],
)
@torch.no_grad()
def test_other_members_of_the_family(changes, tmp_path):
    source = random_checkpoint(LOOPFORMER, CONFIG | changes, tmp_path / "source")
    model, again = assert_round_trip(source, tmp_path)
    ids = torch.arange(20).view(2, 10)
    logits = model(ids, loops=4, schedule=UNEVEN).logits
    assert logits.isfinite().all() and torch.equal(again(ids, loops=4, schedule=UNEVEN).logits, logits)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), greedy(model, ids))


@pytest.mark.parametrize("prefix", ["", "gpt."])
@pytest.mark.parametrize("embedding", ["head", "embedding", "both"])
@torch.no_grad()
def test_names_that_the_public_loader_knows(prefix, embedding, model, inputs, tmp_path):
    tensors = tensors_of(GOLDEN)
    if embedding != "head":
        tensors["transformer.wte.weight"] = tensors["lm_head.weight"].clone()
    if embedding == "embedding":
        del tensors["lm_head.weight"]
    fields = CONFIG | {"num_hidden_layers": CONFIG["n_layer"], "n_positions": CONFIG["block_size"]}
    fields = {name: value for name, value in fields.items() if name not in ("n_layer", "block_size")}
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    other = import_checkpoint(write(tmp_path / "source", fields, tensors))
    assert torch.equal(other(inputs["input_ids"]).logits, model(inputs["input_ids"]).logits)
    export_checkpoint(other, tmp_path / "back")
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"dt_embedder.mlp.2.bias": REMOVED}, "lacks tensor dt_embedder.mlp.2.bias"),
        ({"transformer.h.blocks.2.attn.c_proj.weight": torch.zeros(32, 32)}, "does not know: transformer.h.blocks.2"),
        ({"transformer.h.blocks.1.attn.c_attn.weight": torch.zeros(95, 32)}, r"blocks.1.attn.c_attn.* \[96, 32\]"),
        ({"transformer.wte.weight": torch.zeros(65, 32)}, "wte.weight must be tied to lm_head.weight"),
        ({"lm_head.weight": REMOVED}, "lacks tensor transformer.wte.weight"),
    ],
    ids=["missing", "extra", "misshapen", "untied", "no embedding"],
)
def test_wrong_tensors_are_named(tensors, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        import_checkpoint(spoiled("loopformer", tmp_path / "bad", tensors=tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "yes"}, "bias='yes'"),
        ({"dropout": 1.5}, "dropout"),
        ({"n_head": 5}, "num_heads is 5"),
        ({"n_layer": 0}, "n_layer=0"),
        ({"vocab_size": REMOVED}, "lacks the field vocab_size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_unsupported_configurations_are_named(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        import_checkpoint(spoiled("loopformer", tmp_path / "bad", config=changes))
    assert "\n" not in str(error.value)


def test_gradients_reach_every_tensor(inputs):
    model, ids = import_checkpoint(GOLDEN), inputs["input_ids"]
    model(ids, labels=ids, loops=3, schedule=inputs["steps_uneven3"]).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []
