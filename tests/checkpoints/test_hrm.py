"""HRM and TRM: parity with the published implementations, round trips, gradients, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import loopwise
from loopwise.checkpoints.hrm import HRM, TRM
from loopwise.checkpoints.loading import export_checkpoint, import_checkpoint
from loopwise.checkpoints.tensors import export_tensors
from loopwise.models.attach import plan_of, set_loops
from loopwise.models.puzzle import LoopwisePuzzleModel
from tests.checkpoints import naive_reasoner
from tests.checkpoints.foreign import GOLDENS, config_of, tensors_of, write

FOLDERS = ("hrm", "trm_attention", "trm_mlp_t")
ATOL = 2e-5

# Other members of the families: every choice that the code has, in sizes that the goldens do not have.
SMALL = {
    "H_cycles": 2,
    "L_cycles": 3,
    "H_layers": 2,
    "L_layers": 1,
    "batch_size": 3,
    "expansion": 3.0,
    "forward_dtype": "float32",
    "halt_exploration_prob": 0.1,
    "halt_max_steps": 9,
    "hidden_size": 12,
    "num_heads": 3,
    "num_puzzle_identifiers": 5,
    "puzzle_emb_ndim": 12,
    "seq_len": 7,
    "vocab_size": 9,
    "pos_encodings": "rope",
}
MEMBERS = {
    "hrm_learned_wide_vector": (HRM, {"pos_encodings": "learned", "puzzle_emb_ndim": 17}, 2),
    "hrm_no_puzzles": (HRM, {"puzzle_emb_ndim": 0, "rope_theta": 500.0, "rms_norm_eps": 1e-3}, 0),
    "hrm_one_cycle": (HRM, {"H_cycles": 1, "L_cycles": 1, "L_layers": 3, "expansion": 70.0}, 1),
    "trm_learned": (TRM, {"pos_encodings": "learned", "puzzle_emb_len": 3}, 3),
    "trm_no_positions": (TRM, {"pos_encodings": "none", "puzzle_emb_len": 0, "puzzle_emb_ndim": 20}, 2),
    "trm_default_length": (TRM, {"H_cycles": 4}, 16),
    "trm_mlp": (TRM, {"pos_encodings": "none", "mlp_t": True, "L_layers": 2, "puzzle_emb_len": 1}, 1),
    "trm_mlp_no_puzzles": (
        TRM,
        {"mlp_t": True, "puzzle_emb_ndim": 0, "puzzle_emb_len": 0, "no_ACT_continue": False},
        0,
    ),
}


def golden(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    return config_of(GOLDENS / name), tensors_of(GOLDENS / name)


def member(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Configuration and random tensors of one of MEMBERS, named as its own checkpoints are."""
    family, changes, _ = MEMBERS[name]
    config = SMALL | changes
    generator = torch.Generator().manual_seed(len(name))
    with torch.random.fork_rng():
        state = family.build(config, frozenset()).state_dict()
    for tensor in state.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.15 if tensor.ndim > 1 else 1.0))
    return config, export_tensors(family.rules(config, frozenset()), state)


def batch(config: dict) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randint(config["vocab_size"], (3, config["seq_len"]), generator=generator)
    return inputs, torch.randint(config["num_puzzle_identifiers"], (3,), generator=generator)


def segments(model: LoopwisePuzzleModel, inputs, ids, count: int) -> list:
    outputs, carry = [], None
    with torch.no_grad():
        for _ in range(count):
            outputs.append(model(inputs, ids, carry, output_embeddings=True))
            carry = outputs[-1].carry
    return outputs


@pytest.mark.parametrize("name", FOLDERS)
def test_parity_of_every_expected_tensor(name: str) -> None:
    model = import_checkpoint(GOLDENS / name)
    given, expected = (tensors_of(GOLDENS / name, part) for part in ("inputs", "expected"))
    outputs = segments(model, given["inputs"], given["puzzle_identifiers"], 3)
    found = {"input_embeddings": outputs[0].input_embeddings}
    for k, output in enumerate(outputs, start=1):
        for key in ("logits", "q_halt_logits", "q_continue_logits"):
            found[f"{key}_seg{k}"] = output[key]
        for stream, value in output.carry.streams.items():
            found[f"{stream}_seg{k}"] = value
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=ATOL, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
    assert outputs[2].carry.steps.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("name", "plan", "kind"),
    [
        ("hrm", "cycle:(low:(0-1)x2 high:(2))x2", "hrm"),
        ("trm_attention", "cycle:(low:(0-1)x2 high:(0-1))x3", "trm"),
        ("trm_mlp_t", "cycle:(low:(0)x2 high:(0))x3", "trm"),
    ],
)
def test_what_a_checkpoint_is_in_our_words(name: str, plan: str, kind: str) -> None:
    model = import_checkpoint(GOLDENS / name)
    assert str(plan_of(model)) == plan
    assert model.config.foreign["family"] == kind


