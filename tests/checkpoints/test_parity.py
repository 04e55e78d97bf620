"""The committed table of families says what the code does."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from loopwise.checkpoints.loading import FAMILIES
from tests.checkpoints import parity

ROWS = {row["checkpoint"]: row for row in json.loads(parity.TABLE.read_text(encoding="utf-8"))}


def test_every_family_and_every_golden_has_a_row():
    assert {row["family"] for row in ROWS.values()} == {family.name for family in FAMILIES}
    assert set(ROWS) == set(parity.CHECKPOINTS) == {path.name for path in parity.GOLDENS.iterdir()}


@pytest.mark.parametrize("name", parity.CHECKPOINTS)
def test_a_row_is_what_is_computed(name):
    row, committed = parity.row(name), ROWS[name]
    # The last digits of a difference are those of the machine.
    assert row["max_abs_diff"] <= row["atol"] and committed["max_abs_diff"] <= row["atol"]
    assert row | {"max_abs_diff": 0} == committed | {"max_abs_diff": 0}
    assert row["cached_equals_uncached"] is not False


def test_a_wrong_expected_value_shows(tmp_path, monkeypatch):
    for part in ("config.json", "model.safetensors", "inputs.safetensors"):
        (tmp_path / "mor_token").mkdir(exist_ok=True)
        (tmp_path / "mor_token" / part).write_bytes((parity.GOLDENS / "mor_token" / part).read_bytes())
    expected = load_file(parity.GOLDENS / "mor_token" / "expected.safetensors")
    expected["logits"][1, 2, 3] += 0.25
    save_file(expected, tmp_path / "mor_token" / "expected.safetensors")
    monkeypatch.setattr(parity, "GOLDENS", tmp_path)
    assert parity.difference("mor_token") == pytest.approx(0.25, abs=1e-4)
    save_file(
        expected | {"depth": torch.zeros_like(expected["depth"])}, tmp_path / "mor_token" / "expected.safetensors"
    )
    with pytest.raises(AssertionError, match="depth"):
        parity.difference("mor_token")
