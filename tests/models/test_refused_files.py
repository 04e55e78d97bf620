"""What is refused when saving and loading: one clear line, nothing written."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import assert_close, looping_plan
from peft import LoraConfig, get_peft_model
from tiny import tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import loopwise

LOOPED = looping_plan(6)


def logits(model, ids_BT):
    with torch.no_grad():
        return model(ids_BT).logits


def looped(model_type="llama", plan=LOOPED, **options):
    model = tiny_model(model_type)
    return loopwise.attach(model, plan, **options), tiny_inputs(model)


def assert_refused(action, match, folder):
    """A `ValueError` of one line, and nothing new in the folder."""
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    with pytest.raises(ValueError, match=match) as caught:
        action()
    assert len(str(caught.value).splitlines()) == 1, str(caught.value)
    assert len(str(caught.value)) < 600
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before


@pytest.mark.parametrize("form", ["loopwise", "auto_map", "unroll"])
def test_a_taken_destination_is_refused(tmp_path, form):
    model, _ = looped()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("folder", "file"):
        assert_refused(lambda name=name: loopwise.save(model, tmp_path / name, format=form), "exists", tmp_path)
    (tmp_path / "empty").mkdir()
    loopwise.save(model, tmp_path / "empty", format=form)
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "folder"]


def test_what_cannot_be_saved_is_refused(tmp_path):
    model, _ = looped()
    assert_refused(
        lambda: loopwise.save(model, tmp_path / "x", format="pickle"), "format 'pickle' is unknown", tmp_path
    )
    assert_refused(lambda: loopwise.save(tiny_model("llama"), tmp_path / "x"), "no plan", tmp_path)
    deep, _ = looped("deepseek_v3")
    assert_refused(lambda: loopwise.save(deep, tmp_path / "x", format="unroll"), "cannot be unrolled", tmp_path)
    with pytest.raises(OSError):
        loopwise.save(model, tmp_path / "absent" / "x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("form", ["loopwise", "auto_map", "unroll"])
def test_a_model_with_adapters_is_refused_until_they_are_merged(tmp_path, form):
    """Its tensors have other names, which no loader would find."""
    model, ids_BT = looped()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert_refused(lambda: loopwise.save(adapted, tmp_path / "x", format=form), "merge_and_unload", tmp_path)
    merged = adapted.merge_and_unload()
    loopwise.save(merged, tmp_path / "x", format=form)
    assert_close(logits(loopwise.load(tmp_path / "x"), ids_BT), logits(merged, ids_BT), "merged")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "model"
    loopwise.save(looped()[0], path)
    return path


def edited(folder, tmp_path, change):
    """A copy of a checkpoint with another config.json; `change` gets the JSON object or the text."""
    copy = tmp_path / "edited"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    result = change(config)
    text = json.dumps(config) if result is None else result
    (copy / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return copy


def set_base(**fields):
    return lambda config: config["base_config"].update(fields)


DISAGREEMENTS = {
    "plan beyond the layers": (lambda config: config.update(plan="0-6"), "layer 6"),
    "fewer layers than the plan visits": (set_base(num_hidden_layers=4), "layer"),
    "more layers than tensors": (set_base(num_hidden_layers=7), "tensor model.layers.6.*missing"),
    "another width": (set_base(hidden_size=16, head_dim=4), "size|shape|mismatch"),
    "no plan": (lambda config: config.pop("plan") and None, "plan"),
    "empty plan": (lambda config: config.update(plan=""), "plan"),
    "malformed plan": (lambda config: config.update(plan="0-("), "plan|expected"),
    "plan of another type": (lambda config: config.update(plan=[0, 1, 2]), "plan"),
    "unknown policy": (lambda config: config.update(cache="lru"), "cache policy 'lru'"),
    "unknown on_deeper": (lambda config: config.update(on_deeper="hope"), "on_deeper"),
    "unknown base": (set_base(model_type="gpt7"), "gpt7"),
    "a base that is no decoder": (set_base(model_type="vit", architectures=None), "vit"),
    "no base": (lambda config: config.update(base_config=None), "base_config"),
    "a base without a type": (lambda config: config["base_config"].pop("model_type") and None, "model_type"),
    "itself as base": (lambda config: config.update(base_config={"model_type": "loopwise"}), "base"),
    "components": (lambda config: config.update(components={"gate": {"width": 3}}), "components.*gate"),
    "components of another type": (lambda config: config.update(components=7), "components"),
    "unknown type": (lambda config: config.update(model_type="loopwiser"), "loopwiser"),
    "no type": (lambda config: config.pop("model_type") and None, "model_type"),
    "no JSON": (lambda config: "{", "config.json|JSON"),
    "no object": (lambda config: "[1, 2]", "."),
    "empty file": (lambda config: "", "config.json|JSON"),
    "no UTF-8": (lambda config: b"\xff\xfe{}", "."),
    "bottomless nesting": (lambda config: "[" * 100_000, "."),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_a_configuration_that_does_not_fit_is_refused_in_one_line(folder, tmp_path, case):
    change, match = DISAGREEMENTS[case]
    copy = edited(folder, tmp_path, change)
    assert_refused(lambda: loopwise.load(copy), match, tmp_path)


def test_a_missing_or_broken_tensor_file_is_refused(folder, tmp_path):
    copy = edited(folder, tmp_path, lambda config: None)
    tensors = copy / "model.safetensors"
    whole = tensors.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"\0" * 100, b"not a tensor file"):
        tensors.write_bytes(content)
        assert_refused(lambda: loopwise.load(copy), "cannot load", tmp_path)
    tensors.unlink()
    assert_refused(lambda: loopwise.load(copy), "cannot load", tmp_path)


def test_a_missing_tensor_is_named(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = edited(folder, tmp_path, lambda config: None)
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert_refused(lambda: loopwise.load(copy), r"tensor model\.layers\.3\.mlp\.up_proj\.weight is missing", tmp_path)
    with pytest.raises(ValueError, match="is missing"):
        AutoModelForCausalLM.from_pretrained(copy)
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text())["base_config"]))
    assert_refused(lambda: loopwise.load(copy), r"up_proj\.weight is missing", tmp_path)


def test_places_that_are_no_checkpoint_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "fake.gguf").write_text("not a GGUF file")
    for source, match in (
        ("empty", "not a checkpoint"),
        ("text.txt", "is a file"),
        ("absent", "does not exist"),
        ("absent.gguf", "GGUF file .* does not exist"),
        ("fake.gguf", "cannot load"),
    ):
        assert_refused(lambda source=source: loopwise.load(tmp_path / source), match, tmp_path)
        if source != "fake.gguf":
            assert_refused(lambda source=source: loopwise.load_tokenizer(tmp_path / source), match, tmp_path)
    missing = "GGUF file .* does not exist"
    assert_refused(lambda: loopwise.load(tmp_path / "empty", gguf_file="model.gguf"), missing, tmp_path)
    assert_refused(lambda: loopwise.load("nobody/nothing"), "cannot load nobody/nothing", tmp_path)
    assert_refused(lambda: loopwise.load("./nothing"), "does not exist", tmp_path)
    assert_refused(lambda: loopwise.load(""), ".", tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    assert_refused(lambda: loopwise.load_tokenizer(folder), "tokenizer", folder)


def test_an_encoder_decoder_checkpoint_is_refused(tmp_path):
    config = T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert_refused(lambda: loopwise.load(tmp_path), "encoder-decoder", tmp_path)


def test_a_plan_that_does_not_fit_what_is_loaded_is_refused(folder):
    with pytest.raises(ValueError, match="layer"):
        loopwise.load(folder, plan="0-6")
    with pytest.raises(loopwise.PlanError):
        loopwise.load(folder, plan="0-(")


# Small whole numbers: a million layers would be built.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats(allow_nan=False, width=16) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
OUTER = ["model_type", "plan", "cache", "on_deeper", "components", "base_config", "architectures", "dtype", "auto_map"]
INNER = [
    "model_type",
    "architectures",
    "num_hidden_layers",
    "hidden_size",
    "layer_types",
    "rope_parameters",
    "vocab_size",
]
INNER += ["num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "dtype", "pad_token_id", "use_cache"]
INNER += ["tie_word_embeddings", "rms_norm_eps", "attention_bias", "is_encoder_decoder", "bos_token_id"]


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    outer=st.dictionaries(st.sampled_from(OUTER), JSON, max_size=2),
    inner=st.dictionaries(st.sampled_from(INNER), JSON, max_size=2),
)
def test_any_json_in_the_configuration_loads_or_is_refused_in_one_line(folder, tmp_path_factory, outer, inner):
    copy = edited(
        folder,
        tmp_path_factory.getbasetemp(),
        lambda config: config["base_config"].update(inner) or config.update(outer),
    )
    try:
        model = loopwise.load(copy)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and str(error).strip(), repr(error)
    else:
        assert loopwise.plan_of(model) is None or loopwise.plan_of(model).num_slots > 0
