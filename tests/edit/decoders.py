"""Small decoders of our own with random tensors, for tests of edits."""

from __future__ import annotations

import torch

from loopwise.models.blocks import BlockConfig
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.mixers import AttentionConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.norms import NormConfig
from loopwise.models.rotary import RotaryConfig


def block(placement="pre", **fields):
    """A block with biases wherever it can have them."""
    fields = {"norm": NormConfig(type="layer", bias=True)} | fields
    gate = fields.pop("value_gate_channels", None)
    return BlockConfig(
        hidden_size=16,
        mixer=AttentionConfig(
            num_heads=2, qkv_bias=True, out_bias=True, rope=RotaryConfig(dim=8), value_gate_channels=gate
        ),
        mlp=MLPConfig(intermediate_size=24, bias=True),
        placement=placement,
        **fields,
    )


def decoder(blocks, plan, seed=0, **fields):
    """A language model in evaluation mode whose tensors are all random, those that start at zero or one too."""
    config = LoopwiseDecoderConfig(
        **{
            "vocab_size": 31,
            "hidden_size": 16,
            "num_hidden_layers": len(blocks),
            "blocks": [each.to_dict() for each in blocks],
            "plan": plan,
            "norm": {},
        }
        | fields
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LoopwiseForCausalLM(config).eval()
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def ids_of(model, length=7):
    """Token ids `[2, length]`."""
    size = (2, length)
    return torch.randint(1, model.config.vocab_size, size, generator=torch.Generator().manual_seed(3))


def logits(model, ids_BT, **options):
    """Logits of a call without a cache."""
    with torch.no_grad():
        return model(ids_BT, use_cache=False, **options).logits
