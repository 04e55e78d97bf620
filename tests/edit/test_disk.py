"""Edits of folders: what is written loads in plain transformers and is what the edit in memory makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedConfig

import loopwise
from loopwise.edit.apply import apply
from loopwise.edit.disk import DiskEdit, carry_out, plan_disk_edit
from loopwise.edit.layout import Source
from loopwise.edit.text import parse
from loopwise.io.tensors import INDEX, SINGLE, read_checkpoint
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.hub import align

# A list shifted by one, or left as it was, shows: layer 0 twice, out of order, layer 3 dropped.
SHUFFLED = "order([0, 0, 5, 1, 2, 1, 2, 4])"
# For types that count leading layers of another kind.
LEADING = "order([0, 1, 2, 3, 4, 2, 3, 4, 5])"
# For types whose kinds of layers repeat.
PERIODIC = "stack(2)"
TYPES = {
    "llama": SHUFFLED,
    "qwen3": SHUFFLED,
    "gemma3_text": SHUFFLED,
    "gemma3": SHUFFLED,
    "gpt2": SHUFFLED,
    "bloom": SHUFFLED,
    "mixtral": SHUFFLED,
    "qwen3_moe": SHUFFLED,
    "olmo2": SHUFFLED,
    "phi": SHUFFLED,
    "mamba2": SHUFFLED,
    "falcon_h1": SHUFFLED,
    "nemotron_h": SHUFFLED,
    "recurrent_gemma": SHUFFLED,
    "smollm3": SHUFFLED,
    "llama4_text": SHUFFLED,
    "opt": SHUFFLED,
    "deepseek_v3": LEADING,
    "lfm2_moe": LEADING,
    "jamba": PERIODIC,
}
# What saving says of the library, and not of the model.
OF_THE_LIBRARY = {"transformers_version", "architectures", "dtype", "_name_or_path"}


def edited(source: Path, target: Path, *texts: str, **options: Any) -> DiskEdit:
    """Carry out an edit of a folder; what was planned."""
    operators: Any = [parse(text) for text in texts]
    planned = plan_disk_edit(source, operators, **options)
    carry_out(planned, target)
    return planned


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def logits(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    align(model)
    with torch.no_grad():
        return model(ids_BT).logits


def says(config: PreTrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in OF_THE_LIBRARY}


def assert_same_tensors(one: Any, two: Any) -> None:
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("model_type", TYPES)
def test_a_folder_is_what_is_materialised_in_memory(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    planned = edited(saved(model, tmp_path / "source"), tmp_path / "new", TYPES[model_type])
    assert planned.doubts is None
    new, info = type(model).from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    twin: Any = loopwise.materialize(model, planned.edit.alias_plan())
    assert_same_tensors(new, twin)
    assert says(new.config.get_text_config(decoder=True)) == says(twin.config.get_text_config(decoder=True))
    tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (model, new)]
    assert tied[0] == tied[1]
    ids_BT = tiny_inputs(model)
    assert torch.equal(logits(new.eval(), ids_BT), logits(twin.eval(), ids_BT))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "mixtral", "olmo2", "phi", "mamba2", "bloom"])
def test_new_layers_that_start_at_zero_change_nothing(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    edited(saved(model, tmp_path / "source"), tmp_path / "new", "llama_pro(every=3)")
    new = type(model).from_pretrained(tmp_path / "new").eval()
    ids_BT = tiny_inputs(model)
    assert new.config.num_hidden_layers == 8
    assert torch.equal(logits(new, ids_BT), logits(model, ids_BT))


def test_architectures_whose_layers_cannot_be_the_identity_are_refused(tmp_path: Path) -> None:
    source = saved(tiny_model("bert"), tmp_path / "source")
    with pytest.raises(ValueError, match="bert: a layer cannot start as the identity: its norms stand on the stream"):
        plan_disk_edit(source, [parse("llama_pro(every=3)")])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "text",
    [
        "recursive(2, cycle, average)",
        'tie("0 (1)x2 2", init=average)',
        'order([0, 1, 1, 3], zero=[2], scale=["1 self_attn.v 0.5", "3 * 2"])',
    ],
)
def test_computed_tensors_are_those_of_the_edit_in_memory(text: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("mixtral" if "order" in text else "llama")
    model = loopwise.materialize(model, loopwise.Plan.parse("0-3")).to(dtype)
    planned = edited(saved(model, tmp_path / "source"), tmp_path / "new", text)
    assert_same_tensors(loopwise.load(tmp_path / "new"), apply(model, text, mode=planned.mode))  # pyright: ignore[reportArgumentType]


def test_a_tied_folder_is_the_looped_model_and_unties_to_a_plain_one(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    ids_BT = tiny_inputs(model)
    source = saved(model, tmp_path / "source")
    edited(source, tmp_path / "tied", "repeat(1, 4, 3)", mode="tie")
    looped = loopwise.load(tmp_path / "tied")
    assert str(loopwise.plan_of(looped)) == "0 (1-3)x3 4-5"
    assert (tmp_path / "tied" / SINGLE).stat().st_size == (source / SINGLE).stat().st_size
    alias = loopwise.attach(tiny_model("qwen3"), "0 (1-3)x3 4-5")
    assert torch.equal(logits(looped, ids_BT), logits(alias, ids_BT))
    edited(tmp_path / "tied", tmp_path / "plain", "untie()")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert loopwise.plan_of(plain) is None and plain.config.num_hidden_layers == 12
    assert torch.equal(logits(plain, ids_BT), logits(alias, ids_BT))


def test_several_operators_are_one_pass(tmp_path: Path) -> None:
    model = tiny_model("llama")
    planned = edited(saved(model, tmp_path / "source"), tmp_path / "new", "prune([0])", "stack(2)", "llama_pro(5)")
    assert [layer.sources[0] for layer in planned.edit.layers] == [1, 2, 3, 4, 5, 5, 1, 2, 3, 4, 5, 5]
    want = apply(model, ["prune([0])", "stack(2)", "llama_pro(5)"])
    assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "new"), want)


def own_decoder() -> Any:
    """Three layers of two kinds, one of them with a table of value embeddings, a loop with components."""
    mixer = {"kind": "attention", "num_heads": 4, "value_gate_channels": 8}
    blocks = [
        {"hidden_size": 16, "mixer": mixer if n == 1 else {**mixer, "value_gate_channels": None}, "mlp": mlp}
        for n, mlp in enumerate([{"intermediate_size": 8 + n} for n in range(3)])
    ]
    config = LoopwiseDecoderConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=3,
        blocks=blocks,
        norm={},
        plan="0 core:(1)x2 2",
        value_embeddings={"1": 16},
        loops={"core": {"update": {"kind": "update.add"}}},
    )
    torch.manual_seed(0)
    return LoopwiseForCausalLM(config).eval()


def test_our_own_decoder(tmp_path: Path) -> None:
    model = own_decoder()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ids_BT = torch.randint(20, (2, 7))
    source = saved(model, tmp_path / "source")
    planned = edited(source, tmp_path / "new", "repeat(3, 4)", mode="tie")
    assert str(planned.edit.plan) == "0 core:(1)x2 (2)x2" and planned.doubts is None
    want = logits(apply(own := loopwise.load(source), "repeat(3, 4)", mode="alias"), ids_BT)
    assert own.config.num_hidden_layers == 3
    assert torch.equal(logits(loopwise.load(tmp_path / "new"), ids_BT), want)
    with pytest.raises(ValueError, match="the loop 'core' has components"):
        edited(source, tmp_path / "flat", "untie()")
    values = json.loads((source / "config.json").read_text(encoding="utf-8")) | {"loops": None}
    (source / "config.json").write_text(json.dumps(values), encoding="utf-8")
    edited(source, tmp_path / "flat", "untie()")
    flat = loopwise.load(tmp_path / "flat")
    assert flat.config.value_embeddings == {"1": 16, "2": 16} and flat.config.num_hidden_layers == 4
    assert torch.equal(logits(flat, ids_BT), logits(loopwise.load(source), ids_BT))


def test_files_are_shared_out_and_the_index_is_right(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    single = saved(model, tmp_path / "single")
    sharded = saved(model, tmp_path / "sharded", max_shard_size="60KB")
    assert len(read_checkpoint(sharded).files) > 3
    want = loopwise.materialize(model, loopwise.Plan.parse("(0-5)x2"))
    for source, size, is_sharded in (
        (single, None, False),
        (sharded, None, True),
        (single, 50_000, True),
        (sharded, 0, False),
    ):
        target = tmp_path / f"{source.name}-{size}"
        planned = edited(source, target, "stack(2)", shard_size=size)
        found = read_checkpoint(target)
        assert found.is_sharded == is_sharded
        assert (INDEX in {path.name for path in target.iterdir()}) == is_sharded
        limit = size or max(path.stat().st_size for path in source.glob("*.safetensors"))
        own = [sum(t.num_bytes for t in file.tensors.values()) for file in found.files.values()]
        assert not is_sharded or max(own) <= limit
        if is_sharded:
            assert found.index["metadata"]["total_size"] == sum(own) < planned.bytes_out
            assert found.index["weight_map"].keys() == found.tensors.keys()
        assert all(tensor.start % 8 == 0 for tensor in found.tensors.values())
        assert_same_tensors(AutoModelForCausalLM.from_pretrained(target), want)
        assert all(load_file(path) for path in target.glob("*.safetensors"))


def test_layers_that_predict_further_tokens_stay_behind(tmp_path: Path) -> None:
    source = saved(tiny_model("deepseek_v3"), tmp_path / "source")
    tensors = load_file(source / SINGLE)
    extra = {
        "model.layers.6.eh_proj.weight": torch.ones(2),
        "model.layers.6.mlp.experts.0.up_proj.weight": torch.ones(3),
    }
    save_file(tensors | extra, source / SINGLE, {"format": "pt"})
    values = json.loads((source / "config.json").read_text(encoding="utf-8")) | {"num_nextn_predict_layers": 1}
    (source / "config.json").write_text(json.dumps(values), encoding="utf-8")
    planned = edited(source, tmp_path / "new", LEADING)
    assert (planned.layout.num_layers, planned.layout.num_extra) == (6, 1)
    new = load_file(tmp_path / "new" / SINGLE)
    assert torch.equal(new["model.layers.9.eh_proj.weight"], torch.ones(2))
    assert torch.equal(new["model.layers.9.mlp.experts.0.up_proj.weight"], torch.ones(3))
    assert not any(name.startswith("model.layers.10.") for name in new)
    loaded = json.loads((tmp_path / "new" / "config.json").read_text(encoding="utf-8"))
    assert (loaded["num_hidden_layers"], loaded["num_nextn_predict_layers"], loaded["first_k_dense_replace"]) == (
        9,
        1,
        2,
    )


def named(folder: Path, values: dict[str, Any], names: list[str], dtype: torch.dtype = torch.float32) -> Path:
    """A folder of small tensors under these names; each holds its number."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    tensors = {name: torch.full((4,), number).to(dtype) for number, name in enumerate(names)}
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    return folder


