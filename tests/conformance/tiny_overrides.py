"""What the generic shrinker of `tiny.py` cannot guess: layer patterns and sizes per model type.

A value is taken as it is, except `Cycle` (repeated to the number of layers) and functions (called with that number).
A dictionary under the name of a sub-config goes before that part's own entry.
"""

from __future__ import annotations

from typing import Any


class Cycle(tuple):
    """A per-layer pattern; `expand(n)` repeats it to `n` layers."""

    def expand(self, num_layers: int) -> list[Any]:
        return [self[i % len(self)] for i in range(num_layers)]


def pattern(letters: str, **names: str) -> Cycle:
    """`pattern("sfs", s="sliding_attention", f="full_attention")`: one letter per layer."""
    return Cycle(names[letter] for letter in letters)


S, F, L = "sliding_attention", "full_attention", "linear_attention"
# No pattern has period one or two, so that an off-by-one in a rewritten list shows.
SWA = pattern("sfssfs", s=S, f=F)
SWA_LAST_FULL = pattern("sfssff", s=S, f=F)
LINEAR = pattern("llflfl", l=L, f=F)
CONV = pattern("ccfcfc", c="conv", f=F)
HYBRID = pattern("lhhlhl", l=L, h="hybrid")
HYBRID_SLIDING = pattern("shsshs", s="hybrid_sliding", h="hybrid")
MLP = pattern("dssdsd", d="dense", s="sparse")
INDEXERS = pattern("fsffss", f="full", s="shared")


def _where(kind: str, cycle: Cycle) -> Any:
    """The indices of the layers of one kind: what configs with an index list want."""
    return lambda n: [i for i, k in enumerate(cycle.expand(n)) if k == kind]


def _shared_kv(num_layers: int) -> int:
    """Each kind of layer must own keys and values once before the last two reuse them."""
    return 2 if num_layers >= 4 else 0


_QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 4, "layer_types": SWA}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2}

