"""Training data; importing this room makes every kind of data known to configs."""

from loopwise.train.data import generated, mix, text

__all__ = ["generated", "mix", "text"]