def test_only_the_decoders_list_of_layers_is_edited(tmp_path: Path) -> None:
    """Towers as deep and larger, experts numbered like layers, names with the path inside: all stay."""
    inside = [f"model.language_model.layers.{n}.mlp.experts.{e}.up.weight" for n in range(3) for e in range(3)]
    towers = [f"model.vision_tower.layers.{n}.{part}.weight" for n in range(3) for part in "abcdefg"]
    towers += [f"model.audio_model.language_model.layers.{n}.x" for n in range(3)]
    outside = ["lm_head.weight", "model.language_model.layers_norm.0.weight", "my.model.language_model.layers.0.x"]
    values = {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 3, "layer_types": [*"abc"]},
    }
    source = named(tmp_path / "source", values, [*inside, *towers, *outside])
    planned = edited(source, tmp_path / "new", "order([2, 0, 0, 1])")
    assert planned.layout.prefix == "model.language_model.layers"
    old, new = load_file(source / SINGLE), load_file(tmp_path / "new" / SINGLE)
    assert all(torch.equal(new[name], old[name]) for name in (*towers, *outside))
    for number, layer in enumerate((2, 0, 0, 1)):
        for expert in range(3):
            name = "model.language_model.layers.{}.mlp.experts.{}.up.weight"
            assert torch.equal(new[name.format(number, expert)], old[name.format(layer, expert)])
    assert len(new) == len(old) + 3
    assert planned.config["text_config"]["layer_types"] == [*"caab"]
    assert planned.config["text_config"]["num_hidden_layers"] == 4


