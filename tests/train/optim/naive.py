"""The optimizers written out number by number, and a small model whose parameters have every role."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

Rows = list[float]


def adamw(
    values: Rows, gradients: list[Rows], *, lr: float, decay: float, beta1: float, beta2: float, eps: float
) -> Rows:
    """AdamW over `len(gradients)` steps."""

    def move(m: float, v: float, count: int) -> float:
        return (m / (1 - beta1**count)) / (math.sqrt(v / (1 - beta2**count)) + eps)

    return _adam(values, gradients, move, lr=lr, decay=decay, beta1=beta1, beta2=beta2)


def adam_atan2(
    values: Rows,
    gradients: list[Rows],
    *,
    lr: float,
    decay: float,
    beta1: float,
    beta2: float,
    a: float,
    b: float,
    inside: bool,
) -> Rows:
    """AdamATan2 over `len(gradients)` steps."""

    def move(m: float, v: float, count: int) -> float:
        spread, correction = math.sqrt(v / (1 - beta2**count)), 1 - beta1**count
        if inside:
            return a * math.atan2(m / correction, b * spread)
        return a / correction * math.atan2(m, b * spread)

    return _adam(values, gradients, move, lr=lr, decay=decay, beta1=beta1, beta2=beta2)


def _adam(
    values: Rows,
    gradients: list[Rows],
    move: Callable[[float, float, int], float],
    *,
    lr: float,
    decay: float,
    beta1: float,
    beta2: float,
) -> Rows:
    result = []
    for index, value in enumerate(values):
        m = v = 0.0
        for count, row in enumerate(gradients, start=1):
            gradient = row[index]
            m = beta1 * m + (1 - beta1) * gradient
            v = beta2 * v + (1 - beta2) * gradient**2
            value = value - lr * decay * value - lr * move(m, v, count)
        result.append(value)
    return result


def muon(
    matrix: torch.Tensor,
    gradients: list[torch.Tensor],
    *,
    lr: float,
    decay: float,
    momentum: float,
    nesterov: bool,
    original: bool,
) -> torch.Tensor:
    """Muon with the quintic iteration in float64 instead of bfloat16."""
    rows, columns = matrix.shape
    size = math.sqrt(max(1, rows / columns)) if original else 0.2 * math.sqrt(max(rows, columns))
    average = torch.zeros_like(matrix)
    for gradient in gradients:
        average = momentum * average + (1 - momentum) * gradient
        update = momentum * average + (1 - momentum) * gradient if nesterov else average
        x = update / update.norm()
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        matrix = matrix * (1 - lr * decay) - lr * size * x
    return matrix


class Small(nn.Module):
    """A table, two matrices, a norm, a head, and a parameter that no loss reaches."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed_tokens = nn.Embedding(7, 6)
            self.up_proj = nn.Linear(6, 5)
            self.norm = nn.LayerNorm(5)
            self.down_proj = nn.Linear(5, 6, bias=False)
            self.lm_head = nn.Linear(6, 7, bias=False)
            self.spare = nn.Linear(3, 3)
        self.to(dtype)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        hidden = self.embed_tokens(tokens_BT)
        return self.lm_head(hidden + self.down_proj(self.norm(self.up_proj(hidden)).tanh()))

    def loss(self, step: int) -> torch.Tensor:
        """Cross-entropy of a batch that the step decides."""
        tokens = torch.randint(7, (4, 6), generator=torch.Generator().manual_seed(step))
        logits = self(tokens[:, :-1]).flatten(0, 1)
        return nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
