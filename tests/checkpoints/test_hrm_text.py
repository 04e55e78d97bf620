"""HRM-Text: parity with transformers' own class, both layouts, generation with prefixes, gradients, and refusals."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import HrmTextConfig, HrmTextForCausalLM

import loopwise
from loopwise.checkpoints.hrm_text import HRM_TEXT
from loopwise.checkpoints.loading import export_checkpoint, import_checkpoint
from loopwise.models.attach import plan_of, set_cache, set_loops
from loopwise.models.causal import LoopwiseForCausalLM
from tests.checkpoints.foreign import GOLDENS, config_of, tensors_of, write

GOLDEN = GOLDENS / "hrm_text"
ATOL = 1e-5
GREEDY = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}

MEMBERS = {
    "biases_and_ties": {
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "hidden_act": "gelu_pytorch_tanh",
        "H_cycles": 3,
        "L_cycles": 1,
    },
    "one_layer_wide_heads": {"num_hidden_layers": 1, "head_dim": 12, "num_attention_heads": 2, "rms_norm_eps": 1e-3},
    "scaled_rope_causal": {
        "prefix_lm": False,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
        "embedding_scale": None,
        "num_hidden_layers": 3,
        "H_cycles": 1,
    },
}


def golden() -> tuple[dict, dict[str, torch.Tensor]]:
    return config_of(GOLDEN), tensors_of(GOLDEN)


def read(part: str) -> dict[str, torch.Tensor]:
    return tensors_of(GOLDEN, part)


@pytest.fixture(scope="module", params=["split", "fused"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden in the layout of transformers' class, and in that of the hub."""
    place = tmp_path_factory.mktemp("hrm_text")
    shutil.copy(GOLDEN / "config.json", place)
    name = "model.safetensors" if request.param == "split" else "model_on_disk.safetensors"
    shutil.copy(GOLDEN / name, place / "model.safetensors")
    return place


@pytest.fixture(scope="module")
def model() -> LoopwiseForCausalLM:
    return import_checkpoint(GOLDEN)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


def test_parity_of_every_expected_tensor(folder: Path) -> None:
    model, given, expected = import_checkpoint(folder), read("inputs"), read("expected")
    ids = given["input_ids"]
    with torch.no_grad():
        causal = model(ids, output_loops="low")
        found = {
            "logits_causal": causal.logits,
            "z_L_calls_causal": torch.stack(causal.loop_states),
            "z_H_calls_causal": torch.stack(model(ids, output_loops="high").loop_states),
            "logits_prefix": model(ids, token_type_ids=given["token_type_ids"]).logits,
        }
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        close(found[key], value)
    assert str(plan_of(model)) == "cycle:(low:(0-1)x3 high:(2-3))x2"


def test_export_is_the_checkpoint_again(folder: Path, tmp_path: Path) -> None:
    export_checkpoint(import_checkpoint(folder), tmp_path / "out")
    tensors, again = (tensors_of(place) for place in (folder, tmp_path / "out"))
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert config_of(tmp_path / "out") == golden()[0]


def test_saved_model_is_bit_identical(model: LoopwiseForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "ours")
    again = LoopwiseForCausalLM.from_pretrained(tmp_path / "ours").eval()
    given = read("inputs")
    with torch.no_grad():
        assert torch.equal(again(**given).logits, model(**given).logits)
    assert not {name for name, _ in again.named_parameters() if "streams" in name}


def test_one_call_loads_our_model(folder: Path, tmp_path: Path) -> None:
    """transformers knows this type too; its class keeps the loop to itself."""
    model = loopwise.load(folder)
    assert isinstance(model, LoopwiseForCausalLM) and not model.training
    set_loops(model, low=1, cycle=3)
    loopwise.save(model, tmp_path / "ours")
    again = loopwise.load(tmp_path / "ours")
    assert plan_of(again) == plan_of(model)
    with torch.no_grad():
        assert torch.equal(again(**read("inputs")).logits, model(**read("inputs")).logits)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("layout", ["split", "fused"])
