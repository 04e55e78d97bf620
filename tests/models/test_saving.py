"""Saving and loading: bit for bit in a fresh process, with and without loopwise."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from laws import assert_close, odd_plan
from tiny import tiny_inputs, tiny_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
)

import loopwise
from loopwise.models.wrapper import CODE_FILE
from tests.models.common import LOOPED, looped

TYPES = [
    "llama",
    "gpt2",
    "gemma3_text",
    "mixtral",
    "deepseek_v3",
    "mamba2",
    "recurrent_gemma",
    "falcon_h1",
    "qwen3_next",
    "bert",
]
SOURCES = str(Path(loopwise.__file__).parents[1])

# Runs in the fresh processes: prints one line of JSON for every folder.
READ = """
import hashlib, json, sys
import torch
torch.set_num_threads(1)
def digest(model):
    ids = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        logits = model(ids).logits
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    return [hashlib.sha256(part.contiguous().numpy().tobytes()).hexdigest() for part in (logits, tokens)]
"""
WITH_LOOPWISE = (
    READ
    + """
import loopwise
for folder in sys.argv[1:]:
    model = loopwise.load(folder)
    print(json.dumps([folder, type(model).__name__, str(loopwise.plan_of(model)), digest(model)]))
"""
)
WITHOUT_LOOPWISE = (
    READ
    + """
sys.modules["loopwise"] = None  # wherever it is installed
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    twice = getattr(getattr(model, "model", None), "loopwise", None)
    print(json.dumps([folder, type(model).__name__, str(getattr(twice, "plan", None)), digest(model)]))
    if twice is not None:
        model.save_pretrained(folder + "-again")
"""
)


def digest(model):
    ids_BT = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        logits_BTV = model(ids_BT).logits
    tokens = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=5, do_sample=False)
    return [hashlib.sha256(part.contiguous().numpy().tobytes()).hexdigest() for part in (logits_BTV, tokens)]


def logits(model, ids_BT):
    with torch.no_grad():
        return model(ids_BT).logits


def fresh_process(program, folders, home, *, isolated):
    """Run a program on folders in a new interpreter; with `isolated`, without our sources on its path."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "COV"))}
    env |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if not isolated:
        env["PYTHONPATH"] = SOURCES
    command = [sys.executable, *(["-I"] if isolated else []), "-W", "ignore", "-c", program, *map(str, folders)]
    done = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Looped models of many types, saved in the format of loopwise, and read in one fresh process."""
    home = tmp_path_factory.mktemp("saved")
    expected = {}
    for model_type in TYPES:
        model, _ = looped(model_type, odd_plan(6))
        loopwise.save(model, home / model_type)
        expected[model_type] = [type(model).__name__, odd_plan(6), digest(model)]
    model, _ = looped("mixtral")
    model.save_pretrained(home / "sharded", max_shard_size="60KB")
    expected["sharded"] = [type(model).__name__, LOOPED, digest(model)]
    return home, expected, fresh_process(WITH_LOOPWISE, [home / name for name in expected], home, isolated=False)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The formats that need no loopwise, read in one fresh process that has none."""
    home = tmp_path_factory.mktemp("exported")
    expected = {}
    for model_type in ("llama", "gpt2", "qwen3_next"):
        for form in ("auto_map", "unroll"):
            model, _ = looped(model_type, odd_plan(6))
            loopwise.save(model, home / f"{model_type}-{form}", format=form)
            reader = loopwise.materialize(model) if form == "unroll" else model
            expected[f"{model_type}-{form}"] = [type(model).__name__, digest(reader)]
    return home, expected, fresh_process(WITHOUT_LOOPWISE, [home / name for name in expected], home, isolated=True)


@pytest.mark.parametrize("name", [*TYPES, "sharded"])
def test_a_fresh_process_computes_the_same_bits(saved, name):
    home, expected, got = saved
    assert got[str(home / name)] == expected[name]