def test_what_a_file_leaves_to_its_class_is_written_down(tmp_path: Path) -> None:
    """Gemma-2 alternates by number; published files do not say so."""
    model = tiny_model("gemma2", num_layers=4)
    source = saved(model, tmp_path / "source")
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    del values["layer_types"]
    (source / "config.json").write_text(json.dumps(values), encoding="utf-8")
    plain = AutoModelForCausalLM.from_pretrained(source).eval()
    planned = edited(source, tmp_path / "new", "order([1, 1, 2])")
    assert planned.filled == ("layer_types",)
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    assert new.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    ids_BT = tiny_inputs(plain)
    assert torch.equal(logits(new, ids_BT), logits(loopwise.attach(plain, "(1)x2 2"), ids_BT))


QUANTIZED = {
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", "model.layers.1", "visual.layers.1.fc"],
    "ignore": ["layers.1.mlp", "re:.*vision.*"],
    "module_config": {"model.layers.0.self_attn.q_proj": {"bits": 8}, "model.layers.2.x": {"bits": 4}},
    "bits": 4,
}


def test_settings_of_packed_weights_follow_their_layers(tmp_path: Path) -> None:
    values = {"model_type": "llama", "num_hidden_layers": 3, "quantization_config": QUANTIZED}
    names = [f"model.layers.{n}.mlp.{part}" for n in range(3) for part in ("qweight", "scale")]
    source = named(tmp_path / "source", values, names, torch.uint8)
    planned = edited(source, tmp_path / "new", "order([1, 0, 1])")
    assert planned.config["quantization_config"] == {
        "modules_to_not_convert": [
            "lm_head",
            "model.layers.1.mlp.gate",
            "model.layers.0",
            "model.layers.2",
            "visual.layers.1.fc",
        ],
        "ignore": ["layers.0.mlp", "layers.2.mlp", "re:.*vision.*"],
        "module_config": {"model.layers.1.self_attn.q_proj": {"bits": 8}},
        "bits": 4,
    }
    new = load_file(tmp_path / "new" / SINGLE)
    assert new["model.layers.2.mlp.qweight"].tolist() == [2] * 4
    for text in ("llama_pro(3)", "recursive(3, cycle, average)"):
        with pytest.raises(ValueError, match="is quantised"):
            plan_disk_edit(source, [parse(text)])  # pyright: ignore[reportArgumentType]
    pattern = {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "quantization_config": {"ignore": ["re:model.layers.[01].*"]},
    }
    with pytest.raises(ValueError, match="name layers by a pattern"):
        Source(source, pattern).edited(planned.layout, [0, 1], planned.edit.plan)