OVERRIDES: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 2},
    "axk2": {"index_topk": 4},
    "bailing_hybrid": {"layer_types": LINEAR, "mlp_layer_types": MLP},
    "bamba": {"attn_layer_indices": _where(F, LINEAR), **_MAMBA2},
    "big_bird": {"attention_type": "original_full"},
    # The wrapper has no layer count of its own, and plain transformers asks it for one when it makes a cache.
    "blt": {"num_hidden_layers": lambda n: n, "encoder_hash_byte_group_vocab": 64, "local_attention_window_len": 4},
    "blt_global_transformer": {"hidden_size": 64, "head_dim": 16},
    "blt_local_decoder": {"hidden_size_global": 64},
    "blt_local_encoder": {"hidden_size_global": 64},
    "cohere2_moe": {"mlp_layer_types": MLP, "num_shared_experts": 1},
    "cohere_compass_text": {
        "layer_types": SWA,
        "rope_parameters": {
            S: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            F: {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [2, 1, 1]},
        },
    },
    "cpmant": {"prompt_length": 4, "prompt_types": 4, "segment_types": 4, "position_bias_num_buckets": 16},
    # The attention reads a base and a clip that its config class does not declare or leaves empty.
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_v32": {"index_topk": 4},
    "deepseek_v4": {
        "layer_types": pattern("schshc", s=S, c="compressed_sparse_attention", h="heavily_compressed_attention"),
        "mlp_layer_types": pattern("hmmhmm", h="hash_moe", m="moe"),
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "index_topk": 2,
        "o_groups": 2,
        "hc_mult": 2,
    },
    # doge stays dense with an open window: its mixture reshapes tokens into each other's routing (neither causal nor
    # independent of the batch), and its dynamic window keeps other keys with a cache than without.
    "dots1": {"layer_types": SWA},
    "dots3_note_text": {
        "layer_types": pattern("issiis", i="indexed_attention", s=S),
        "index_topk": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "head_dim": 12,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    "dots3_note_vision_encoder": {
        "adapter_in_dim": 32,
        "adapter_out_dim": 32,
        "patch_size": 4,
        "mlp_layer_types": ["dense", "sparse"],
        "per_layer_config": {},
    },
    "ernie4_5_moe": {"moe_layer_start_index": 2, "moe_layer_end_index": lambda n: n - 2},
    "falcon_h1": {"mamba_d_ssm": 64, **_MAMBA2},
    "flint": {"mlp_only_layers": _where("dense", MLP)},
    "gemma3n_text": {
        "layer_types": SWA_LAST_FULL,
        "num_kv_shared_layers": _shared_kv,
        "laurel_rank": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 99,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": Cycle((0.5, 0.0, 0.5, 0.0, 0.0, 0.5)),
    },
    # The wrapper shows the other family of sizes: values equal keys, no sharing, no per-layer inputs.
    "gemma4": {
        "text_config": {
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
        }
    },
    "gemma4_text": {
        "layer_types": SWA_LAST_FULL,
        "global_head_dim": 16,
        "num_kv_shared_layers": _shared_kv,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 99,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "gemma4_unified_text": {
        "layer_types": SWA_LAST_FULL,
        "global_head_dim": 16,
        "num_kv_shared_layers": _shared_kv,
        "use_double_wide_mlp": True,
    },
    "glm_moe_dsa": {"index_topk": 4, "indexer_types": INDEXERS},
    "got_ocr2_vision": {"output_channels": 8, "image_size": 64, "mlp_dim": 32},
    "gpt_neo": {
        "attention_types": lambda n: [[Cycle(("global", "local", "local", "global", "local", "local")).expand(n), 1]]
    },
    "granite_swa": {"layer_rope_theta": Cycle((10000.0, 500.0, 500.0, 10000.0, 500.0, 10000.0))},
    "granitemoe_swa": {"layer_rope_theta": Cycle((10000.0, 500.0, 500.0, 10000.0, 500.0, 10000.0))},
    "granitemoehybrid": {"layer_types": LINEAR, "position_embedding_type": "rope", **_MAMBA2},
    "hy_v4": {"index_topk": 4, "indexer_types": INDEXERS, "hc_mult": 2},
    "inkling2_text": {
        "layer_types": HYBRID_SLIDING,
        "unpadded_vocab_size": 99,
        "rel_extent": 8,
        "d_rel": 4,
        "n_layers_per_attn_res_block": 2,
    },
    "inkling_text": {
        "layer_types": HYBRID_SLIDING,
        "mlp_layer_types": MLP,
        "rel_extent": 8,
        "d_rel": 4,
        "logits_mup_width_multiplier": 2.0,
    },
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {"layer_types": LINEAR},
    "laguna": {"layer_types": SWA, "num_attention_heads_per_layer": Cycle((4, 2, 4, 2, 2, 4))},
    "lfm2": {"layer_types": CONV, "full_attn_idxs": None, "block_multiple_of": 8},
    "lfm2_moe": {"layer_types": CONV, "num_dense_layers": 2},
    "lfm3": {"layer_types": pattern("cfcscf", c="conv", f=F, s=S), "conv_L_cache": 3},
    "llama4_text": {
        "no_rope_layers": Cycle((1, 0, 1, 1, 0, 1)),
        "layer_types": pattern("cfccfc", c="chunked_attention", f=F),
        "moe_layers": _where("sparse", MLP),
        "attention_chunk_size": 4,
        "floor_scale": 4,
    },
    "longcat_flash": {"head_dim": 4, "qk_head_dim": 12, "zero_expert_num": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "mellum": {"layer_types": SWA, "mlp_layer_types": MLP},
    "minimax": {"layer_types": LINEAR, "block_size": 4},
    "minimax_m3_vl_text": {
        "layer_types": pattern("mfmmfm", m="minimax_m3_sparse", f=F),
        "mlp_layer_types": MLP,
        "index_n_heads": 2,
        "index_block_size": 2,
        "index_topk_blocks": 2,
    },
    "ministral": {"layer_types": SWA},
    "mllama_text_model": {"cross_attention_layers": lambda n: [min(3, n - 1)]},
    "modernbert-decoder": {"local_attention": 8},
    # Its cache cuts at the window, its mask does not: an active window makes cached != uncached.
    "moshi": {"sliding_window": 128},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "nemotron_h": {
        "layers_block_type": Cycle((L, "moe", F, "mlp", L, F)),
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "use_mamba_kernels": False,
    },
    "olmo_hybrid": {"layer_types": LINEAR},
    "phi3": {"sliding_window": 4},
    "phi4_multimodal": {"sliding_window": 4},
    "phi4_multimodal_audio": {
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
        "nemo_conv_channels": 16,
        "bias_max_distance": 16,
    },
    "phi4_multimodal_vision": {"image_size": 32, "crop_size": 32},
    "phimoe": {"sliding_window": 4},
    "qwen2": _QWEN_WINDOW,
    "qwen2_moe": {**_QWEN_WINDOW, "mlp_only_layers": _where("dense", MLP)},
    "qwen3": _QWEN_WINDOW,
    "qwen3_5_moe_text": {"layer_types": LINEAR},
    "qwen3_5_text": {"layer_types": LINEAR},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 4, "mlp_only_layers": _where("dense", MLP)},
    "qwen3_next": {"layer_types": LINEAR, "mlp_only_layers": _where("dense", MLP)},
    "qwen4_exp_text": {
        "layer_types": pattern("llilil", l=L, i="indexed_attention"),
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": lambda n: [i for i in (1, 4) if i <= n],  # counted from one
        "ple_embed_dim": 32,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "eos_token_id": 98,
    },
    # Chunks longer than the tests' inputs: hashed attention over several chunks looks ahead, and its cache fails.
    "reformer": {
        "attn_layers": Cycle(("local", "lsh", "local", "local", "lsh", "lsh")),
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "local_attn_chunk_length": 64,
        "lsh_attn_chunk_length": 64,
        "num_buckets": 2,
        "feed_forward_size": 64,
        "hash_seed": 0,
    },
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 48},
    "roc_bert": {
        "pronunciation_embed_dim": 16,
        "pronunciation_vocab_size": 99,
        "shape_embed_dim": 16,
        "shape_vocab_size": 99,
    },
    "rwkv": {"attention_hidden_size": 32},
    "smollm3": {**_QWEN_WINDOW, "no_rope_layers": Cycle((1, 0, 1, 1, 0, 1))},
    "starcoder2": {"sliding_window": 4},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX", "de_DE"]},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "zamba": {"layers_block_type": HYBRID, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {
        # three shared visits over two memory blocks, so that the first block is used twice
        "layers_block_type": pattern("lhlhhl", l=L, h="hybrid"),
        "num_mem_blocks": 2,
        "use_shared_attention_adapter": True,
        "adapter_rank": 8,
        "num_key_value_heads": 4,
        "mamba_ngroups": 2,
        "use_mem_rope": True,
    },
    "zaya": {"layer_types": HYBRID_SLIDING, "sliding_window": 4, "num_experts_per_tok": 1, "router_hidden_size": 16},
}

