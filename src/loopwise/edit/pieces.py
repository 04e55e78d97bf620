"""What every tensor of an edited folder is made of, by name. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loopwise.edit.layout import Layout
from loopwise.edit.maps import DepthEdit, NewLayer
from loopwise.edit.outputs import output_tensors
from loopwise.io.tensors import Checkpoint, Tensor

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One tensor of the new folder.

    Attributes:
        name: its name.
        sources: tensors of the old folder: one is copied, the mean of several is taken.
        zero: it is zero instead, in the shape and type of the first source.
        scale: factor on the copy or the mean.
    """

    name: str
    sources: tuple[Tensor, ...]
    zero: bool = False
    scale: float = 1.0

    @property
    def like(self) -> Tensor:
        """A tensor of the same shape and type."""
        return self.sources[0]

    @property
    def is_copy(self) -> bool:
        """Whether its bytes are those of one old tensor."""
        return len(self.sources) == 1 and not self.zero and self.scale == 1


def pieces_of(checkpoint: Checkpoint, layout: Layout, edit: DepthEdit, model_type: str) -> list[Piece]:
    """All tensors of the new folder: those outside the layers, the layers in order, and extra layers behind them.

    Raises:
        ValueError: layers of different kinds in a mean, numbers that cannot be averaged or scaled, or branches of the
            architecture that are not known where a layer is to start at zero.
    """
    layers: dict[int, dict[tuple[str, str], Tensor]] = {number: {} for number in range(layout.num_layers)}
    outside: list[Piece] = []
    behind: list[Piece] = []
    for name, tensor in checkpoint.tensors.items():
        parts = layout.split(name)
        if parts is None:
            outside.append(Piece(name=name, sources=(tensor,)))
        elif parts[1] < layout.num_layers:
            layers[parts[1]][parts[0], parts[2]] = tensor
        else:
            number = parts[1] - layout.num_layers + len(edit.layers)
            behind.append(Piece(name=f"{parts[0]}.{number}.{parts[2]}", sources=(tensor,)))
    inside = [piece for new, layer in enumerate(edit.layers) for piece in _layer(new, layer, layers, model_type)]
    return [*outside, *inside, *behind]


def _layer(
    new: int, layer: NewLayer, layers: Mapping[int, Mapping[tuple[str, str], Tensor]], model_type: str
) -> Iterator[Piece]:
    first = layers[layer.sources[0]]
    for other in layer.sources[1:]:
        _refuse_different(layer.sources[0], first, other, layers[other])
    zeroed = output_tensors([rest for _, rest in first], model_type) if layer.zero else set()
    for (path, rest), tensor in first.items():
        zero = rest in zeroed
        scale = 1.0 if zero else next((factor for part, factor in layer.scale if part in rest), 1.0)
        sources = tuple(layers[source][path, rest] for source in (layer.sources[:1] if zero else layer.sources))
        if scale != 1 and tensor.dtype not in _FLOATS:
            raise ValueError(f"cannot scale {path}.{layer.sources[0]}.{rest}: its numbers are {tensor.dtype}")
        yield Piece(name=f"{path}.{new}.{rest}", sources=sources, zero=zero, scale=scale)


def _refuse_different(one: int, first: Mapping[Any, Tensor], two: int, second: Mapping[Any, Tensor]) -> None:
    for key in sorted(set(first) | set(second)):
        mine, other = first.get(key), second.get(key)
        if mine is None or other is None or (mine.shape, mine.dtype) != (other.shape, other.dtype):
            what = "missing from one of them" if mine is None or other is None else "of another shape or type"
            raise ValueError(
                f"layers {one} and {two} cannot become one, they are of different kinds: {key[1]} is {what}"
            )


def odd_layers(checkpoint: Checkpoint, layout: Layout, kinds: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong with the layers where two of one kind have tensors of different names or shapes, or None."""
    found: list[dict[tuple[str, str], tuple[int, ...]]] = [{} for _ in kinds]
    for name, tensor in checkpoint.tensors.items():
        parts = layout.split(name)
        if parts is not None and parts[1] < layout.num_layers:
            found[parts[1]][parts[0], parts[2]] = tensor.shape
    seen: list[tuple[Mapping[str, Any], int]] = []
    for number, kind in enumerate(kinds):
        first = next((other for known, other in seen if known == kind), None)
        if first is None:
            seen.append((kind, number))
            continue
        key = next(
            (key for key in {**found[first], **found[number]} if found[first].get(key) != found[number].get(key)), None
        )
        if key is not None:
            return (
                f"layers {first} and {number} are of one kind, and {key[1]} is in one of them only or has two shapes: "
                f"tensors are missing, or the architecture shares some between layers"
            )
    return None
