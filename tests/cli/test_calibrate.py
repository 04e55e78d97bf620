"""`loopwise calibrate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loopwise.cli.calibrate import calibrate, panels_of, read_rules, split_rules, table_rows
from loopwise.decode.halting import parse_halting
from tests.plots.test_pictures import assert_readable

Run = Callable[..., tuple[int, str, str]]
LOOP = "0 core:(1-2)x4 3"
SIZES = ["--length", 16, "--block", 8]


def test_rules_are_split_outside_of_brackets() -> None:
    assert split_rules("kl, latent(0.1, patience=2) ,argmax") == ["kl", "latent(0.1, patience=2)", "argmax"]
    assert read_rules(["kl", "fixed", "kl"]) == [parse_halting("kl")]
    for bad in ("", "kl,", ",kl"):
        with pytest.raises(ValueError, match="--halt"):
            split_rules(bad)


def test_command(run: Run, saved_model: Path, text_file: Path, tmp_path: Path) -> None:
    data, png = tmp_path / "curves.json", tmp_path / "curves.png"
    rules = "kl,latent(patience=2),confidence,argmax"
    code, out, err = run(
        "calibrate", saved_model, "--text", text_file, "--plan", LOOP, "--halt", rules, "--target", 0.001, *SIZES,
        "--json", data, "--png", png,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(data.read_text(encoding="utf-8"))
    assert [row["rule"] for row in found["rules"]] == ["fixed", "kl", "latent", "confidence", "argmax"]
    assert (found["plan"], found["rungs"], found["target"]) == (LOOP, 4, 0.001)
    assert f"{found['tokens']} tokens in {found['blocks']} blocks" in out and "row " in err
    for row in found["rules"]:
        chosen = row["curve"][row["chosen"]]
        assert chosen["bound"] <= 0.001 and all(point["bound"] <= 0.001 for point in row["curve"][: row["chosen"]])
        assert chosen["halt"] in out and parse_halting(chosen["halt"])
    assert "latent(threshold=" in out and "patience=2)" in out
    assert png.read_bytes().startswith(b"\x89PNG")


def test_what_it_says_is_what_generate_takes(run: Run, saved_model: Path, text_file: Path) -> None:
    arguments = ["--text", text_file, "--exits", "1,2,3", "--halt", "latent", "--target", 0.01, *SIZES]
    out = run("calibrate", saved_model, *arguments)[1]
    (rule,) = [word for line in out.splitlines() for word in line.split("  ") if word.strip().startswith("latent(")]
    code, _, err = run(
        "generate", saved_model, "--prompt", "A visit", "-n", 4, "--exits", "1,2,3", "--halt", rule.strip()
    )
    assert code == 0 and "of 4 exits" in err


def test_pictures_are_readable(saved_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    from loopwise.plots.curves import panels_figure

    model = AutoModelForCausalLM.from_pretrained(saved_model)
    ids = [(7 * i * i + i) % 290 for i in range(100)]
    trace, curves = calibrate(model, ids, ["kl", "latent", "confidence"], length=20, block=10)
    rows = table_rows(curves, 0.01)
    panels = panels_of(rows, trace.num_rungs, 0.01)
    assert [len(panel.curves) for panel in panels] == [4, 4, 4]
    assert len(panels[1].marks) == sum(row["chosen"] is not None for row in rows[1:])
    assert all(max(curve.y, default=0) <= 0.05 for curve in panels[1].curves)
    assert_readable(panels_figure([panels[0], panels[2]], title="Halting rules"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--halt", "kll"], "'kll' is unknown"),
        (["--halt", "kl,"], "--halt 'kl,'"),
        (["--halt", "ponder"], "no threshold to calibrate"),
        (["--halt", "act"], "no threshold to calibrate"),
        (["--halt", "hazard", "--plan", LOOP], "exit gate"),
        (["--target", "0"], "--target 0"),
        (["--target", "nan"], "--target nan"),
        (["--length", "0"], "--length 0"),
        (["--block", "0"], "--block 0"),
        (["--block", "500", "--length", "500"], "at least 4 are needed"),
        (["--max-tokens", "1"], "--max-tokens 1"),
        (["--exits", "0"], "--exits '0'"),
        (["--exits", "9"], "from 1 to 4"),
        (["--plan", LOOP, "--loops", "0"], "--loops '0'"),
        (["--loops", "3"], "no plan"),
        (["--text", "missing.txt"], "missing.txt"),
    ],
)
def test_bad_input(
    refused: Callable[..., str], saved_model: Path, text_file: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    text = [] if "--text" in arguments else ["--text", text_file]
    outputs = ["--json", tmp_path / "curves.json", "--png", tmp_path / "curves.png"]
    assert message in refused("calibrate", saved_model, *text, *arguments, *outputs)
    assert list(tmp_path.iterdir()) == [text_file]
