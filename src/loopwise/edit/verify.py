"""Try an edited folder: load it and its source, and compare what they compute on a few tokens."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopwise.edit.maps import DepthEdit

TOLERANCE = 1e-5  # law 2, in float32


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was compared, and the result.

    Attributes:
        law: what the new logits were compared with.
        difference: the largest absolute difference of two logits.
        scale: the largest absolute logit of the reference.
        bound: the difference that is allowed; None where nothing is promised, and the difference is the jump.
    """

    law: str
    difference: float
    scale: float
    bound: float | None

    @property
    def holds(self) -> bool:
        """Whether the difference is allowed."""
        return self.bound is None or self.difference <= self.bound

    def __str__(self) -> str:
        if self.bound is None:
            return f"{self.law}: logits move by up to {self.difference:.3g}, the largest was {self.scale:.3g}"
        verdict = "holds" if self.holds else "FAILS"
        return f"{self.law} {verdict}: logits differ by {self.difference:.3g}, allowed {self.bound:.3g}"


def verify(source: Path, target: Path, edit: DepthEdit | None) -> Verified:
    """Load both folders in float32, one after the other, and compare logits.

    Where the function is to stay, the reference is the source as it is, and no difference at all is allowed where
    layers start at zero. Other edits that only copy are checked against the source under `edit.alias_plan()`. For the
    rest there is nothing that could fail, and the jump from the source is measured.

    Args:
        source: the folder or file that was edited.
        target: the new folder.
        edit: the edit; None for one of width, which keeps the function.

    Raises:
        ValueError: one of them cannot be loaded, or has no logits.
    """
    import torch

    from loopwise.edit.apply import realise

    model = _load(source)
    bound: float | None = TOLERANCE
    if edit is None or edit.promise != "none":
        law = "the function of the source"
        bound = 0.0 if edit is not None and any(layer.zero for layer in edit.layers) else TOLERANCE
    elif edit.is_copy:
        law = "the source under " + str(edit.alias_plan())
        model = realise(model, edit, mode="alias")
    else:
        law, bound = "nothing is promised of the function", None
    with torch.no_grad(), torch.random.fork_rng():
        want = _logits(model, source)
        del model
        gc.collect()
        got = _logits(_load(target), target)
    if got.shape != want.shape:
        raise ValueError(f"the edited model has logits {list(got.shape)}, the source {list(want.shape)}")
    difference, scale = (got - want).abs().max().item(), want.abs().max().item()
    return Verified(law=law, difference=difference, scale=scale, bound=None if bound is None else bound * scale)


def _load(folder: Path) -> Any:
    """A folder as a model; transformers' own class for texts with images where it is no causal language model."""
    import torch
    import transformers

    from loopwise.checkpoints.loading import load
    from loopwise.models.hub import align

    try:
        model = load(folder, dtype=torch.float32)
    except ValueError as error:
        try:
            model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        except Exception:  # whatever it says: it is no such model either
            raise error from None
    align(model)  # matrix kernels choose their path by alignment
    return model.eval()


def _logits(model: Any, folder: Path) -> Any:
    import torch

    from loopwise.models.hub import probe_inputs

    torch.manual_seed(0)  # for first states that are drawn
    logits = getattr(model(**probe_inputs(model, num_tokens=12)), "logits", None)
    if logits is None:
        raise ValueError(f"{folder} is no language model: there are no logits to compare")
    return logits.float()
