"""Which tensors are zeroed, by names in memory and on disk, and the committed table of types that were tried."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tiny import MODEL_TYPES
from zeroing import RESULTS, examine

from loopwise.edit.outputs import output_tensors, table, why_not_zero

# model type -> tensors of a layer, those that are outputs first
CASES = {
    "llama": (
        ["self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight"],
        ["self_attn.q_proj.weight", "mlp.up_proj.weight", "mlp.gate_proj.weight", "post_attention_layernorm.weight"],
    ),
    "gpt2": (
        ["attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"],
        ["attn.c_attn.weight", "mlp.c_fc.weight", "ln_1.weight", "ln_2.bias"],
    ),
    "gpt_neox": (
        ["attention.dense.weight", "attention.dense.bias", "mlp.dense_4h_to_h.weight"],
        ["attention.query_key_value.weight", "mlp.dense_h_to_4h.weight"],
    ),
    "mixtral": (
        ["block_sparse_moe.experts.3.w2.weight", "mlp.experts.down_proj"],
        ["block_sparse_moe.experts.3.w1.weight", "block_sparse_moe.gate.weight", "mlp.experts.gate_up_proj"],
    ),
    "gpt_oss": (
        ["mlp.experts.down_proj_bias", "mlp.experts.down_proj", "self_attn.o_proj.bias"],
        ["mlp.experts.gate_up_proj_bias", "mlp.router.bias", "self_attn.sinks"],
    ),
    "qwen2_moe": (
        ["mlp.shared_expert.down_proj.weight", "mlp.experts.0.down_proj.weight"],
        ["mlp.shared_expert_gate.weight", "mlp.gate.weight"],
    ),
    "granitemoeshared": (
        ["block_sparse_moe.output_linear.weight", "shared_mlp.output_linear.weight"],
        ["block_sparse_moe.input_linear.weight", "block_sparse_moe.router.layer.weight"],
    ),
    "mamba2": (["mixer.out_proj.weight"], ["mixer.in_proj.weight", "mixer.A_log", "mixer.D", "mixer.norm.weight"]),
    "qwen3_next": (["linear_attn.out_proj.weight"], ["linear_attn.in_proj_qkvz.weight", "linear_attn.norm.weight"]),
    "recurrent_gemma": (
        ["temporal_block.linear_out.weight", "temporal_block.linear_out.bias", "mlp_block.down_proj.bias"],
        ["temporal_block.linear_x.weight", "temporal_block.rg_lru.recurrent_param"],
    ),
    "gemma2": (["self_attn.o_proj.weight", "mlp.down_proj.weight"], ["post_feedforward_layernorm.weight"]),
    "zaya": ([], ["mlp.gate.down_proj.weight", "mlp.gate.router_mlp.out_proj.weight"]),
    "axk2": ([], ["input_layernorm.mlp.fc2.weight", "self_attn.indexer.wk.weight"]),
    "jetmoe": (["mlp.bias", "self_attention.experts.bias"], ["mlp.input_linear.weight"]),
    "olmoe": ([], ["mlp.bias"]),
    "loopwise_decoder": (
        ["mixer.o_proj.weight", "mlp.down_proj.bias", "mixer_norm_out.bias", "mlp_norm_out.bias"],
        ["mixer_norm_out.weight", "mixer_norm_in.bias", "adaln.bias"],
    ),
}


@pytest.mark.parametrize("model_type", CASES)
def test_outputs_are_found_by_name(model_type):
    outputs, others = CASES[model_type]
    assert output_tensors([*outputs, *others], model_type) == set(outputs)


def test_nothing_here_loads_torch():
    code = "import sys, loopwise.edit.outputs as o; o.why_not_zero('llama'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_causal_model_type_has_one_row():
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    names = [row["model_type"] for row in rows]
    assert len(set(names)) == len(names) and set(MODEL_TYPES) <= set(names)
    assert names[: len(MODEL_TYPES)] == list(MODEL_TYPES)
    assert sum(not row["reason"] for row in rows) >= 130
    assert not [row for row in rows if row["reason"] and len(row["reason"]) < 10]
    assert set(table()) == set(names)


# dense, sandwich norms, experts that a file keeps one by one, a hybrid; post-norm, shared blocks, no plain layer list
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral", "lfm2", "bert", "zamba", "xlm"])
def test_a_sample_is_as_the_table_says(model_type):
    assert examine(model_type)["reason"] == table()[model_type]["reason"]


def test_reasons():
    assert why_not_zero("llama") is None and why_not_zero("emu3_text_model") is None
    assert "post-norm" in str(why_not_zero("bert"))
    assert why_not_zero("lama") == "model type 'lama' was not tried"
    assert why_not_zero("opt", {"do_layer_norm_before": True}) is None
    assert "do_layer_norm_before=False" in str(why_not_zero("opt", {"do_layer_norm_before": False}))
    assert why_not_zero("loopwise_decoder", {"blocks": [{"placement": "branch_out"}, {}]}) is None
    assert "placement 'stream'" in str(why_not_zero("loopwise_decoder", {"blocks": [{}, {"placement": "stream"}]}))
