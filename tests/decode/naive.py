"""Llama token by token with a depth for every token, in plain loops over explicit keys and values: the oracle of rules
for skipped depth. Nothing is masked, batched or overwritten here: every (visit, token) has its own key and value.

Shapes: D width, H heads, K kv heads, d head size, n tokens seen.
"""

from __future__ import annotations

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


class NaiveLlama:
    """A Llama as layers before the rungs, the layers of every rung, and layers after; `shared`: rungs share weights."""

    def __init__(self, model, head, rungs, tail, shared):
        self.model, self.base = model, model.model
        self.head, self.rungs, self.tail, self.shared = head, rungs, tail, shared

    @torch.no_grad()
    def logits(self, tokens, depths, policy):
        """Logits `[T, V]` of tokens of which each has its depth, under a policy."""
        stores: dict = {}  # (part, place, position) -> key, value
        reached: list[int] = []
        result = []
        for position, (token, depth) in enumerate(zip(tokens, depths, strict=True)):
            state_D = self.base.embed_tokens.weight[token]
            for i, layer in enumerate(self.head):
                state_D = self.visit(layer, state_D, position, stores, ("head", i), None)
            reached.append(0)
            kept = None
            num_rungs = len(self.rungs)
            for rung in range(num_rungs if policy == "catch_up" else depth):
                reached[position] = rung + 1
                for i, layer in enumerate(self.rungs[rung]):

                    def find(past, i=i, rung=rung, position=position):
                        return self.find(stores, policy, rung, i, past, position, reached)

                    state_D = self.visit(layer, state_D, position, stores, ("rung", rung, i), find)
                if rung + 1 == depth:
                    kept = state_D
            assert kept is not None
            reached[position] = depth
            if policy == "propagate":
                for rung in range(depth, num_rungs):
                    for i, layer in enumerate(self.rungs[rung]):
                        stores["rung", rung, i, position] = self.key_value(layer, kept, position)
            state_D = kept
            for i, layer in enumerate(self.tail):
                state_D = self.visit(layer, state_D, position, stores, ("tail", i), None)
            result.append(self.model.lm_head(self.base.norm(state_D)))
        return torch.stack(result)

    def find(self, stores, policy, rung, i, past, position, reached):
        """Key and value of an earlier (or the present) token that a query at a rung finds; None for nothing."""
        depth = reached[past]
        sharing, _, size = policy.partition("(")
        size = 1 if policy == "last" else int(size.rstrip(")") or 0)
        if policy == "first":
            return stores["rung", 0, i, past]
        if sharing in ("last", "ring", "stride"):
            place = (lambda r: r // size) if sharing == "stride" else (lambda r: r % size)
            same = [r for r in range(depth) if place(r) == place(rung)]
            return stores["rung", same[-1] if same else depth - 1, i, past]
        if policy in ("propagate", "catch_up"):
            return stores["rung", rung, i, past]
        if rung < depth:
            return stores["rung", rung, i, past]
        assert policy != "monotone" and past < position
        if policy == "absent":
            return None
        if self.shared:
            return stores["rung", depth - 1, i, past]
        return stores["rung", depth - 1, len(self.rungs[depth - 1]) - 1, past]

    def turned(self, projected, position):
        """Heads `[heads, d]` of one token with their rotation."""
        heads = projected.view(1, -1, 1, self.base.layers[0].self_attn.head_dim)
        cos, sin = self.base.rotary_emb(heads, torch.tensor([[position]]))
        return apply_rotary_pos_emb(heads, heads, cos, sin)[0][0, :, 0]

    def key_value(self, layer, state_D, position):
        attention = self.base.layers[layer].self_attn
        normed_D = self.base.layers[layer].input_layernorm(state_D)
        value_Kd = attention.v_proj(normed_D).view(-1, attention.head_dim)
        return self.turned(attention.k_proj(normed_D), position), value_Kd

    def visit(self, layer, state_D, position, stores, key, find):
        block = self.base.layers[layer]
        attention = block.self_attn
        stores[(*key, position)] = self.key_value(layer, state_D, position)
        find = find or (lambda past: stores[(*key, past)])
        found = [pair for past in range(position + 1) if (pair := find(past)) is not None]
        query_Hd = self.turned(attention.q_proj(block.input_layernorm(state_D)), position)
        mixed = []
        for head, query_d in enumerate(query_Hd):
            kv = head // attention.num_key_value_groups
            scores_n = torch.stack([key_Kd[kv] @ query_d for key_Kd, _ in found]) * attention.head_dim**-0.5
            weights_n = scores_n.softmax(-1)
            mixed.append(sum(weight * value_Kd[kv] for weight, (_, value_Kd) in zip(weights_n, found, strict=True)))
        state_D = state_D + attention.o_proj(torch.cat(mixed))
        return state_D + block.mlp(block.post_attention_layernorm(state_D))