def test_a_checkpoint_in_shards_has_shards(saved):
    home, _, _ = saved
    assert len(list((home / "sharded").glob("*.safetensors"))) > 2
    assert (home / "sharded" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3_next"])
def test_one_file_of_code_loads_without_loopwise(exported, model_type):
    home, expected, got = exported
    kind, plan, bits = got[str(home / f"{model_type}-auto_map")]
    assert [kind, bits] == expected[f"{model_type}-auto_map"]
    if model_type == "llama":
        assert plan == odd_plan(6)
    assert (home / f"{model_type}-auto_map" / CODE_FILE).exists()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3_next"])
def test_unrolled_models_load_in_plain_transformers(exported, model_type):
    home, expected, got = exported
    kind, plan, bits = got[str(home / f"{model_type}-unroll")]
    assert [kind, bits] == expected[f"{model_type}-unroll"] and plan == "None"
    config = json.loads((home / f"{model_type}-unroll" / "config.json").read_text())
    assert config["model_type"] == model_type and "auto_map" not in config and "plan" not in config


def test_what_is_saved_without_loopwise_still_loads(exported):
    """The one file of code travels with the model."""
    home, expected, _ = exported
    again = home / "llama-auto_map-again"
    assert (again / CODE_FILE).read_text() == (home / "llama-auto_map" / CODE_FILE).read_text()
    model = loopwise.load(again)
    assert str(loopwise.plan_of(model)) == odd_plan(6) and digest(model) == expected["llama-auto_map"][1]
    rows = fresh_process(WITHOUT_LOOPWISE, [again], home, isolated=True)
    assert rows[str(again)][2] == expected["llama-auto_map"][1]


def test_an_auto_map_export_loads_here_without_running_its_code(exported):
    home, expected, _ = exported
    model = loopwise.load(home / "llama-auto_map")
    assert digest(model) == expected["llama-auto_map"][1]
    assert type(model.model.loopwise).__module__.startswith("loopwise.")


def test_the_configuration_wraps_the_base(tmp_path):
    model, _ = looped(cache="last")
    loopwise.set_loops(model, 5)
    loopwise.save(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == "loopwise" and config["plan"] == "0 core:(1-4)x5 5"
    assert (config["cache"], config["on_deeper"], config["components"]) == (str(config["cache"]), "refuse", {})
    assert config["base_config"]["model_type"] == "llama" and config["base_config"]["num_hidden_layers"] == 6
    again = loopwise.load(tmp_path / "model")
    assert loopwise.plan_of(again).counts == {"core": 5}
    ids_BT = tiny_inputs(model)
    assert torch.equal(logits(again, ids_BT), logits(model, ids_BT)), "the policy is lost"
    loopwise.set_cache(model, "own")
    assert not torch.equal(logits(again, ids_BT), logits(model, ids_BT))


@pytest.mark.parametrize(
    ("cache", "on_deeper"), [("own", "catch_up"), ("ring(2)", "refuse"), ("own/last", "refuse"), ("first", "refuse")]
)
def test_policies_are_saved(tmp_path, cache, on_deeper):
    model, _ = looped(cache=cache, on_deeper=on_deeper)
    model.save_pretrained(tmp_path)
    policy = loopwise.load(tmp_path).model.loopwise.policy
    assert policy == model.model.loopwise.policy and policy.on_deeper == on_deeper


def test_another_plan_may_be_given_and_keeps_the_policy(tmp_path):
    model, ids_BT = looped(cache="last")
    model.save_pretrained(tmp_path)
    other = loopwise.load(tmp_path, plan="0 core:(1-3)x3 5")
    assert str(loopwise.plan_of(other)) == "0 core:(1-3)x3 5"
    assert other.model.loopwise.policy == model.model.loopwise.policy
    want = loopwise.attach(tiny_model("llama"), "0 core:(1-3)x3 5", cache="last")
    assert torch.equal(logits(other, ids_BT), logits(want, ids_BT))


@pytest.mark.parametrize("model_type", ["gpt2", "bloom", "gemma3_text"])
def test_tied_embeddings_are_stored_once_and_stay_tied(tmp_path, model_type):
    model, ids_BT = looped(model_type)
    loopwise.save(model, tmp_path / "model")
    again = loopwise.load(tmp_path / "model")
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert torch.equal(logits(again, ids_BT), logits(model, ids_BT))


@pytest.mark.parametrize("form", ["loopwise", "unroll"])
def test_half_precision_stays(tmp_path, form):
    looped()[0].save_pretrained(tmp_path / "single")
    model = loopwise.load(tmp_path / "single", dtype=torch.bfloat16)
    ids_BT = tiny_inputs(model)
    loopwise.save(model, tmp_path / "model", format=form)
    again = loopwise.load(tmp_path / "model")
    assert again.dtype == torch.bfloat16 and not again.training
    assert torch.equal(logits(again, ids_BT), logits(model, ids_BT))
    assert loopwise.load(tmp_path / "model", dtype="float32").dtype == torch.float32


def test_loaded_tensors_are_aligned(tmp_path):
    """Kernels choose their path by alignment: tensors that a file maps to odd places give other last bits."""
    looped()[0].save_pretrained(tmp_path)
    model = loopwise.load(tmp_path)
    assert {tensor.data_ptr() % 64 for tensor in (*model.parameters(), *model.buffers())} == {0}


def test_save_pretrained_of_the_model_and_save_write_the_same(tmp_path):
    model, _ = looped()
    model.save_pretrained(tmp_path / "a")
    loopwise.save(model, tmp_path / "b")
    files = sorted(os.listdir(tmp_path / "a"))
    assert files == sorted(os.listdir(tmp_path / "b"))
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_auto_classes_know_the_type(tmp_path):
    model, ids_BT = looped()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model) and torch.equal(logits(again, ids_BT), logits(model, ids_BT))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == "loopwise" and config.plan == LOOPED
    fresh = AutoModelForCausalLM.from_config(config)
    assert type(fresh) is type(model) and str(loopwise.plan_of(fresh)) == LOOPED
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_after_detach_the_plain_model_is_saved(tmp_path):
    model, ids_BT = looped()
    loopwise.detach(model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    again = loopwise.load(tmp_path)
    assert loopwise.plan_of(again) is None
    assert torch.equal(
        logits(loopwise.load(tmp_path, plan=LOOPED), ids_BT), logits(loopwise.attach(model, LOOPED), ids_BT)
    )


def permuted(weight, num_heads):
    """Query and key rows in the order of GGUF files: rotary pairs side by side instead of in halves."""
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def test_a_gguf_file_loads_with_a_plan(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = tiny_model("llama", num_layers=3)
    config, ids_BT = model.config, tiny_inputs(model)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(3)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    tensors = {
        "token_embd": model.model.embed_tokens.weight,
        "output_norm": model.model.norm.weight,
        "output": model.lm_head.weight,
    }
    for i, layer in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = layer.get_submodule(ours).weight
            if theirs in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if theirs == "attn_q" else config.num_key_value_heads
                weight = permuted(weight, heads)
            tensors[f"blk.{i}.{theirs}"] = weight
    for name, weight in tensors.items():
        writer.add_tensor(f"{name}.weight", weight.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    want = logits(loopwise.attach(model, "0 core:(1)x3 2"), ids_BT)
    for source, options in ((tmp_path / "tiny.gguf", {}), (tmp_path, {"gguf_file": "tiny.gguf"})):
        again = loopwise.load(source, plan="0 core:(1)x3 2", **options)
        assert type(again) is type(model)
        assert_close(logits(again, ids_BT), want, "from GGUF")
        Trainer(model=again, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]))
        assert loopwise.load(source, **options).float().dtype == torch.float32, "the weights count as quantised"
    for form in ("loopwise", "unroll"):
        loopwise.save(again, tmp_path / form, format=form)
        assert torch.equal(logits(loopwise.load(tmp_path / form), ids_BT), logits(again, ids_BT)), form
