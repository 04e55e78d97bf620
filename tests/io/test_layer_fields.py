"""What a configuration says layer by layer: the committed table, rewriting, refusals."""

from __future__ import annotations

import pytest
from tiny import MODEL_TYPES, UNAVAILABLE, tiny_config

from loopwise.io.layer_fields import expand_values, known_fields, layer_kinds, missing_fields


def test_the_table_is_what_the_classes_of_transformers_write() -> None:
    found = {}
    for model_type in MODEL_TYPES:
        if model_type in UNAVAILABLE:
            continue
        config = tiny_config(model_type)
        text = config.get_text_config(decoder=True)
        fields = sorted(layer_kinds(text.to_dict(), text.num_hidden_layers)[0])
        if fields:
            found[model_type] = found[text.model_type] = fields
    del found["blt"]  # six hash sizes, by chance as many as layers
    assert found == known_fields()


VALUES = {
    "num_hidden_layers": 4,
    "n_layer": 7,
    "layer_types": ["a", "b", "c", "d"],
    "mlp_only_layers": [1, 3],
    "hybrid_override_pattern": "M*-E",
    "eos_token_id": [1, 2, 3, 4],
    "rope_scaling": {"long_factor": [1, 2, 3, 4]},
    "mtp_types": ["x", "x", "x", "x", "y"],
}


def test_every_field_about_single_layers_follows_its_layer() -> None:
    assert expand_values(VALUES, [3, 3, 0], 4, num_extra=1) == {
        "num_hidden_layers": 3,
        "n_layer": 7,
        "layer_types": ["d", "d", "a"],
        "mlp_only_layers": [0, 1],
        "hybrid_override_pattern": "EEM",
        "eos_token_id": [1, 2, 3, 4],
        "rope_scaling": {"long_factor": [1, 2, 3, 4]},
        "mtp_types": ["x", "x", "x", "y"],
    }


@pytest.mark.parametrize(
    ("values", "sources", "expected"),
    [
        ({"first_k_dense_replace": 2}, [0, 1, 1, 2, 3], {"first_k_dense_replace": 3}),
        ({"first_k_dense_replace": 2}, [2, 3], {"first_k_dense_replace": 0}),
        ({"decoder_sparse_step": 2}, [0, 1, 0, 1], {"decoder_sparse_step": 2}),
        ({"attn_layer_period": 2, "attn_layer_offset": 1}, [2, 3], {"attn_layer_period": 2, "attn_layer_offset": 1}),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 3}, [0, 1, 2, 3, 3], {"moe_layer_end_index": 4}),
    ],
)
def test_rules_by_number_are_kept_where_they_still_hold(values: dict, sources: list[int], expected: dict) -> None:
    assert expand_values(values, sources, 4).items() >= expected.items()


@pytest.mark.parametrize(
    ("values", "sources"),
    [
        ({"first_k_dense_replace": 2}, [0, 1, 2, 3, 0]),
        ({"decoder_sparse_step": 2}, [0, 0, 1, 1]),
        ({"attn_layer_period": 2, "attn_layer_offset": 1}, [1, 2, 3]),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 2}, [0, 1, 2, 3, 1]),
        ({"scale_attn_by_inverse_layer_idx": True}, [0, 0, 1, 2, 3]),
        ({"num_kv_shared_layers": 2}, [0, 1]),
    ],
)
def test_rules_by_number_that_cannot_hold_are_refused_by_name(values: dict, sources: list[int]) -> None:
    with pytest.raises(ValueError, match="|".join(values)):
        expand_values(values, sources, 4)
    assert expand_values(values, [0, 1, 2, 3], 4).items() >= values.items()


def test_fields_that_a_file_leaves_out_are_known() -> None:
    assert missing_fields({"num_hidden_layers": 4}, "gemma2") == ["layer_types"]
    assert missing_fields({"layer_types": ["a"] * 4}, "gemma2") == []
    assert missing_fields({"use_sliding_window": False}, "qwen3") == []
    assert missing_fields({"use_sliding_window": True}, "qwen3") == ["layer_types"]
    assert missing_fields({}, "llama") == []