def test_other_members_equal_the_class_of_transformers(name: str, layout: str, tmp_path: Path) -> None:
    base = {"vocab_size": 29, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2}
    base |= {"num_attention_heads": 3, "head_dim": 8, "max_position_embeddings": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = HrmTextForCausalLM(HrmTextConfig(**(base | MEMBERS[name]))).eval()
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        ids = torch.randint(29, (2, 9))
        types = (torch.arange(9) < torch.tensor([[4], [6]])).long()
    theirs.tie_weights()
    theirs.save_pretrained(tmp_path / "fused")
    source = tmp_path / "fused"
    if layout == "split":
        config = config_of(source)
        tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
        tensors = {key: value for key, value in theirs.state_dict().items() if key not in tied}
        source = write(tmp_path / "split", config, tensors)
    ours = import_checkpoint(source)
    with torch.no_grad():
        close(ours(ids).logits, theirs(ids).logits)
        close(ours(ids, token_type_ids=types).logits, theirs(ids, token_type_ids=types).logits)
    export_checkpoint(ours, tmp_path / "out")
    tensors, again = (tensors_of(place) for place in (source, tmp_path / "out"))
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_configuration_of_the_hub(tmp_path: Path) -> None:
    """Upstream writes the layers per stack, a bare rope_theta, and L_bp_steps in the place of L_bp_cycles."""
    config, tensors = golden()
    hub = {key: value for key, value in config.items() if key not in ("num_layers_per_stack", "L_bp_cycles")}
    del hub["rope_parameters"]
    hub |= {"num_hidden_layers": 2, "rope_theta": 10000.0, "L_bp_steps": [0, 3], "num_key_value_heads": 4}
    model = import_checkpoint(write(tmp_path / "hub", hub, tensors))
    with torch.no_grad():
        close(model(read("inputs")["input_ids"]).logits, read("expected")["logits_causal"])
    assert model.model.loops["low"].grad == [0, 3]


PROMPTS = ("plain", "prefix", "whole_prompt", "left_padded", "left_padded_prefix")


def prompt(kind: str) -> dict[str, torch.Tensor]:
    given = read("inputs")
    ids, types = given["input_ids"], given["token_type_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    extra = {
        "plain": {},
        "prefix": {"token_type_ids": types},
        "whole_prompt": {"token_type_ids": torch.ones_like(types)},
        "left_padded": {"attention_mask": mask},
        "left_padded_prefix": {"attention_mask": mask, "token_type_ids": types * mask},
    }
    return {"input_ids": ids, **extra[kind]}


@pytest.mark.parametrize("kind", PROMPTS)
def test_cached_generation_is_full_recomputation(model: LoopwiseForCausalLM, kind: str) -> None:
    given = prompt(kind)
    cached = model.generate(**given, **GREEDY)
    assert torch.equal(cached, model.generate(**given, **GREEDY, use_cache=False))
    assert torch.equal(cached, model.generate(**given, **GREEDY, cache_implementation="static"))
    theirs = HrmTextForCausalLM.from_pretrained(GOLDEN)
    assert torch.equal(cached, theirs.generate(**given, **GREEDY))


@pytest.mark.parametrize("kind", PROMPTS)
def test_cached_logits_at_every_token(model: LoopwiseForCausalLM, kind: str) -> None:
    """Prefill of the prompt, then one token at a time, against the whole sequence at once."""
    given = prompt(kind)
    ids = torch.cat([given.pop("input_ids"), torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])], dim=1)
    long = {"attention_mask": 1, "token_type_ids": 0}
    whole = {key: torch.nn.functional.pad(value, (0, 4), value=long[key]) for key, value in given.items()}
    mask = whole.get("attention_mask", torch.ones_like(ids))
    whole["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, **whole, use_cache=False).logits
        first = {key: value[:, :10] for key, value in whole.items()}
        output = model(ids[:, :10], **first, use_cache=True)
        parts = [output.logits]
        for t in range(10, 14):
            step = {"attention_mask": mask[:, : t + 1], "position_ids": whole["position_ids"][:, t : t + 1]}
            output = model(ids[:, t : t + 1], **step, past_key_values=output.past_key_values, use_cache=True)
            parts.append(output.logits)
    real = mask.bool()
    close(torch.cat(parts, dim=1)[real], expected[real])


def test_a_prefix_changes_what_earlier_tokens_see(model: LoopwiseForCausalLM) -> None:
    given, changed = prompt("prefix"), prompt("prefix")
    changed["input_ids"] = given["input_ids"].clone()
    changed["input_ids"][1, 2] += 1  # the last token of the prefix of row 1
    with torch.no_grad():
        moved = (model(**given).logits - model(**changed).logits).abs().amax(-1)
        causal = (model(given["input_ids"]).logits - model(changed["input_ids"]).logits).abs().amax(-1)
    assert (moved[1, :2] > 1e-3).all() and moved[0].max() == 0
    assert causal[1, :2].max() == 0


@pytest.mark.parametrize("loops", [{"low": 1}, {"low": 5}, {"cycle": 4}, {"cycle": 1, "high": 2}])
def test_depth_changes_at_run_time(model: LoopwiseForCausalLM, loops: dict[str, int]) -> None:
    given = prompt("prefix")
    cached = model.generate(**given, **GREEDY, loops=loops)
    assert torch.equal(cached, model.generate(**given, **GREEDY, loops=loops, use_cache=False))
    changed = import_checkpoint(GOLDEN)
    set_loops(changed, **loops)
    with torch.no_grad():
        assert torch.equal(changed(**given).logits, model(**given, loops=loops).logits)
        assert not torch.equal(changed(**given).logits, model(**given).logits)


@pytest.mark.parametrize("bp_cycles", [[2], [0, 3], [3, 0], [1], [1, 1, 1]])
def test_gradients_equal_those_of_transformers(bp_cycles: list[int], tmp_path: Path) -> None:
    config, tensors = golden()
    folder = write(tmp_path / "in", config | {"L_bp_cycles": bp_cycles}, tensors)
    ours, theirs = import_checkpoint(folder), HrmTextForCausalLM.from_pretrained(folder)
    given = prompt("prefix")
    for each in (ours, theirs):
        each(**given, labels=given["input_ids"]).loss.backward()
    expected, found = dict(theirs.named_parameters()), dict(ours.named_parameters())
    for rule in HRM_TEXT.rules(config, frozenset(tensors)):
        if rule.foreign == "model.z_L_init":
            continue
        want, got = expected[rule.foreign].grad, found[rule.ours[0]].grad
        torch.testing.assert_close(got, want, atol=1e-5 * float(want.abs().max()), rtol=0, msg=rule.foreign)


def test_the_window_matters(tmp_path: Path) -> None:
    """Otherwise the test above would pass without one."""
    config, tensors = golden()
    grads = []
    for i, bp_cycles in enumerate(([3, 3], [0, 1])):
        model = import_checkpoint(write(tmp_path / str(i), config | {"L_bp_cycles": bp_cycles}, tensors))
        model(**prompt("plain"), labels=prompt("plain")["input_ids"]).loss.backward()
        grads.append(model.model.layers[0].mixer.q_proj.weight.grad)
    assert (grads[0] - grads[1]).abs().max() > 0.05 * grads[0].abs().max()


@pytest.mark.parametrize(("policy", "on_deeper"), [("last", "refuse"), ("ring(2)", "refuse"), ("own", "catch_up")])
def test_a_prefix_is_refused_where_tokens_go_one_by_one(policy: str, on_deeper: str) -> None:
    model = import_checkpoint(GOLDEN)
    set_cache(model, policy, on_deeper)
    with pytest.raises(ValueError, match="prefix"), torch.no_grad():
        model(**prompt("prefix"), use_cache=True)
    with torch.no_grad():
        model(**prompt("plain"), use_cache=True)


def test_a_prefix_comes_in_one_call(model: LoopwiseForCausalLM) -> None:
    given = prompt("whole_prompt")
    ids, types = given["input_ids"], given["token_type_ids"]
    with torch.no_grad():
        cache = model(ids[:, :6], token_type_ids=types[:, :6], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="first call"):
            model(ids[:, 6:], token_type_ids=types[:, 6:], past_key_values=cache)
        model(ids[:, 6:], token_type_ids=0 * types[:, 6:], past_key_values=cache)
    with pytest.raises(ValueError, match="first call"):
        model.generate(**given, **GREEDY, prefill_chunk_size=4)
    chunked = model.generate(**prompt("prefix"), **GREEDY, prefill_chunk_size=6)
    assert torch.equal(chunked, model.generate(**prompt("prefix"), **GREEDY))


def test_wrong_tensors_are_named(folder: Path, tmp_path: Path) -> None:
    config, tensors = golden()[0], tensors_of(folder)
    key = next(key for key in sorted(tensors) if key.endswith("o_proj.weight"))
    with pytest.raises(ValueError, match=f"lacks tensor {key}"):
        import_checkpoint(write(tmp_path / "less", config, {k: v for k, v in tensors.items() if k != key}))
    with pytest.raises(ValueError, match="model.zH_init"):
        import_checkpoint(write(tmp_path / "more", config, tensors | {"model.zH_init": torch.ones(32)}))
    with pytest.raises(ValueError, match=rf"{key} has shape \[32, 31\].*\[32, 32\]"):
        import_checkpoint(write(tmp_path / "shape", config, tensors | {key: tensors[key][:, 1:]}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
        ({"L_bp_cycles": 2}, "L_bp_cycles=2"),
        ({"L_bp_cycles": [-1]}, r"L_bp_cycles=\[-1\]"),
        ({"H_cycles": 0}, "H_cycles=0"),
        ({"num_layers_per_stack": 0}, "num_layers_per_stack=0"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters.*dynamic"),
        ({"head_dim": 7}, "head_dim=7"),
    ],
)
def test_unsupported_values_are_named(changes: dict, says: str, tmp_path: Path) -> None:
    config, tensors = golden()
    with pytest.raises(ValueError, match=says) as caught:
        import_checkpoint(write(tmp_path / "in", config | changes, tensors))
    assert "\n" not in str(caught.value)
