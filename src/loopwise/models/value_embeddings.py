"""Value embeddings: tables of tokens whose rows some layers add to their attention values.

Shapes: B batch, T tokens, V vocabulary, K kv heads, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from loopwise.models.blocks import BlockConfig
from loopwise.models.mixers import AttentionConfig


class ValueEmbeddings(nn.ModuleDict):
    """A table `[V, K d]` for some layers, under the layer's number (modded-nanogpt; Parcae, 2604.12946).

    A layer adds what its table holds through the gate of its attention (`AttentionConfig.value_gate_channels`), the
    same at every visit. A layer without a gate does not read its table: some checkpoints carry such tables, and gates
    without a table.

    Args:
        widths: layer number (as text, as JSON has it) -> width of its table.
        vocab_size: V.
        blocks: the blocks of all layers.

    Raises:
        ValueError: a layer that is not there, or a width that the layer's values do not have.
    """

    def __init__(self, widths: Mapping[str, int], vocab_size: int, blocks: Sequence[BlockConfig]):
        super().__init__({str(layer): nn.Embedding(vocab_size, width) for layer, width in widths.items()})
        self.read: list[int] = []
        for layer, width in widths.items():
            if not str(layer).isdecimal() or int(layer) >= len(blocks):
                raise ValueError(f"value_embeddings names layer {layer!r}, there are layers 0 to {len(blocks) - 1}")
            values = _gated_values(blocks[int(layer)])
            if values is not None and values != width:
                raise ValueError(
                    f"value_embeddings of layer {layer} have width {width}, the layer's values have {values}"
                )
            if values is not None:
                self.read.append(int(layer))

    def look_up(self, input_ids: torch.Tensor | None) -> dict[int, torch.Tensor]:
        """For every layer that reads its table, its rows: int64 `[B, T]` -> `[B, T, K d]`.

        Raises:
            ValueError: some layer reads its table and the tokens are not given.
        """
        if self.read and input_ids is None:
            raise ValueError("this model has value embeddings, which are looked up by token: pass input_ids")
        return {layer: self[str(layer)](input_ids) for layer in self.read}


def _gated_values(block: BlockConfig) -> int | None:
    """Width `K d` of the values of a layer that has a value gate, else None."""
    mixer = block.mixer
    if not isinstance(mixer, AttentionConfig) or mixer.value_gate_channels is None:
        return None
    return (mixer.num_kv_heads or mixer.num_heads) * (mixer.head_dim or block.hidden_size // mixer.num_heads)
