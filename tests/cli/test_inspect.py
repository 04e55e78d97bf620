"""`loopwise inspect`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopwise.cli.inspect import inspect_model, report_text
from loopwise.cli.main import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(saved_model: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(saved_model)


def test_a_plain_model(model) -> None:
    report = inspect_model(model)
    assert (report["class"], report["model_type"]) == ("LlamaForCausalLM", "llama")
    assert report["plan"] == "0-3"
    assert [row["visits"] for row in report["layers"]] == [1, 1, 1, 1]
    assert report["parameters"]["unique"] == report["parameters"]["unrolled"] == model.num_parameters()


def test_a_loop_adds_depth_and_cache_but_no_parameters(model) -> None:
    plain, looped = inspect_model(model), inspect_model(model, "0 (1-2)x3 3")
    assert looped["num_slots"] == len(looped["slots"]) == 8
    assert looped["cache_bytes_per_token"] == 2 * plain["cache_bytes_per_token"]
    assert looped["parameters"]["unique"] == plain["parameters"]["unique"]
    layer = plain["layers"][1]["parameters"]
    assert looped["parameters"]["unrolled"] == plain["parameters"]["unrolled"] + 4 * layer
    assert [row["visits"] for row in looped["layers"]] == [1, 3, 3, 1]
    assert looped["slots"][3] == {"position": [1, 0, 0], "iterations": [1], "layer": 1}


def test_the_text_names_what_is_visited(model) -> None:
    text = report_text(inspect_model(model, "0 core:(1)x2 3"))
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == "LlamaForCausalLM (llama), 4 layers at model.layers"
    assert any(line.startswith("1 ") and line.endswith("visited 2 times") for line in lines)
    assert any(line.startswith("2 ") and line.endswith("not visited") for line in lines)
    assert any(line.startswith("+- core x2") for line in lines)
    assert "slots         4, over 3 of 4 layers" in lines


def test_a_plan_beyond_the_layers(model) -> None:
    with pytest.raises(ValueError, match="layer 4 does not exist"):
        inspect_model(model, "0-4")


def test_command(run: Run, saved_model: Path, tmp_path: Path) -> None:
    png = tmp_path / "plan.png"
    code, out, err = run("inspect", saved_model, "--plan", "0 core:(1-2)x2 3", "--loops", "3", "--png", png)
    assert (code, err) == (0, "")
    assert "plan  0 core:(1-2)x3 3" in out
    assert png.read_bytes().startswith(b"\x89PNG")


def test_command_json(run: Run, saved_model: Path) -> None:
    code, out, err = run("inspect", saved_model, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["num_slots"] == len(report["layers"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "0-9"], "layer 4 does not exist"),
        (["--plan", "0 ()x2"], "bad plan"),
        (["--plan", "0 (1)x0"], "bad plan"),
        (["--plan", "0 core:(1)x2", "--loops", "corr=2"], "did you mean core"),
        (["--loops", "2"], "has no plan"),
        (["--context", "0"], "--context 0"),
        (["--device", "warp"], "--device warp"),
    ],
)
def test_bad_input(refused: Callable[..., str], saved_model: Path, arguments: list[str], message: str) -> None:
    assert message in refused("inspect", saved_model, *arguments)


@pytest.mark.parametrize("name", ["missing", "missing.gguf", "empty", "file.txt", "broken", "random.gguf"])
def test_a_source_that_is_not_a_model(refused: Callable[..., str], tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{", encoding="utf-8")
    (tmp_path / "file.txt").write_text("text", encoding="utf-8")
    (tmp_path / "random.gguf").write_bytes(b"not a model")
    assert name in refused("inspect", tmp_path / name)


PLAIN_CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
WRONG_VALUES = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=8) | st.lists(st.integers(), max_size=2)
)


@given(
    config=st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.builds(
        lambda key, value: json.dumps(PLAIN_CONFIG | {key: value}).encode(),
        st.sampled_from([*PLAIN_CONFIG, "loopwise_plan", "plan", "base_config", "architectures", "dtype"]),
        WRONG_VALUES,
    )
)
@settings(max_examples=60, deadline=None)
def test_no_config_file_ends_in_a_traceback(config: bytes) -> None:
    # The folder holds no weights, so whatever the config says, the answer is no.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(config)
        assert main(["inspect", folder]) == 2


def test_an_encoder_decoder_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    refused("inspect", tmp_path / "t5", "--plan", "0")


def test_nothing_is_drawn_when_the_plan_is_bad(refused: Callable[..., str], saved_model: Path, tmp_path: Path) -> None:
    refused("inspect", saved_model, "--plan", "0-9", "--png", tmp_path / "plan.png")
    assert list(tmp_path.iterdir()) == []
