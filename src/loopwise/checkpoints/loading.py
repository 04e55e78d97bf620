"""Load and export checkpoints of every known family, and everything that `models.saving.load` loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loopwise.checkpoints.family import Config, Family, read_config, read_tensors
from loopwise.checkpoints.huginn import HUGINN, RETROFIT
from loopwise.checkpoints.tensors import export_tensors, import_tensors

FAMILIES: tuple[Family, ...] = (HUGINN, RETROFIT)


def recognise(config: Config, names: frozenset[str]) -> Family | None:
    """The family of a checkpoint, or None."""
    return next((family for family in FAMILIES if family.matches(config, names)), None)


def import_checkpoint(folder: str | Path) -> Any:
    """A model of ours from a foreign checkpoint, in evaluation mode.

    Raises:
        ValueError: no known family, an unsupported configuration value, or the first wrong tensor.
    """
    folder = Path(folder)
    config, tensors = read_config(folder), read_tensors(folder)
    names = frozenset(tensors)
    family = recognise(config, names)
    if family is None:
        raise ValueError(f"{folder} is of no family that loopwise knows: {', '.join(f.name for f in FAMILIES)}")
    model = family.build(config, names)
    model.tie_weights()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    shared = {name for name in getattr(model, "_tied_weights_keys", None) or {} if model.config.tie_word_embeddings}
    wanted = {name: shape for name, shape in shapes.items() if name not in shared}
    ours = import_tensors(family.rules(config, names), tensors, wanted)
    with torch.no_grad():
        state = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, tensor in ours.items():
            state[name].copy_(tensor)
    model.config.foreign = {"family": family.name, "config": dict(config), "tensors": sorted(names)}
    return model.eval()


def export_checkpoint(model: Any, folder: str | Path) -> None:
    """Write an imported model back as the checkpoint that it came from: same names, same tensors, same config.json.

    Raises:
        ValueError: the model was not imported, or the folder is taken.
    """
    foreign = getattr(model.config, "foreign", None)
    if not foreign:
        raise ValueError("this model was not imported from a foreign checkpoint")
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not empty: name a new folder")
    family = next(family for family in FAMILIES if family.name == foreign["family"])
    names = frozenset(foreign["tensors"])
    tensors = export_tensors(family.rules(foreign["config"], names), dict(model.state_dict()), names)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(foreign["config"], indent=2) + "\n", encoding="utf-8")
