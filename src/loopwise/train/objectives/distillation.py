"""Learning from another checkpoint: `weight tau^2 KL(teacher || student)` where a target is scored (1503.02531).

Shapes: N scored positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from loopwise.checkpoints.loading import load
from loopwise.loop import readout
from loopwise.models.hub import base_model
from loopwise.train.objectives.forward import forward_at
from loopwise.train.objectives.terms import LossTerm, Seen, logits_of


@dataclass(frozen=True, kw_only=True)
class Distillation(LossTerm):
    """Match the predictions of a frozen teacher.

    Attributes:
        teacher: folder, GGUF file or name, as `loopwise.load` takes it.
        plan: plan text of the teacher; empty keeps its own.
        temperature: tau, above 0, by which both sides are softened.
        dtype: number type of the teacher's weights.
    """

    kind: ClassVar[str | None] = "loss.distillation"
    teacher: str
    plan: str = ""
    temperature: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.temperature > 0, "temperature", "must be above 0")

    def build(self, model: Any) -> Callable[[Seen], torch.Tensor]:
        """See `LossTerm.build`; loads the teacher."""
        source = Path(self.teacher) if Path(self.teacher).exists() else self.teacher
        teacher = load(source, plan=self.plan or None, dtype=self.dtype)
        teacher.eval().requires_grad_(False)
        sizes = [vocabulary(base_model(item)) for item in (model, teacher)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"loss.distillation: teacher={self.teacher!r} predicts {sizes[1]} token ids, the model {sizes[0]}: "
                "both need one tokenizer"
            )
        teacher.to(next(model.parameters()).device)

        def value(seen: Seen) -> torch.Tensor:
            student_NV = logits_of(seen, self)
            with torch.no_grad():
                draws: dict[str, Any] = {"seed": seen.seed, "step": seen.step, "first_row": seen.first_row}
                teacher_NV = forward_at(teacher, seen.batch, **draws).logits
            found_N = torch.ones_like(student_NV[:, 0], dtype=torch.bool)
            return self.weight * readout.distillation(
                student_NV.float()[None],
                teacher_NV.float()[None],
                found_N[None],
                temperature=self.temperature,
                num_items=seen.num_items or 1,
            )

        return value


def vocabulary(model: Any) -> int | None:
    """How many token ids a model predicts; None for one without a head over tokens."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return None if head is None else head.weight.shape[0]
