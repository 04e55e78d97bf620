"""A tokenizer for the symbols of a task, so that a model trained on it generates from text like any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def vocabulary_tokenizer(vocabulary: Sequence[str], separator: str) -> Any:
    """A `PreTrainedTokenizerFast` whose ids are places in the vocabulary, or None where text is ambiguous.

    Args:
        vocabulary: the symbols; the first is padding.
        separator: what stands between symbols in text: " ", or "" when every symbol is one character.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    single = separator == "" and all(len(symbol) == 1 for symbol in vocabulary[1:])
    words = separator == " " and all(symbol and not any(map(str.isspace, symbol)) for symbol in vocabulary)
    if len(set(vocabulary)) != len(vocabulary) or not (single or words):
        return None
    pad = vocabulary[0]
    raw = Tokenizer(models.WordLevel({symbol: number for number, symbol in enumerate(vocabulary)}, unk_token=pad))
    if words:
        raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=pad, unk_token=pad, clean_up_tokenization_spaces=False
    )