@pytest.mark.parametrize("name", FOLDERS)
def test_rows_do_not_depend_on_their_batch(name: str) -> None:
    model = import_checkpoint(GOLDENS / name)
    given = tensors_of(GOLDENS / name, "inputs")
    inputs, ids = given["inputs"], given["puzzle_identifiers"]
    both = segments(model, inputs, ids, 2)[1]
    for row in range(len(ids)):
        alone = segments(model, inputs[row : row + 1], ids[row : row + 1], 2)[1]
        torch.testing.assert_close(alone.logits[0], both.logits[row], atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", FOLDERS)
def test_export_is_the_checkpoint_again(name: str, tmp_path: Path) -> None:
    export_checkpoint(import_checkpoint(GOLDENS / name), tmp_path / "out")
    config, tensors = golden(name)
    again = tensors_of(tmp_path / "out")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert config_of(tmp_path / "out") == config


@pytest.mark.parametrize("name", FOLDERS)
def test_saved_model_is_bit_identical(name: str, tmp_path: Path) -> None:
    model = import_checkpoint(GOLDENS / name)
    model.save_pretrained(tmp_path / "ours")
    again = LoopwisePuzzleModel.from_pretrained(tmp_path / "ours").eval()
    given = tensors_of(GOLDENS / name, "inputs")
    for mine, other in zip(*(segments(m, *given.values(), 2) for m in (model, again)), strict=True):
        assert torch.equal(mine.logits, other.logits)
    export_checkpoint(again, tmp_path / "out")
    tensors = golden(name)[1]
    assert all(torch.equal(value, tensors[key]) for key, value in tensors_of(tmp_path / "out").items())


@pytest.mark.parametrize("name", FOLDERS)
def test_one_call_loads_the_checkpoint_and_what_is_saved_of_it(name: str, tmp_path: Path) -> None:
    model = loopwise.load(GOLDENS / name)
    assert isinstance(model, LoopwisePuzzleModel) and not model.training
    set_loops(model, low=4)
    loopwise.save(model, tmp_path / "ours")
    again = loopwise.load(tmp_path / "ours")
    assert isinstance(again, LoopwisePuzzleModel) and plan_of(again) == plan_of(model)
    given = tensors_of(GOLDENS / name, "inputs").values()
    assert torch.equal(segments(again, *given, 1)[0].logits, segments(model, *given, 1)[0].logits)


@pytest.mark.parametrize("name", MEMBERS)
def test_other_members_equal_the_written_out_model(name: str, tmp_path: Path) -> None:
    family, _, positions = MEMBERS[name]
    config, tensors = member(name)
    model = import_checkpoint(write(tmp_path / "in", config, tensors))
    assert model.config.foreign["family"] == family.name
    plain = {key.removeprefix("inner."): value for key, value in tensors.items()}
    inputs, ids = batch(config)
    states = None
    for output in segments(model, inputs, ids, 3):
        z_h, z_l, logits, q = naive_reasoner.segment(inputs, ids, plain, config, positions, states)
        states = z_h, z_l
        torch.testing.assert_close(output.carry.streams["z_H"], z_h, atol=ATOL, rtol=0)
        torch.testing.assert_close(output.carry.streams["z_L"], z_l, atol=ATOL, rtol=0)
        torch.testing.assert_close(output.logits, logits, atol=ATOL, rtol=0)
        torch.testing.assert_close(
            torch.stack([output.q_halt_logits, output.q_continue_logits], -1), q, atol=ATOL, rtol=0
        )
    export_checkpoint(model, tmp_path / "out")
    again = tensors_of(tmp_path / "out")
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("name", ["hrm_learned_wide_vector", "trm_learned", "trm_mlp"])
def test_only_the_last_calls_carry_gradient(name: str, tmp_path: Path) -> None:
    """HRM: the last call of each stack; TRM: the last cycle. The oracle switches gradients off as the papers do."""
    family, _, positions = MEMBERS[name]
    config, tensors = member(name)
    model = import_checkpoint(write(tmp_path / "in", config, tensors))
    inputs, ids = batch(config)
    output = model(inputs, ids, segments(model, inputs, ids, 1)[0].carry)
    (output.logits.square().sum() + output.q_halt_logits.sum() - 3 * output.q_continue_logits.sum()).backward()
    assert not any(value.requires_grad for value in output.carry.streams.values())

    def oracle(window: str) -> dict[str, torch.Tensor]:
        leaves = {key.removeprefix("inner."): value.clone() for key, value in tensors.items()}
        first = naive_reasoner.segment(inputs, ids, leaves, config, positions)
        trained = {key: value.requires_grad_() for key, value in leaves.items() if not key.endswith("_init")}
        _, _, logits, q = naive_reasoner.segment(inputs, ids, leaves, config, positions, first[:2], window)
        loss = logits.square().sum() + q[:, 0].sum() - 3 * q[:, 1].sum()
        return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))

    ours = dict(model.named_parameters())
    expected, everything = oracle("published"), oracle("all")
    rules = {rule.foreign.removeprefix("inner."): rule for rule in family.rules(config, frozenset(tensors))}
    for key, want in expected.items():
        got = torch.cat([ours[part].grad for part in rules[key].ours])
        assert got.isfinite().all() and got.abs().max() > 0
        torch.testing.assert_close(got, want, atol=1e-4 * float(want.abs().max()), rtol=0, msg=key)
    stacks = [key for key in expected if "_level." in key]
    assert all((expected[key] - everything[key]).abs().max() > 1e-2 * expected[key].abs().max() for key in stacks)


