"""`loopwise propose`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import loopwise
from loopwise.cli.propose import read_counts, rows_of
from loopwise.edit.operators import DepthOperator
from loopwise.edit.text import parse

Run = Callable[..., tuple[int, str, str]]


def test_command(run: Run, saved_model: Path, text_file: Path, tmp_path: Path) -> None:
    data, png = tmp_path / "found.json", tmp_path / "found.png"
    counts = ["--loop", "2,3", "--prune", "1,2", "--tie", "2"]
    sizes = ["--window", 16, "--max-tokens", 160]
    code, out, err = run("propose", saved_model, text_file, *counts, *sizes, "--json", data, "--png", png)
    assert code == 0, err
    assert "measuring weights\nmeasuring hidden states\nscoring 1/" in err and " s left" in err
    result = json.loads(data.read_text(encoding="utf-8"))
    kinds = [item["kind"] for item in result["proposals"]]
    assert kinds.count("prune") == kinds.count("loop") == 2 and {"tie", "tie_block"} <= {*kinds}
    for item in result["proposals"]:
        operator = parse(item["operator"])
        assert isinstance(operator, DepthOperator) and operator.text() == item["operator"]
        assert f"\n{item['operator']}\n" in out
        assert f"{item['loss']['before']:.3f} -> {item['loss']['after']:.3f} nats per token" in out
        assert all(reason in out for reason in item["reason"].split("; "))
    assert result["rows"] == {"choose": 5, "report": 5} and result["window"] == 16
    assert len(result["influence"]["angle"]) == 5 and set(result["versions"]) == {"python", "torch", "transformers"}
    assert len(result["weights"]["groups"]) == 9
    assert max(map(len, data.read_text(encoding="utf-8").splitlines())) > 40  # a row of a matrix is a line
    assert png.read_bytes().startswith(b"\x89PNG")
    # The reported loss is that of the model under the plan, on the rows that report.
    model, tokenizer = loopwise.load(saved_model), loopwise.load_tokenizer(saved_model)
    rows = rows_of(tokenizer, text_file.read_text(encoding="utf-8"), 16, 160)[1]
    loopwise.attach(model, result["proposals"][0]["plan"])
    assert model(rows, labels=rows).loss.item() == pytest.approx(result["proposals"][0]["loss"]["after"], abs=1e-5)


def test_what_is_not_asked_for_is_not_proposed(run: Run, saved_model: Path, text_file: Path) -> None:
    code, out, err = run("propose", saved_model, text_file, "--loop", "none", "--tie", "none", "--max-tokens", 64)
    assert code == 0, err
    assert "\nprune(" in out and "repeat(" not in out and "recursive(" not in out and "retrofit(" not in out


@pytest.mark.parametrize(
    ("text", "counts"), [(None, None), ("none", ()), ("2", (2,)), ("2, 3,2", (2, 3)), ("12", (12,))]
)
def test_counts(text: str | None, counts: tuple[int, ...] | None) -> None:
    assert read_counts("loop", text) == counts


def test_rows_take_turns_over_the_text(saved_model: Path) -> None:
    tokenizer = loopwise.load_tokenizer(saved_model)
    text = " ".join(map(str, range(600)))
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0].tolist()
    choose, report = rows_of(tokenizer, text, 8, 80)
    assert choose.shape == report.shape == (5, 8)
    assert choose[0].tolist() == ids[:8] and report[-1].tolist() == ids[-8:]
    whole = rows_of(tokenizer, text, 8, len(ids))
    seen = [token for pair in zip(whole[0].tolist(), whole[1].tolist(), strict=False) for row in pair for token in row]
    assert seen[:80] == ids[:80]  # nothing is scored twice when there is enough
    short = rows_of(tokenizer, "0 1 2 3 4 5", 64, 1024)
    assert len(short[0]) >= 2 and len(short[1]) >= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prune", "4"], "prune 4: of 4 layers, leave out 1 to 3"),
        (["--prune", "x"], "--prune 'x': write numbers from 1"),
        (["--prune", "0"], "--prune '0'"),
        (["--loop", "1"], "loop 1"),
        (["--tie", "3"], "tie 3: divides neither 4 layers nor the 2 between the ends"),
        (["--tie", ""], "--tie ''"),
        (["--window", "1"], "--window 1"),
        (["--max-tokens", "7"], "--max-tokens 7"),
    ],
)
def test_bad_input(
    refused: Callable[..., str], saved_model: Path, text_file: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    outputs = ["--json", tmp_path / "found.json", "--png", tmp_path / "found.png"]
    line = refused("propose", saved_model, text_file, *arguments, *outputs)
    assert message in line
    assert list(tmp_path.iterdir()) == [text_file]


def test_bad_files(refused: Callable[..., str], saved_model: Path, text_file: Path, tmp_path: Path) -> None:
    short, empty = tmp_path / "short.txt", tmp_path / "empty.txt"
    short.write_text("A", encoding="utf-8")
    empty.write_text(" \n", encoding="utf-8")
    assert "missing.txt" in refused("propose", saved_model, tmp_path / "missing.txt")
    assert "holds no text" in refused("propose", saved_model, empty)
    assert "at least 8 are needed" in refused("propose", saved_model, short)
    assert "create it first" in refused("propose", saved_model, text_file, "--png", tmp_path / "missing" / "found.png")
    assert "is a folder" in refused("propose", saved_model, text_file, "--json", tmp_path)
    assert "nowhere" in refused("propose", tmp_path / "nowhere", text_file)


def test_models_that_are_no_stack(refused: Callable[..., str], saved_model: Path, text_file: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    one = LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    both = T5Config(vocab_size=300, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    tokenizer = AutoTokenizer.from_pretrained(saved_model)
    for name, model, message in (
        ("one", LlamaForCausalLM(one), "single layer"),
        ("both", T5ForConditionalGeneration(both), "encoder-decoder"),
    ):
        folder = text_file.parent / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        assert message in refused("propose", folder, text_file)
