"""The block of every family of looped checkpoints, small; the blocks' tests run over all of them."""

import torch
from transformers import PreTrainedConfig

from loopwise.models.blocks import AdaLNConfig, Block, BlockConfig
from loopwise.models.mixers import AttentionConfig, QKNormConfig, TokenMixerConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.norms import NormConfig
from loopwise.models.rotary import RotaryConfig, rotary_tables

WIDTH, TOKENS = 16, 5
WEIGHTLESS = NormConfig(eps=1e-5, weight=False)
HALF = RotaryConfig(dim=4)
PAIRS = RotaryConfig(dim=4, theta=50000.0, style="interleaved")
SWIGLU = MLPConfig(intermediate_size=11)


def _block(mixer: AttentionConfig | TokenMixerConfig, mlp: MLPConfig = SWIGLU, **others) -> BlockConfig:
    return BlockConfig(hidden_size=WIDTH, mixer=mixer, mlp=mlp, **others)


FAMILIES = {
    "huginn": _block(AttentionConfig(num_heads=4, rope=PAIRS, qk_bias=True), placement="stream"),
    "retrofit_llama": _block(AttentionConfig(num_heads=4, num_kv_heads=2, rope=HALF), norm=NormConfig(eps=1e-5)),
    "retrofit_olmo": _block(
        AttentionConfig(
            num_heads=4,
            num_kv_heads=2,
            rope=HALF,
            qk_norm=QKNormConfig(norm=NormConfig(weight_in_float32=True), over="width"),
        ),
        norm=NormConfig(weight_in_float32=True),
        placement="branch_out",
    ),
    "ouro": _block(AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, rope=HALF), placement="branch"),
    "mor": _block(AttentionConfig(num_heads=4, num_kv_heads=2, rope=HALF), norm=NormConfig(eps=1e-5)),
    "parcae": _block(
        AttentionConfig(
            num_heads=4,
            num_kv_heads=2,
            rope=PAIRS,
            qk_norm=QKNormConfig(norm=NormConfig(eps=None, weight=False), when="after_rope"),
            value_gate_channels=8,
        ),
        MLPConfig(intermediate_size=11, activation="half_relu2", gated=False),
        norm=NormConfig(eps=1e-5),
    ),
    "loopformer": _block(
        AttentionConfig(num_heads=4),
        MLPConfig(intermediate_size=11, activation="gelu", gated=False),
        norm=NormConfig(eps=None, weight=False),
        adaln=AdaLNConfig(),
    ),
    "looped_transformer": _block(
        AttentionConfig(num_heads=4, qkv_bias=True, out_bias=True),
        MLPConfig(intermediate_size=11, activation="gelu_tanh", gated=False, bias=True),
        norm=NormConfig(type="layer", eps=1e-5, bias=True, weight_in_float32=True),
    ),
    "hrm": _block(AttentionConfig(num_heads=4, mask="bidirectional", rope=HALF), norm=WEIGHTLESS, placement="post"),
    "trm_mlp_t": _block(TokenMixerConfig(length=TOKENS, mlp=SWIGLU), norm=WEIGHTLESS, placement="post"),
    "hrm_text": _block(
        AttentionConfig(num_heads=4, head_dim=4, mask="prefix", rope=HALF, output_gate="channel"),
        norm=NormConfig(weight=False),
    ),
    "albert": _block(
        AttentionConfig(num_heads=4, mask="bidirectional", qkv_bias=True, out_bias=True),
        MLPConfig(intermediate_size=11, activation="gelu_tanh", gated=False, bias=True),
        norm=NormConfig(type="layer", eps=1e-12, bias=True, weight_in_float32=True),
        placement="post",
    ),
}


def model_config(implementation: str = "sdpa") -> PreTrainedConfig:
    """What a block needs of a model's configuration."""
    config = PreTrainedConfig(num_hidden_layers=2)
    config._attn_implementation = implementation
    return config


def build(config: BlockConfig, implementation: str = "sdpa", seed: int = 0, layer_idx: int = 0) -> Block:
    """A block in eval mode, all parameters random."""
    block = config.build(model_config(implementation), layer_idx).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=generator))
    return block


def noise(*shape: int, seed: int = 8) -> torch.Tensor:
    """The same random numbers in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def extras(config: BlockConfig, rows: int = 2, tokens: int = TOKENS, seed: int = 1) -> dict:
    """Value embeddings and conditioning for the blocks that read them."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    if isinstance(config.mixer, AttentionConfig) and config.mixer.value_gate_channels is not None:
        heads = config.mixer.num_kv_heads or config.mixer.num_heads
        found["value_embeddings"] = torch.randn(
            rows, tokens, heads * config.hidden_size // config.mixer.num_heads, generator=generator
        )
    if config.adaln is not None:
        size = config.adaln.conditioning_size or config.hidden_size
        found["conditioning"] = torch.randn(rows, size, generator=generator)
    return found


def tables(config: BlockConfig, positions: torch.Tensor | int = TOKENS) -> dict:
    """`position_embeddings` for the blocks that rotate."""
    if not isinstance(config.mixer, AttentionConfig) or config.mixer.rope is None:
        return {}
    ids = torch.arange(positions)[None] if isinstance(positions, int) else positions
    return {"position_embeddings": rotary_tables(ids, config.mixer.rope)}