def test_loop_counts_change_at_run_time(tmp_path: Path) -> None:
    config, tensors = member("hrm_learned_wide_vector")
    model = import_checkpoint(write(tmp_path / "in", config, tensors))
    inputs, ids = batch(config)
    plain = {key.removeprefix("inner."): value for key, value in tensors.items()}
    for low, cycles in ((1, 1), (5, 2), (2, 4)):
        want = naive_reasoner.segment(inputs, ids, plain, config | {"L_cycles": low, "H_cycles": cycles}, 2)[2]
        with torch.no_grad():
            torch.testing.assert_close(
                model(inputs, ids, loops={"low": low, "cycle": cycles}).logits, want, atol=ATOL, rtol=0
            )
            set_loops(model, low=low, cycle=cycles)
            torch.testing.assert_close(model(inputs, ids).logits, want, atol=ATOL, rtol=0)


def test_names_of_compiled_training_and_mixed_types(tmp_path: Path) -> None:
    """Checkpoints of the published trainers: a longer prefix, and first values in the type of the forward pass."""
    config, tensors = golden("hrm")
    tensors = {f"_orig_mod.model.{key}": value for key, value in tensors.items()}
    for key in ("H_init", "L_init"):
        tensors[f"_orig_mod.model.inner.{key}"] = tensors[f"_orig_mod.model.inner.{key}"].bfloat16()
    folder = write(tmp_path / "in", config | {"forward_dtype": "bfloat16"}, tensors)
    model = import_checkpoint(folder)
    assert model.first["z_H"].dtype == torch.float32
    export_checkpoint(model, tmp_path / "out")
    again = tensors_of(tmp_path / "out")
    assert again.keys() == tensors.keys()
    assert all(again[key].dtype == value.dtype and torch.equal(again[key], value) for key, value in tensors.items())


@pytest.mark.parametrize("name", FOLDERS)
def test_wrong_tensors_are_named(name: str, tmp_path: Path) -> None:
    config, tensors = golden(name)
    key = "inner.L_level.layers.0.mlp.down_proj.weight"
    less = {k: v for k, v in tensors.items() if k != key}
    with pytest.raises(ValueError, match=f"lacks tensor {key}"):
        import_checkpoint(write(tmp_path / "less", config, less))
    with pytest.raises(ValueError, match="inner.embed_pos.embedding_weight"):
        import_checkpoint(
            write(tmp_path / "more", config, tensors | {"inner.embed_pos.embedding_weight": torch.ones(2)})
        )
    with pytest.raises(ValueError, match=rf"{key} has shape \[31, 256\].*\[32, 256\]"):
        import_checkpoint(write(tmp_path / "shape", config, tensors | {key: tensors[key][:-1]}))
    with pytest.raises(ValueError, match=r"inner.puzzle_emb.weights has shape \[3, 32\].*\[4, 32\]"):
        import_checkpoint(write(tmp_path / "count", config | {"num_puzzle_identifiers": 4}, tensors))


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("hrm", {"pos_encodings": "none"}, "pos_encodings='none'"),
        ("hrm", {"pos_encodings": "alibi"}, "pos_encodings='alibi'"),
        ("trm_attention", {"pos_encodings": "alibi"}, "pos_encodings='alibi'"),
        ("hrm", {"num_heads": 5}, "num_heads=5"),
        ("hrm", {"num_heads": 32}, "num_heads=32.*even"),
        ("hrm", {"H_layers": 0}, "H_layers=0"),
        ("hrm", {"L_cycles": 0}, "L_cycles=0"),
        ("hrm", {"forward_dtype": "int8"}, "forward_dtype='int8'"),
        ("hrm", {"puzzle_emb_ndim": -1}, "puzzle_emb_ndim=-1"),
        ("hrm", {"halt_max_steps": 0}, "halt_max_steps=0"),
        ("hrm", {"expansion": "4"}, "expansion='4'"),
        ("hrm", {"halt_exploration_prob": 2.0}, "exploration=2.0"),
        ("trm_attention", {"puzzle_emb_len": 2, "puzzle_emb_ndim": 0}, "puzzle_emb_len=2"),
        ("trm_attention", {"puzzle_emb_len": 1, "puzzle_emb_ndim": 40}, "puzzle_emb_len=1"),
    ],
)
def test_unsupported_values_are_named(name: str, changes: dict, says: str, tmp_path: Path) -> None:
    config, tensors = golden(name)
    with pytest.raises(ValueError, match=says) as caught:
        import_checkpoint(write(tmp_path / "in", config | changes, tensors))
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    config, tensors = golden("hrm")
    del config["expansion"]
    with pytest.raises(ValueError, match="lacks the field expansion"):
        import_checkpoint(write(tmp_path / "in", config, tensors))
