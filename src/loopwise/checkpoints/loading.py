"""Load and export checkpoints of every known family, and everything that `models.saving.load` loads."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loopwise.checkpoints.albert import ALBERT
from loopwise.checkpoints.family import Config, Family, read_config, read_tensors, tensor_names
from loopwise.checkpoints.hrm import HRM, TRM
from loopwise.checkpoints.hrm_text import HRM_TEXT
from loopwise.checkpoints.huginn import HUGINN, RETROFIT
from loopwise.checkpoints.looped_transformer import LOOPED_TRANSFORMER
from loopwise.checkpoints.loopformer import LOOPFORMER
from loopwise.checkpoints.mor import MOR
from loopwise.checkpoints.ouro import OURO
from loopwise.checkpoints.parcae import PARCAE
from loopwise.checkpoints.tensors import UntiedError, export_tensors, import_tensors
from loopwise.models import saving
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.playing import looping_of
from loopwise.plan.plans import Plan

FAMILIES: tuple[Family, ...] = (
    HUGINN,
    RETROFIT,
    HRM,
    TRM,
    HRM_TEXT,
    PARCAE,
    LOOPFORMER,
    LOOPED_TRANSFORMER,
    OURO,
    MOR,
    ALBERT,
)


def recognise(config: Config, names: frozenset[str]) -> Family | None:
    """The family of a checkpoint, or None."""
    return next((family for family in FAMILIES if family.matches(config, names)), None)


def load(
    source: str | Path,
    *,
    plan: Plan | str | None = None,
    gguf_file: str | None = None,
    dtype: Any = None,
    trust_remote_code: bool = False,
    allow_untied: bool = False,
) -> Any:
    """Load a model in evaluation mode, with a plan when it has one or one is given.

    Args:
        source: a local folder (plain, looped, one of our own models, or a checkpoint of a family in `FAMILIES`), a
            `.gguf` file, or a hub name where a hub is reachable.
        plan: the plan; replaces the one that the folder names.
        gguf_file: name of a GGUF file inside the folder `source`; its weights are dequantised.
        dtype: torch dtype or its name; default what the checkpoint says, and float32 for foreign families.
        trust_remote_code: allow code that comes with the checkpoint to run.
        allow_untied: load a checkpoint whose shared tensors differ as separate layers, with a warning that says so.

    Raises:
        ValueError: one line that says what is wrong with the source or the plan.
    """
    plan = Plan.parse(plan) if isinstance(plan, str) else plan
    folder = Path(source)
    config = _config(folder) if gguf_file is None else {}
    if recognise(config, tensor_names(folder) if config else frozenset()) is not None:
        model = import_checkpoint(folder, allow_untied=allow_untied)
        if dtype is not None:
            model = model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    else:
        is_own = str(config.get("model_type", "")).startswith("loopwise_")
        given = None if is_own else plan
        model = saving.load(source, plan=given, gguf_file=gguf_file, dtype=dtype, trust_remote_code=trust_remote_code)
    if plan is not None and isinstance(model.config, LoopwiseDecoderConfig):
        _replan(model, plan)
    return model


def _config(folder: Path) -> dict[str, Any]:
    """config.json, or nothing where it cannot be read: whoever loads the folder says why."""
    try:
        return read_config(folder)
    except (ValueError, OSError):
        return {}


def _replan(model: Any, plan: Plan) -> None:
    """Give a model of ours another plan.

    Raises:
        ValueError: the plan names layers that do not exist, or lacks a loop that has components.
    """
    looping = looping_of(model)
    assert looping is not None
    plan.validate(len(looping.returns))
    lacking = [name for name in model.config.loops or {} if name not in plan.loops]
    if lacking:
        raise ValueError(
            f"the plan {plan} lacks loop {lacking[0]!r}, which has components in this model: {looping.plan}"
        )
    looping.plan, model.config.plan = plan, str(plan)


def import_checkpoint(folder: str | Path, *, allow_untied: bool = False) -> Any:
    """A model of ours from a foreign checkpoint, in evaluation mode and float32.

    Args:
        folder: the checkpoint.
        allow_untied: where tensors that the family shares differ, load them as separate layers, with a warning.

    Raises:
        ValueError: no known family, an unsupported configuration value, or the first wrong tensor.
    """
    folder = Path(folder)
    config, tensors = read_config(folder), read_tensors(folder)
    family = recognise(config, frozenset(tensors))
    if family is None:
        raise ValueError(f"{folder} is of no family that loopwise knows: {', '.join(f.name for f in FAMILIES)}")
    try:
        return _import(family, config, tensors)
    except UntiedError as error:
        if family.untied is None:
            raise
        if not allow_untied:
            raise UntiedError(f"{error}; allow_untied=True (--allow-untied) loads separate layers") from None
        model = _import(family.untied, config, tensors)
        warnings.warn(
            f"{folder} is untied ({error}): loaded as separate layers, plan {model.config.plan}", stacklevel=2
        )
        return model


def _import(family: Family, config: Config, tensors: dict[str, torch.Tensor]) -> Any:
    names = frozenset(tensors)
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
    # Ours are all of one type; a checkpoint that mixes types is exported as it was.
    dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items() if t.dtype != torch.float32}
    model.config.foreign = {
        "family": family.name,
        "config": dict(config),
        "tensors": sorted(names),
        "dtypes": dtypes,
    }
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
    known = [*FAMILIES, *(family.untied for family in FAMILIES if family.untied is not None)]
    family = next(family for family in known if family.name == foreign["family"])
    names = frozenset(foreign["tensors"])
    tensors = export_tensors(family.rules(foreign["config"], names), dict(model.state_dict()), names)
    for name, dtype in foreign.get("dtypes", {}).items():
        tensors[name] = tensors[name].to(getattr(torch, dtype))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(foreign["config"], indent=2) + "\n", encoding="utf-8")
