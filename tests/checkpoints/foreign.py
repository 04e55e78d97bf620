"""Checkpoints for the tests of families: the committed goldens, spoiled copies, and random ones of other sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from loopwise.checkpoints.family import Family
from loopwise.checkpoints.loading import export_checkpoint, import_checkpoint
from loopwise.checkpoints.tensors import export_tensors

GOLDENS = Path(__file__).parents[1] / "goldens"
REMOVED = object()


def tensors_of(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def spoiled(
    golden: str, folder: Path, *, config: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None
) -> Path:
    """A copy of a golden with fields and tensors replaced, added, or taken away (`REMOVED`)."""
    source = GOLDENS / golden
    fields = config_of(source) | (config or {})
    values = tensors_of(source) | (tensors or {})
    return write(
        folder,
        {name: value for name, value in fields.items() if value is not REMOVED},
        {name: value for name, value in values.items() if value is not REMOVED},
    )


def random_checkpoint(family: Family, config: dict[str, Any], folder: Path, seed: int = 0) -> Path:
    """A checkpoint of a family with random tensors, whatever the sizes in `config`."""
    model = family.build(config, frozenset())
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.2 * torch.randn(parameter.shape, generator=generator))
    return write(folder, config, export_tensors(family.rules(config, frozenset()), dict(model.state_dict())))


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def assert_round_trip(source: Path, folder: Path) -> Any:
    """Import and export again: same names, same tensors, same configuration; also after saving in our own form."""
    model = import_checkpoint(source)
    export_checkpoint(model, folder / "foreign")
    assert_same_tensors(tensors_of(folder / "foreign"), tensors_of(source))
    assert config_of(folder / "foreign") == config_of(source)
    model.save_pretrained(folder / "own")
    again = type(model).from_pretrained(folder / "own")
    assert_same_tensors(again.state_dict(), model.state_dict())
    export_checkpoint(again, folder / "again")
    assert_same_tensors(tensors_of(folder / "again"), tensors_of(source))
    return model, again
