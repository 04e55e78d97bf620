"""One segment of HRM and TRM written out over the tensors of a checkpoint, slow and in the words of the papers.

Shapes: B batch, T tokens, P puzzle positions, S = P + T, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def rms(x, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def swiglu(x, tensors, name):
    gate, up = (x @ tensors[f"{name}.gate_up_proj.weight"].T).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up) @ tensors[f"{name}.down_proj.weight"].T


def turned(heads_BSHd, theta):
    """Rotate by position, channels i and i + d/2 as a pair."""
    length, size = heads_BSHd.shape[1], heads_BSHd.shape[3]
    result = torch.empty_like(heads_BSHd)
    for position in range(length):
        for i in range(size // 2):
            angle = position * theta ** (-2 * i / size)
            a, b = heads_BSHd[:, position, :, i], heads_BSHd[:, position, :, i + size // 2]
            result[:, position, :, i] = a * math.cos(angle) - b * math.sin(angle)
            result[:, position, :, i + size // 2] = b * math.cos(angle) + a * math.sin(angle)
    return result


def attention(x, tensors, name, config):
    heads, width = config["num_heads"], config["hidden_size"]
    q, k, v = (
        part.unflatten(-1, (heads, width // heads))
        for part in (x @ tensors[f"{name}.qkv_proj.weight"].T).chunk(3, dim=-1)
    )
    if config["pos_encodings"] == "rope":
        theta = config.get("rope_theta", 10000.0)
        q, k = turned(q, theta), turned(k, theta)
    weights = torch.softmax(torch.einsum("bshd,bthd->bhst", q, k) / math.sqrt(width // heads), dim=-1)
    return torch.einsum("bhst,bthd->bshd", weights, v).flatten(2) @ tensors[f"{name}.o_proj.weight"].T


def stack(x, tensors, name, num_layers, config):
    eps = config.get("rms_norm_eps", 1e-5)
    for i in range(num_layers):
        layer = f"{name}.layers.{i}"
        if config.get("mlp_t"):
            x = x.transpose(1, 2)
            x = rms(x + swiglu(x, tensors, f"{layer}.mlp_t"), eps).transpose(1, 2)
        else:
            x = rms(x + attention(x, tensors, f"{layer}.self_attn", config), eps)
        x = rms(x + swiglu(x, tensors, f"{layer}.mlp"), eps)
    return x


def embeddings(inputs, ids, tensors, config, puzzle_positions):
    width = config["hidden_size"]
    x = tensors["embed_tokens.embedding_weight"][inputs]
    if puzzle_positions:
        rows = tensors["puzzle_emb.weights"][ids]
        rows = F.pad(rows, (0, puzzle_positions * width - rows.shape[1]))
        x = torch.cat([rows.view(len(ids), puzzle_positions, width), x], dim=1)
    if config["pos_encodings"] == "learned":
        x = (x + tensors["embed_pos.embedding_weight"]) * math.sqrt(0.5)
    return x * math.sqrt(width)


def segment(inputs, ids, tensors, config, puzzle_positions, states=None, window="published"):
    """(z_H, z_L, logits, q) of one segment.

    `tensors` are named as in the checkpoint, without the prefix. `window`: "published" keeps the gradient that the
    published code keeps, "all" keeps everything.
    """
    inputs, ids = inputs.long(), ids.long()
    x = embeddings(inputs, ids, tensors, config, puzzle_positions)
    z_h, z_l = states or (tensors["H_init"].expand_as(x), tensors["L_init"].expand_as(x))
    two = any(name.startswith("H_level.") for name in tensors)
    high, high_layers = ("H_level", config["H_layers"]) if two else ("L_level", config["L_layers"])
    for cycle in range(config["H_cycles"]):
        last_cycle = cycle == config["H_cycles"] - 1
        for call in range(config["L_cycles"]):
            keep = last_cycle and (not two or call == config["L_cycles"] - 1)
            with torch.set_grad_enabled(keep or window == "all"):
                z_l = stack(z_l + (z_h + x), tensors, "L_level", config["L_layers"], config)
        with torch.set_grad_enabled(last_cycle or window == "all"):
            z_h = stack(z_h + z_l, tensors, high, high_layers, config)
    q = z_h[:, 0] @ tensors["q_head.weight"].T + tensors["q_head.bias"]
    return z_h, z_l, z_h[:, puzzle_positions:] @ tensors["lm_head.weight"].T, q
