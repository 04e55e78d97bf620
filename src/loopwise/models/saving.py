"""Load from and save to the places where models live: transformers folders, looped or plain, GGUF files, hub names."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import loopwise
from loopwise.cache.policy import CachePolicy
from loopwise.io.atomic import write_text
from loopwise.models.attach import attach, detach, plan_of
from loopwise.models.bundle import bundle
from loopwise.models.decoder import LoopwisePreTrainedModel
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.door import refuse_missing
from loopwise.models.hub import base_model, forget_quantization, refuse_adapters
from loopwise.models.playing import looping_of
from loopwise.models.realise import materialize
from loopwise.models.wrapper import AUTO_MAP, CODE_FILE
from loopwise.plan.plans import Plan

FORMATS = ("loopwise", "auto_map", "unroll")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def load(
    source: str | Path,
    *,
    plan: Plan | str | None = None,
    gguf_file: str | None = None,
    dtype: Any = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a causal language model in evaluation mode, with a plan when it has one or one is given.

    Args:
        source: a local folder (plain or looped), a `.gguf` file, or a hub name where a hub is reachable.
        plan: the plan to attach; replaces the one that the folder names (its cache policy stays).
        gguf_file: name of a GGUF file inside the folder `source`; its weights are dequantised.
        dtype: torch dtype or its name; default what the checkpoint says.
        trust_remote_code: allow code that comes with the checkpoint to run.

    Raises:
        ValueError: one line that says what is wrong with the source or the plan.
    """
    plan = Plan.parse(plan) if isinstance(plan, str) else plan
    place, options = _locate(source, gguf_file)
    if dtype is not None:
        options["dtype"] = dtype
    options["trust_remote_code"] = trust_remote_code
    if "gguf_file" in options and hasattr(transformers, "GgufConfig"):
        # Weights that stay packed can be neither trained nor saved.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    kind: Any = AutoModelForCausalLM
    with _OneLine(f"cannot load {source}"):
        if "gguf_file" not in options:
            config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
            if getattr(config, "is_encoder_decoder", False):
                raise ValueError(
                    f"{source} is an encoder-decoder model ({config.model_type}): only decoders can be looped"
                )
            if isinstance(config, LoopwiseDecoderConfig) and type(config) is not LoopwiseDecoderConfig:
                kind = AutoModel  # models of our own that are no language models
        model, info = kind.from_pretrained(place, output_loading_info=True, **options)
        refuse_missing(info, str(source))
    if "gguf_file" in options:
        forget_quantization(model)
    model.eval()
    if plan is not None:
        looping = looping_of(model)
        if looping is not None and looping.components:
            raise ValueError(
                f"{source} has {' and '.join(looping.components)} made for the plan {looping.plan}: load it without "
                "plan=, and change counts with set_loops"
            )
        policy = CachePolicy() if looping is None else looping.policy
        if looping is not None:
            detach(model)
        attach(model, plan, cache=str(policy), on_deeper=policy.on_deeper)
    return model


def load_tokenizer(source: str | Path, *, gguf_file: str | None = None) -> Any:
    """The tokenizer that comes with a source of `load`; `ValueError` when there is none."""
    place, options = _locate(source, gguf_file)
    if not options and Path(place).is_dir() and not any(Path(place, name).is_file() for name in _TOKENIZER_FILES):
        raise ValueError(f"{source} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)}")
    with _OneLine(f"cannot load a tokenizer from {source}"):
        return AutoTokenizer.from_pretrained(place, **options)


def save(model: nn.Module, folder: str | Path, *, format: str = "loopwise") -> None:
    """Write a model as a new folder, whole or not at all.

    Args:
        model: a model with a plan.
        folder: must not exist, or be empty.
        format: "loopwise" (the base model's tensors, those of what was added to it, and a configuration of type
            loopwise), "auto_map" (the same with one file of code that loads without loopwise, through
            `trust_remote_code=True`; not where anything was added), or "unroll" (the materialised model: plain
            transformers).

    Raises:
        ValueError: unknown format, the folder is taken, the model has no plan, carries adapters, or cannot be
            materialised.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown: use {', '.join(FORMATS)}")
    if plan_of(model) is None:
        raise ValueError("this model has no plan: use loopwise.attach(model, plan) first")
    refuse_adapters(model)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: name a new folder")
    if format != "loopwise" and isinstance(base_model(model), LoopwisePreTrainedModel):
        raise ValueError(f"format {format!r} is for models of transformers, this is one of loopwise: use 'loopwise'")
    added = getattr(looping_of(model), "components", {})
    if format == "auto_map" and added:
        raise ValueError(f"format 'auto_map' does not hold {' and '.join(added)}: use 'loopwise'")
    target: Any = materialize(model) if format == "unroll" else base_model(model)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.absolute().parent))
    try:
        target.save_pretrained(temporary)
        if format == "auto_map":
            _add_code(temporary)
        os.chmod(temporary, 0o755)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _add_code(folder: Path) -> None:
    write_text(folder / CODE_FILE, bundle(loopwise.__version__))
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    write_text(path, json.dumps(values | {"auto_map": AUTO_MAP}, indent=2) + "\n")


def _locate(source: str | Path, gguf_file: str | None) -> tuple[str, dict[str, Any]]:
    """Where transformers should look, and with which options."""
    path = Path(source)
    if gguf_file is None and path.suffix == ".gguf":
        path, gguf_file = path.parent, path.name
    if gguf_file is not None:
        if not (path / gguf_file).is_file():
            raise ValueError(f"GGUF file {path / gguf_file} does not exist")
        return str(path), {"gguf_file": gguf_file}
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{source} is not a checkpoint: it has no config.json")
    if path.is_file():
        raise ValueError(f"{source} is a file: name a checkpoint folder or a .gguf file")
    if not path.is_dir() and (path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1):
        raise ValueError(f"{source} does not exist")
    return str(source), {}


class _OneLine:
    """Turn whatever goes wrong while reading foreign files into a `ValueError` of one line."""

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or not isinstance(error, Exception):
            return
        line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ValueError(f"{self.what}: {line[:300]}") from error
