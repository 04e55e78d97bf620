"""What several tests of models start from."""

from __future__ import annotations

import torch
from laws import looping_plan
from tiny import tiny_inputs, tiny_model

import loopwise

# mixers, positions, windows, experts, recurrences and biases of many kinds
BREADTH = [
    "llama",
    "gpt2",
    "bloom",
    "gemma3_text",
    "mixtral",
    "deepseek_v3",
    "mamba",
    "mamba2",
    "recurrent_gemma",
    "falcon_h1",
    "zamba",
    "qwen3_next",
    "lfm2",
    "opt",
    "bert",
]
LOOPED = looping_plan(6)


def looped(model_type="llama", plan=LOOPED, **options):
    model = tiny_model(model_type)
    return loopwise.attach(model, plan, **options), tiny_inputs(model)


def logits(model, ids_BT, **options):
    with torch.no_grad():
        return model(ids_BT, **options).logits
