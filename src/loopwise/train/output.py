"""What a run leaves for people: samples to read, and the trained model as a folder that loads."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from loopwise.models.decoder import LoopwisePreTrainedModel
from loopwise.models.loop_parts import needs_generator
from loopwise.models.saving import save
from loopwise.tasks.base import text
from loopwise.train.batch import IGNORE
from loopwise.train.data.source import Source
from loopwise.train.evaluate import evaluating, predict

ADAPTER = "adapter"
_SAMPLE_TOKENS = 96


def sample(model: Any, source: Source, count: int) -> str:
    """Held-out rows and what the model makes of them, as text.

    Tasks show the row, the right answer and the model's; texts show the beginning of a held-out row and how the model
    goes on; points show values and predictions.
    """
    batch = source.held_out(0, count)
    device = next(model.parameters()).device
    task = getattr(source, "task", None)
    with evaluating(model):
        if batch.points is not None:
            output = predict(model, batch.to(device)).cpu()
            lines = [
                "values      "
                + " ".join(f"{value:+.2f}" for value in batch.points.ys_BN[row].tolist())
                + "\npredictions "
                + " ".join(f"{value:+.2f}" for value in output[row].tolist())
                for row in range(count)
            ]
        elif task is not None:
            output = predict(model, batch.to(device)).argmax(-1).cpu()
            assert batch.tokens_BT is not None and batch.targets_BT is not None
            scored = torch.where(batch.targets_BT == IGNORE, IGNORE, output)
            lines = [
                f"row    {text(task, batch.tokens_BT[row].tolist())}\n"
                f"right  {text(task, batch.targets_BT[row].tolist())}\n"
                f"model  {text(task, scored[row].tolist())}"
                for row in range(count)
            ]
        else:
            lines = [_continued(model, source, tokens_T) for tokens_T in _prompts(batch.tokens_BT)]
    return "\n\n".join(lines) + "\n"


def write_model(model: nn.Module, source: Source, folder: Path, *, is_first: bool = True) -> None:
    """Write the trained model as a folder, with the tokenizer of its data; the folder is whole or absent.

    Adapters are written to a neighbouring folder "adapter", as PEFT does, and the model with them merged in.
    Every rank calls it (sharded weights are gathered), the first writes. An existing folder is replaced.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: Any = get_model_state_dict(model, options=options) if _is_sharded(model) else None
    if not is_first:
        return
    whole: Any = model
    if hasattr(model, "peft_config"):
        # Adapters are inside the layers; to learn whether embeddings changed, PEFT would look for the base's folder.
        _write(folder.with_name(ADAPTER), lambda inner: _save(model, inner, state, save_embedding_layers=False))
        if state is not None:
            return
        whole = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]

    def fill(inner: Path) -> None:
        if state is None and not isinstance(whole, LoopwisePreTrainedModel):
            save(whole, inner)
        else:
            _save(whole, inner, state)
        source.save_tokenizer(inner)

    _write(folder, fill)


def _save(model: Any, folder: Path, state: Mapping[str, torch.Tensor] | None, **options: Any) -> None:
    model.save_pretrained(folder, **options, **({} if state is None else {"state_dict": state}))


def _write(folder: Path, fill: Callable[[Path], None]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        inner = temporary / "new"
        fill(inner)
        if folder.exists():
            folder.rename(temporary / "before")
        inner.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_sharded(model: nn.Module) -> bool:
    return any(type(parameter.data).__name__ == "DTensor" for parameter in model.parameters())


def _prompts(tokens_BT: torch.Tensor | None) -> torch.Tensor:
    assert tokens_BT is not None
    return tokens_BT[:, : max(1, min(32, tokens_BT.shape[1] // 2))]


def _continued(model: Any, source: Source, prompt_T: torch.Tensor) -> str:
    tokenizer = source.tokenizer
    device = next(model.parameters()).device
    draws = any((isinstance(model, LoopwisePreTrainedModel), needs_generator(model)))
    generator = {"generator": torch.Generator().manual_seed(0)} if draws else {}
    tokens = model.generate(
        prompt_T[None].to(device),
        max_new_tokens=_SAMPLE_TOKENS,
        do_sample=False,
        pad_token_id=0,
        synced_gpus=False,
        **generator,
    )[0].cpu()
    shown = [
        tokenizer.decode(part) if tokenizer else str(part.tolist()) for part in (prompt_T, tokens[len(prompt_T) :])
    ]
    return f"text   {shown[0]!r}\nmodel  {shown[1]!r}"
