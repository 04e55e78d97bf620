"""A block written out token by token and head by head, with nothing of the package but its configs."""

import math
from collections.abc import Callable

import torch

from loopwise.models.blocks import BlockConfig
from loopwise.models.mixers import AttentionConfig, TokenMixerConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.norms import NormConfig
from loopwise.models.rotary import RotaryConfig

Tensors = dict[str, torch.Tensor]
Seen = Callable[[int, int, int], bool]


def causal(_row: int, query: int, key: int) -> bool:
    return key <= query


def everything(_row: int, _query: int, _key: int) -> bool:
    return True


def under(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def linear(vector: torch.Tensor, tensors: Tensors, name: str) -> torch.Tensor:
    result = torch.stack([(row * vector).sum() for row in tensors[f"{name}.weight"]])
    return result + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else result


def norm(vector: torch.Tensor, config: NormConfig, tensors: Tensors, name: str) -> torch.Tensor:
    centre = vector.mean() if config.type == "layer" else 0.0
    eps = 2.0**-23 if config.eps is None else config.eps
    result = (vector - centre) / (((vector - centre) ** 2).mean() + eps).sqrt()
    result = result * tensors[f"{name}.weight"] if config.weight else result
    return result + tensors[f"{name}.bias"] if config.bias else result


def activation(value: torch.Tensor, name: str) -> torch.Tensor:
    if name == "silu":
        return value / (1 + torch.exp(-value))
    if name == "gelu":
        return value * 0.5 * (1 + torch.erf(value / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * value * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))
    positive = torch.where(value > 0, value, torch.zeros_like(value))
    return {"relu": positive, "relu2": positive**2, "half_relu2": 0.5 * positive**2}[name]


def mlp(vector: torch.Tensor, config: MLPConfig, tensors: Tensors) -> torch.Tensor:
    up = linear(vector, tensors, "up_proj")
    if not config.gated:
        return linear(activation(up, config.activation), tensors, "down_proj")
    return linear(activation(linear(vector, tensors, "gate_proj"), config.activation) * up, tensors, "down_proj")


def rotated(head: torch.Tensor, position: int, config: RotaryConfig) -> torch.Tensor:
    pairs = config.dim // 2
    result = list(head)
    for i in range(pairs):
        a, b = (i, i + pairs) if config.style == "half" else (2 * i, 2 * i + 1)
        angle = position * config.theta ** (-2 * i / config.dim)
        result[a] = head[a] * math.cos(angle) - head[b] * math.sin(angle)
        result[b] = head[b] * math.cos(angle) + head[a] * math.sin(angle)
    return torch.stack(result)


def heads(
    vector: torch.Tensor,
    config: AttentionConfig,
    tensors: Tensors,
    position: int,
    value_embedding: torch.Tensor | None,
) -> tuple[list, list, list]:
    """Query, key and value heads of one token."""
    size = config.head_dim or len(vector) // config.num_heads
    count = config.num_kv_heads or config.num_heads
    values = list(linear(vector, tensors, "v_proj").split(size))
    if config.value_gate_channels is not None and value_embedding is not None:
        gate = linear(vector[: config.value_gate_channels], tensors, "value_gate")
        for i in range(count):
            values[i] = values[i] + 2 / (1 + torch.exp(-gate[i])) * value_embedding[i * size : (i + 1) * size]
    found = []
    for index, name in enumerate("qk"):
        row, style = linear(vector, tensors, f"{name}_proj"), config.qk_norm
        if style and style.over == "width":
            row = norm(row, style.norm, tensors, f"{name}_norm")
        parts = []
        for i, head in enumerate(row.split(size)):
            if style and (style.over, style.when) == ("head", "before_rope"):
                head = norm(head, style.norm, tensors, f"{name}_norm")
            head = head + tensors["qk_bias"][index, 0, i] if config.qk_bias else head
            head = rotated(head, position, config.rope) if config.rope else head
            if style and style.when == "after_rope":
                head = norm(head, style.norm, tensors, f"{name}_norm")
            parts.append(head)
        found.append(parts)
    return found[0], found[1], values


def attention(
    rows: torch.Tensor, config: AttentionConfig, tensors: Tensors, seen: Seen, values_BTE: torch.Tensor | None
) -> torch.Tensor:
    size = config.head_dim or rows.shape[-1] // config.num_heads
    scale = size**-0.5 if config.scale is None else config.scale
    group = config.num_heads // (config.num_kv_heads or config.num_heads)
    result = []
    for b, row in enumerate(rows):
        tokens = [
            heads(token, config, tensors, t, None if values_BTE is None else values_BTE[b, t])
            for t, token in enumerate(row)
        ]
        for t, token in enumerate(row):
            mixed = []
            for h in range(config.num_heads):
                keys = [s for s in range(len(row)) if seen(b, t, s)]
                scores = [torch.exp(scale * (tokens[t][0][h] * tokens[s][1][h // group]).sum()) for s in keys]
                total = sum(scores)
                mixed.append(
                    sum(score / total * tokens[s][2][h // group] for score, s in zip(scores, keys, strict=True))
                )
            joined = torch.cat(mixed)
            if config.output_gate == "channel":
                joined = joined / (1 + torch.exp(-linear(token, tensors, "gate_proj")))
            result.append(linear(joined, tensors, "o_proj"))
    return torch.stack(result).view(rows.shape)


def each(rows: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Apply a function of one vector to the last axis."""
    return torch.stack([function(vector) for vector in rows.reshape(-1, rows.shape[-1])]).view(rows.shape)


def step(rows: torch.Tensor, config: BlockConfig, tensors: Tensors, name: str, function: Callable, scale, gate):
    """One residual step over the last axis."""

    def with_norm(end: str, value: torch.Tensor) -> torch.Tensor:
        return each(value, lambda vector: norm(vector, config.norm, tensors, f"{name}_norm_{end}"))

    place = config.placement
    inner = with_norm("in", rows) if place in ("pre", "stream", "branch") else rows
    branch = gate * function(inner * (1 + scale))
    if place in ("branch", "branch_out"):
        branch = with_norm("out", branch)
    total = rows + branch
    return with_norm("out", total) if place in ("post", "stream") else total


def block(
    rows: torch.Tensor,
    config: BlockConfig,
    tensors: Tensors,
    seen: Seen = causal,
    values_BTE: torch.Tensor | None = None,
    conditioning_BC: torch.Tensor | None = None,
) -> torch.Tensor:
    """The block on `[B, T, D]` with parameters by name; `seen(row, query, key)` is the mask."""
    width = rows.shape[-1]
    gates = scales = (torch.ones(1), torch.ones(1))
    if conditioning_BC is None:
        scales = (torch.zeros(1), torch.zeros(1))
    else:
        chunks = each(conditioning_BC, lambda c: c / (1 + torch.exp(-c)))
        chunks = torch.stack([linear(c, tensors, "adaln") for c in chunks])[:, None]
        gates = (chunks[..., :width], chunks[..., width : 2 * width])
        scales = (chunks[..., 2 * width : 3 * width], chunks[..., 3 * width :])
    mixer = config.mixer
    if isinstance(mixer, TokenMixerConfig):
        inner = mixer.mlp
        mix = lambda x: each(x, lambda vector: mlp(vector, inner, under(tensors, "mixer.mlp.")))  # noqa: E731
        rows = step(rows.transpose(1, 2), config, tensors, "mixer", mix, scales[0], gates[0]).transpose(1, 2)
    else:
        mix = lambda x: attention(x, mixer, under(tensors, "mixer."), seen, values_BTE)  # noqa: E731
        rows = step(rows, config, tensors, "mixer", mix, scales[0], gates[0])
    over_width = lambda x: each(x, lambda vector: mlp(vector, config.mlp, under(tensors, "mlp.")))  # noqa: E731
    return step(rows, config, tensors, "mlp", over_width, scales[1], gates[1])