# Standard deviation of the matrices where the usual 0.25 amplifies rounding above 1e-5 of the logits. Zamba 2 (like
# Nemotron-H) also clamps time steps at `time_step_min` in prefill but not in single-token decoding; smaller
# projections keep them away from that bound.
WEIGHT_STD: dict[str, float] = {"minimax": 0.15, "zamba": 0.15, "zamba2": 0.15}

UNAVAILABLE: dict[str, str] = {
    "gemma3n": "its vision tower needs the timm package (the text model is gemma3n_text)",
    "gemma4_assistant": "drafts for a target model: forward needs the target's hidden states, keys and values",
    "gemma4_unified_assistant": "drafts for a target model: forward needs the target's hidden states, keys and values",
}

# Findings in plain transformers itself, each measured by `tiny_check.py` on these models.
QUIRKS: dict[str, str] = {
    "blt": "cached decoding rebuilds patches from the newest token only: cached != uncached",
    "cpmant": "attends to the whole input in both directions: not causal, cached != uncached",
    "mllama": "skips its cross-attention layers when no image is given: layer 3 has no effect on text",
    "prophetnet": "a later token moves earlier logits (3e-2), and cached decoding differs from uncached",
    "rwkv": "decoding one token of a batch broadcasts the shifted state over rows: right for a batch of one only",
    "xlnet": "two-stream model without a key-value cache; generate fails for batches when attn_type is 'uni' (causal)",
}