def test_everything_that_is_no_weight_goes_along(tmp_path: Path) -> None:
    source = saved(tiny_model("llama"), tmp_path / "source")
    (source / "tokenizer.json").write_text("{}", encoding="utf-8")
    (source / "pytorch_model.bin").write_bytes(b"old")
    (source / ".cache").mkdir()
    (source / "templates").mkdir()
    (source / "templates" / "chat.jinja").write_text("hi", encoding="utf-8")
    edited(source, tmp_path / "new", "stack(2)")
    found = {str(path.relative_to(tmp_path / "new")) for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert found == {
        "config.json", "generation_config.json", SINGLE, "tokenizer.json", "loopwise_edit.json", "templates/chat.jinja",
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_provenance_is_a_chain(tmp_path: Path) -> None:
    source = saved(tiny_model("llama"), tmp_path / "source")
    edited(source, tmp_path / "one", "repeat(1, 3)", mode="tie")
    edited(tmp_path / "one", tmp_path / "two", "untie()", "llama_pro(2)")
    record = json.loads((tmp_path / "two" / "loopwise_edit.json").read_text(encoding="utf-8"))
    assert record["operators"] == ["untie()", "llama_pro(every=2)"]
    assert (record["plan_before"], record["plan"], record["promise"]) == ("0 (1-2)x2 3-5", "0-11", "exact")
    assert record["layers"][2] == {"sources": [1], "zero": True}
    assert record["source"]["name"] == "one" and record["path"] == "streamed"
    first = record["earlier"]
    assert (first["operators"], first["mode"]) == (["repeat(i=1, j=3)"], "tie")
    header = read_checkpoint(source).files[SINGLE].digest
    assert first["source"]["files"][SINGLE]["header_sha256"] == header
    assert "earlier" not in first


@pytest.mark.parametrize("model_type", ["gpt_neox_japanese", "modernbert-decoder"])
def test_layers_of_one_kind_with_other_tensors_are_doubted(model_type: str, tmp_path: Path) -> None:
    source = saved(tiny_model(model_type), tmp_path / "source")
    doubts = plan_disk_edit(source, [parse("prune([0])")]).doubts  # pyright: ignore[reportArgumentType]
    assert doubts is not None and "are of one kind" in doubts


def test_a_tensor_that_is_missing_is_doubted(tmp_path: Path) -> None:
    source = saved(tiny_model("llama"), tmp_path / "source")
    tensors = load_file(source / SINGLE)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, source / SINGLE, {"format": "pt"})
    doubts = plan_disk_edit(source, [parse("stack(2)")]).doubts  # pyright: ignore[reportArgumentType]
    assert doubts is not None and "layers 0 and 3 are of one kind, and mlp.up_proj.weight" in doubts


def test_a_source_with_code_of_its_own_keeps_it_and_takes_no_plan(tmp_path: Path) -> None:
    source = saved(tiny_model("llama"), tmp_path / "source")
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    values |= {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}
    (source / "config.json").write_text(json.dumps(values), encoding="utf-8")
    (source / "modeling_mine.py").write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="code of its own"):
        plan_disk_edit(source, [parse("stack(2)")], mode="tie")  # pyright: ignore[reportArgumentType]
    planned = edited(source, tmp_path / "new", "stack(2)")
    assert planned.doubts == "model type mine has not been tried"
    assert (tmp_path / "new" / "modeling_mine.py").read_text(encoding="utf-8") == "x = 1\n"
    assert planned.config["auto_map"] == values["auto_map"]


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    return saved(tiny_model("llama"), tmp_path / "source")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 8}, "num_hidden_layers is 8, and of model.layers there are 6"),
        ({"num_hidden_layers": 4}, "num_hidden_layers is 4, and of model.layers there are 6"),
        ({"is_encoder_decoder": True}, "is an encoder-decoder model"),
        ({"model_type": "albert"}, "with loopwise import"),
        ({"model_type": None}, "names no model_type"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tiny_folder: Path, values: dict[str, Any], message: str) -> None:
    old = json.loads((tiny_folder / "config.json").read_text(encoding="utf-8"))
    (tiny_folder / "config.json").write_text(json.dumps(old | values), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        plan_disk_edit(tiny_folder, [parse("stack(2)")])  # pyright: ignore[reportArgumentType]


def test_a_layer_that_is_missing_is_named(tiny_folder: Path) -> None:
    tensors = {name: t for name, t in load_file(tiny_folder / SINGLE).items() if ".layers.2." not in name}
    save_file(tensors, tiny_folder / SINGLE, {"format": "pt"})
    with pytest.raises(ValueError, match="of model.layers layer 2 is missing"):
        plan_disk_edit(tiny_folder, [parse("stack(2)")])  # pyright: ignore[reportArgumentType]


def test_kinds_that_cannot_become_one_are_refused(tmp_path: Path) -> None:
    source = saved(tiny_model("gemma3_text"), tmp_path / "source")
    with pytest.raises(ValueError, match="layers 0 and 4 cannot become one, they are of different kinds"):
        plan_disk_edit(source, [parse("recursive(3, cycle, average)")])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="layers 0 and 4 cannot become one, they are of different kinds: layer_types"):
        plan_disk_edit(source, [parse("recursive(3, cycle, lower)")])  # pyright: ignore[reportArgumentType]
    shutil.rmtree(source)
    source = saved(tiny_model("deepseek_v3"), tmp_path / "source")
    with pytest.raises(ValueError, match="first_k_dense_replace=2"):
        plan_disk_edit(source, [parse("stack(2)")])  # pyright: ignore[reportArgumentType]
