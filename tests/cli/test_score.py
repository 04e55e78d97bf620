"""`loopwise score`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

import loopwise
from loopwise import Plan
from loopwise.cli.score import encode_text, expand_plans, score_plans

Run = Callable[..., tuple[int, str, str]]
LOOP = "0 core:(1-2)x2 3"


@pytest.fixture
def loaded(saved_model: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(saved_model), AutoTokenizer.from_pretrained(saved_model)


def test_plans_times_loops() -> None:
    plans = expand_plans([LOOP, "core:(0-3)x2"], ["1", "core=3"])
    assert [str(plan) for plan in plans] == [
        "0 core:(1-2) 3",
        "0 core:(1-2)x3 3",
        "core:(0-3)",
        "core:(0-3)x3",
    ]
    assert expand_plans(["0-3"]) == [Plan.parse("0-3")]
    with pytest.raises(ValueError, match="--plan"):
        expand_plans([], ["2"])


def test_rows_are_the_loss_of_the_model_under_the_plan(loaded, text_file: Path) -> None:
    import torch

    model, tokenizer = loaded
    input_ids = encode_text(tokenizer, text_file.read_text(encoding="utf-8"), 40)
    # One window holds the whole text, so each row is the plain mean loss.
    rows = score_plans(model, input_ids, ["0-3", LOOP, "0 3"], window=64, stride=64)
    assert [row["label"] for row in rows] == ["plain", "0-3", LOOP, "0 3"]
    for row in rows:
        loopwise.attach(model, row["plan"])
        with torch.no_grad():
            loss = model(input_ids, labels=input_ids).loss.item()
        loopwise.detach(model)
        assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert row["tokens"] == 39
    assert rows[0]["perplexity"] == rows[1]["perplexity"] != rows[2]["perplexity"]
    assert rows[2]["flops_per_token"] > rows[0]["flops_per_token"] > rows[3]["flops_per_token"]
    assert [row["num_slots"] for row in rows] == [4, 4, 6, 2]


def test_the_models_own_plan_is_the_first_row_and_comes_back(loaded) -> None:
    model, tokenizer = loaded
    loopwise.attach(model, LOOP)
    rows = score_plans(model, encode_text(tokenizer, "A visit of a layer"), ["0-3"])
    assert [row["plan"] for row in rows] == [LOOP, "0-3"]
    assert loopwise.plan_of(model) == Plan.parse(LOOP)


def test_a_bad_plan_stops_everything_before_anything_is_scored(loaded) -> None:
    model, tokenizer = loaded
    scored: list[str] = []
    with pytest.raises(ValueError, match="layer 4 does not exist"):
        score_plans(
            model,
            encode_text(tokenizer, "A visit of a layer"),
            [LOOP, "0-7"],
            on_row=lambda index, total, label: scored.append(label),
        )
    assert scored == []
    assert loopwise.plan_of(model) is None


def test_command(run: Run, saved_model: Path, text_file: Path, tmp_path: Path) -> None:
    data, png = tmp_path / "rows.json", tmp_path / "rows.png"
    plans = ["--plan", LOOP, "--plan", "0-1 core:(2)x1 3", "--loops", "1", "--loops", "2"]
    sizes = ["--window", 32, "--stride", 16, "--max-tokens", 60]
    code, out, err = run("score", saved_model, text_file, *plans, *sizes, "--json", data, "--png", png)
    assert code == 0, err
    result = json.loads(data.read_text(encoding="utf-8"))
    assert [row["num_slots"] for row in result["rows"]] == [4, 4, 6, 4, 5]
    assert result["rows"][0]["tokens"] == 59
    assert result["versions"]["torch"]
    assert png.read_bytes().startswith(b"\x89PNG")
    for row in result["rows"]:
        assert f"{row['perplexity']:.4g}" in out
    assert "scoring 5/5" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "0-9"], "layer 4 does not exist"),
        (["--plan", "0 (1"], "bad plan"),
        (["--loops", "2"], "--plan"),
        (["--plan", "0-3", "--loops", "2"], "no loop"),
        (["--window", "1"], "--window 1"),
        (["--window", "8", "--stride", "9"], "--stride 9"),
        (["--max-tokens", "1"], "--max-tokens 1"),
    ],
)
def test_bad_input(
    refused: Callable[..., str], saved_model: Path, text_file: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    outputs = ["--json", tmp_path / "rows.json", "--png", tmp_path / "rows.png"]
    assert message in refused("score", saved_model, text_file, *arguments, *outputs)
    assert list(tmp_path.iterdir()) == [text_file]


def test_bad_texts(refused: Callable[..., str], saved_model: Path, tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café".encode("latin-1"))
    one = tmp_path / "one.txt"
    one.write_text("A", encoding="utf-8")
    assert "not UTF-8" in refused("score", saved_model, latin)
    assert "missing.txt" in refused("score", saved_model, tmp_path / "missing.txt")
    assert str(tmp_path) in refused("score", saved_model, tmp_path)
    assert "fewer than two tokens" in refused("score", saved_model, one)
    assert "create it first" in refused("score", saved_model, latin, "--json", tmp_path / "missing" / "rows.json")
