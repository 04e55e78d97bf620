"""`loopwise data build` and `loopwise data show`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from loopwise.train.data.shards import Shards
from loopwise.train.data.text import ShardsData

Run = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]


def test_build_and_show(run: Run, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"body": "three [bold]"}\n', encoding="utf-8")
    dst = tmp_path / "out"
    code, out, err = run("data", "build", tmp_path / "texts", tmp_path / "b.jsonl", dst, "--field", "body")
    shards = Shards.open(dst)
    assert (code, err) == (0, "")
    assert out.startswith(f"wrote {dst} (2 documents, 22 tokens, ") and shards.fingerprint[:16] in out
    assert [bytes(shards.document(number)[:-1].tolist()) for number in range(2)] == [b"one\ntwo\n", b"three [bold]"]

    code, out, _ = run("data", "show", dst, "--verify")
    assert code == 0
    for words in ("22 in 1 file of uint16", "9 to 13, median 11", "bytes, 259 ids", shards.fingerprint, "one\ntwo\n"):
        assert words in out
    assert "every file is as it was written" in out
    facts = json.loads(run("data", "show", dst, "--json")[1])
    assert (facts["documents"], facts["tokens"], facts["fingerprint"]) == (2, 22, shards.fingerprint)


def test_options_reach_the_build(run: Run, saved_model: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.c").write_text("int x;\n\nint y;\n", encoding="utf-8")
    options = ("--pattern", "*.c", "--per", "paragraph", "--tokenizer", saved_model, "--shard-tokens", "2")
    assert run("data", "build", tmp_path / "texts", tmp_path / "out", *options)[0] == 0
    shards = Shards.open(tmp_path / "out")
    assert shards.num_documents == 2 and len(shards.index["shards"]) == -(-shards.num_tokens // 2)
    assert shards.tokenizer.decode(shards.document(1)) == "int y;\n<eos>"
    assert "transformers" in run("data", "show", tmp_path / "out")[1]


def test_what_is_refused(refused: Refused, tmp_path: Path, text_file: Path) -> None:
    assert "needs sources and, last, the new folder" in refused("data", "build", tmp_path / "out")
    assert "nothing.txt does not exist" in refused("data", "build", tmp_path / "nothing.txt", tmp_path / "out")
    assert "exists and is not empty" in refused("data", "build", text_file, tmp_path)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "llama"}')
    message = refused("data", "build", text_file, tmp_path / "out", "--tokenizer", tmp_path / "bare")
    assert "bare has no tokenizer" in message
    assert "holds no token shards" in refused("data", "show", tmp_path)


def test_verify_names_the_changed_file(run: Run, refused: Refused, tmp_path: Path, text_file: Path) -> None:
    dst = tmp_path / "out"
    assert run("data", "build", text_file, dst)[0] == 0
    path = dst / "tokens-00000.bin"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    assert run("data", "show", dst)[0] == 0
    assert "tokens-00000.bin was changed after it was built" in refused("data", "show", dst, "--verify")


def test_a_model_of_bytes_generates(run: Run, tmp_path: Path, text_file: Path) -> None:
    """The tokenizer that a source saves beside a model is all that `generate` needs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    assert run("data", "build", text_file, tmp_path / "out")[0] == 0
    source = ShardsData(folder=str(tmp_path / "out"), length=16).open(seed=0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=source.vocab_size,
        eos_token_id=257,
        pad_token_id=258,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Every hidden state is all ones, and only the byte "a" has a positive logit.
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "embed" in name or "norm" in name else 0.0)
        model.lm_head.weight[ord("a")] = 1.0
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    assert source.save_tokenizer(folder)
    code, out, err = run("generate", folder, "--prompt", "ü and ", "--max-new-tokens", 5)
    assert code == 0, err
    assert out.strip().endswith("aaaaa")
