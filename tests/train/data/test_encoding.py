"""Tokenizers: bytes, and those of transformers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loopwise.train.data.encoding import (
    NUM_BYTE_TOKENS,
    ByteEncoder,
    byte_tokenizer,
    decode_bytes,
    encoder,
    load_tokenizer,
)
from tests.train.data.corpora import law

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
bytes_tokenizer = functools.cache(byte_tokenizer)


def word_tokenizer(**special: str) -> Any:
    words = ["<unk>", "<s>", "</s>", "a", "b", "c"]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", **special)


@law
@given(TEXT | st.sampled_from(["<|eos|>", "a <|bos|><|pad|>\r\n", " .,'s  n't ", "\x00\ufeff"]))
def test_byte_ids_are_the_bytes_of_the_text(text: str) -> None:
    tokenizer = bytes_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode()) == ByteEncoder().encode([text])[0].tolist()
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([256, *ids, 257, 258], skip_special_tokens=True) == text


@law
@given(st.binary(max_size=100))
def test_any_bytes_round_trip(data: bytes) -> None:
    ids = np.frombuffer(data, np.uint8).astype(np.int64)
    assert decode_bytes(np.r_[256, ids, 257, 258]) == data
    # Each id stands for its byte in the transformers tokenizer as well: the symbols give back all bytes.
    tokenizer = bytes_tokenizer()
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(ids.tolist())) == ids.tolist()
    assert tokenizer.decode(ids.tolist()) == data.decode("utf-8", errors="replace")


def test_decode_bytes_refuses_foreign_ids() -> None:
    assert decode_bytes([]) == b""
    with pytest.raises(ValueError, match="byte tokens are 0 to 258"):
        decode_bytes([1, 259])


def test_the_byte_tokenizer_survives_saving(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    text = "naïve <|eos|>\n\t漢"
    assert again(text)["input_ids"] == list(text.encode())
    assert again.decode(list(text.encode())) == text
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (256, 257, 258)
    assert len(again) == NUM_BYTE_TOKENS


def test_a_text_cannot_end_its_document() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_tokenizer().backend_tokenizer, eos_token="<|eos|>")
    assert tokenizer("<|eos|>")["input_ids"] == [257], "the tokenizer itself reads the end token"
    assert encoder(tokenizer).encode(["<|eos|>"])[0].tolist() == list(b"<|eos|>")


def test_special_tokens_of_a_transformers_tokenizer() -> None:
    made = encoder(word_tokenizer(bos_token="<s>", eos_token="</s>"))
    assert (made.kind, made.vocab_size, made.bos, made.eos, made.pad) == ("transformers", 6, 1, 2, 2)
    assert [ids.tolist() for ids in made.encode(["a c", "", "b"])] == [[3, 5], [], [4]]
    assert encoder(word_tokenizer()).eos is None
    assert encoder(word_tokenizer(), eos="c").eos == 5


def test_the_hash_tells_tokenizers_apart() -> None:
    same = [encoder(word_tokenizer(eos_token="</s>")).sha256 for _ in range(2)]
    assert same[0] == same[1]
    assert encoder(word_tokenizer(eos_token="<s>")).sha256 != same[0]
    assert encoder().sha256 == ByteEncoder.sha256 != same[0]


def test_tokenizers_from_files(tmp_path: Path) -> None:
    word_tokenizer(eos_token="</s>").save_pretrained(tmp_path)
    from_folder, from_file = encoder(tmp_path), encoder(tmp_path / "tokenizer.json")
    assert from_folder.encode(["a b"])[0].tolist() == from_file.encode(["a b"])[0].tolist() == [3, 4]
    assert from_folder.eos == 2 and from_file.eos is None, "a bare tokenizer.json does not say what ends a text"
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="cannot load a tokenizer from .*broken.json"):
        encoder(tmp_path / "broken.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is not a checkpoint"):
        encoder(str(tmp_path / "empty"))


def test_unknown_end_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="eos='zzz' is no token"):
        encoder(word_tokenizer(), eos="zzz")
    with pytest.raises(ValueError, match="has its own end token"):
        encoder("bytes", eos="</s>")
