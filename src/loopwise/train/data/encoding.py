"""From text to token ids: any transformers tokenizer, or one token for each byte."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import loopwise

BYTES = "bytes"
_SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>")
NUM_BYTE_TOKENS = 256 + len(_SPECIAL)


class Encoder:
    """Text to token ids, and what an index has to remember about it.

    Attributes:
        kind: "bytes" or "transformers".
        vocab_size: one more than the largest id.
        bos: id that may begin a document, or None.
        eos: id that ends a document, or None.
        pad: id for positions that nobody reads.
        sha256: hash of everything that decides the ids.
    """

    kind: str
    vocab_size: int
    bos: int | None
    eos: int | None
    pad: int
    sha256: str

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, without special tokens; text that looks like one is text."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write into a new folder what `tokenizer` needs."""
        raise NotImplementedError


class ByteEncoder(Encoder):
    """UTF-8 bytes are ids 0 to 255; then come the begin, end and padding tokens."""

    kind = BYTES
    vocab_size = NUM_BYTE_TOKENS
    bos, eos, pad = 256, 257, 258
    sha256 = hashlib.sha256("\n".join(("UTF-8 bytes", *_SPECIAL)).encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, uint8."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def save(self, folder: Path) -> None:
        """Nothing: `byte_tokenizer` makes it again."""


class TransformersEncoder(Encoder):
    """A tokenizer of the transformers library."""

    kind = "transformers"

    def __init__(self, tokenizer: Any, *, eos: str | None = None) -> None:
        """Wrap a tokenizer; `eos` names the token that ends a document when the tokenizer does not say it."""
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        if eos is not None and eos not in vocabulary:
            raise ValueError(f"eos={eos!r} is no token of the tokenizer: name one of its tokens")
        self.vocab_size = max(vocabulary.values()) + 1
        self.bos = tokenizer.bos_token_id
        self.eos = tokenizer.eos_token_id if eos is None else vocabulary[eos]
        known = (tokenizer.pad_token_id, self.eos, self.bos, 0)
        self.pad = next(token for token in known if token is not None)
        self.sha256 = self._sha256(vocabulary)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int64."""
        # Without the split a text that quotes the end token would end its document.
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [np.asarray(ids, np.int64) for ids in encoded["input_ids"]]

    def save(self, folder: Path) -> None:
        """Write the tokenizer as transformers does."""
        self.tokenizer.save_pretrained(folder)

    def _sha256(self, vocabulary: dict[str, int]) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        # Python tokenizers do not write themselves down: their vocabulary and special tokens stand for them.
        rules = backend.to_str() if backend is not None else repr(sorted(vocabulary.items(), key=lambda item: item[1]))
        said = f"{rules}\n{self.bos} {self.eos} {self.pad}"
        return hashlib.sha256(said.encode()).hexdigest()


def encoder(tokenizer: Any = BYTES, *, eos: str | None = None) -> Encoder:
    """The encoder of a tokenizer.

    Args:
        tokenizer: "bytes", a `tokenizer.json`, any source of `loopwise.load_tokenizer`, or a transformers tokenizer.
        eos: token that ends a document, for a tokenizer that does not say it.

    Raises:
        ValueError: there is no such tokenizer, or it has no token `eos`.
    """
    if tokenizer == BYTES:
        if eos is not None:
            raise ValueError(f"eos={eos!r}: the byte tokenizer has its own end token, leave it out")
        return ByteEncoder()
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    return TransformersEncoder(tokenizer, eos=eos)


def byte_tokenizer() -> Any:
    """The byte tokenizer as a `PreTrainedTokenizerFast`: for every text, the ids are its UTF-8 bytes.

    Saved beside a model it makes the folder able to generate. Ids that are not UTF-8 decode to U+FFFD, as with every
    byte-level tokenizer; `decode_bytes` gives back any bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    vocabulary |= {symbol: 256 + number for number, symbol in enumerate(_SPECIAL)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    bos, eos, pad = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def decode_bytes(ids: Any) -> bytes:
    """The bytes that ids of the byte tokenizer stand for; special tokens are left out."""
    ids = np.asarray(ids, np.int64)
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < NUM_BYTE_TOKENS:
        raise ValueError(f"ids from {ids.min()} to {ids.max()}: byte tokens are 0 to {NUM_BYTE_TOKENS - 1}")
    return ids[ids < 256].astype(np.uint8).tobytes()


@functools.cache
def _byte_symbols() -> tuple[str, ...]:
    """The visible character that byte-level tokenizers write for each byte (GPT-2's table)."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return tuple(chr(byte if byte in visible else next(spare)) for byte in range(256))


def load_tokenizer(source: str | Path) -> Any:
    """A transformers tokenizer from a `tokenizer.json`, a folder that holds only a tokenizer, or a model.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(source)
    is_bare = path.is_dir() and (path / "tokenizer_config.json").is_file() and not (path / "config.json").is_file()
    try:
        if path.is_file() and path.suffix != ".gguf":
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        if is_bare:
            return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot read
        raise ValueError(f"cannot load a tokenizer from {source}: {(str(error).splitlines() or ['?'])[0]}") from None
    return loopwise.load_tokenizer(source)
