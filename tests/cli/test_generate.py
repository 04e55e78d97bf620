"""`loopwise generate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loopwise.cli.generate import encode_prompt, generate

Run = Callable[..., tuple[int, str, str]]
PLAN = "0 core:(1-2)x2 3"


@pytest.fixture
def loaded(saved_model: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(saved_model), AutoTokenizer.from_pretrained(saved_model)


def test_greedy_is_what_transformers_generates(loaded) -> None:
    model, tokenizer = loaded
    input_ids = encode_prompt(tokenizer, "A visit of")
    expected = model.generate(input_ids, max_new_tokens=8, do_sample=False)[0, input_ids.shape[1] :].tolist()
    pieces: list[str] = []
    assert generate(model, tokenizer, input_ids, max_new_tokens=8, on_text=pieces.append) == expected
    assert "".join(pieces) == tokenizer.decode(expected, skip_special_tokens=True)
    assert len(pieces) > 1


def test_a_seed_repeats_and_another_seed_does_not(loaded) -> None:
    model, tokenizer = loaded
    input_ids = encode_prompt(tokenizer, "A visit of")
    first, again, other = (
        generate(model, tokenizer, input_ids, max_new_tokens=12, temperature=1.5, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_chat_template(chat_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_folder)

    def text(**options: object) -> str:
        return tokenizer.decode(encode_prompt(tokenizer, "hello", **options)[0])

    assert text() == "<|user|>hello\n<|assistant|>"
    assert text(system="be kind") == "<|system|>be kind\n<|user|>hello\n<|assistant|>"
    assert text(chat=False) == "hello"


def test_a_cache_policy_needs_a_plan(loaded) -> None:
    model, tokenizer = loaded
    with pytest.raises(ValueError, match="no plan"):
        generate(model, tokenizer, encode_prompt(tokenizer, "a"), cache="last")


def test_command_streams_the_looped_text(run: Run, saved_model: Path, loaded) -> None:
    import loopwise

    model, tokenizer = loaded
    loopwise.attach(model, "0 core:(1-2)x3 3")
    ids = generate(model, tokenizer, encode_prompt(tokenizer, "A visit of"), max_new_tokens=10)
    arguments = ["--prompt", "A visit of", "--plan", PLAN, "--loops", "core=3", "-n", 10]
    code, out, err = run("generate", saved_model, *arguments)
    assert code == 0
    assert out == tokenizer.decode(ids, skip_special_tokens=True) + "\n"
    assert "tokens/s" in err and err.count("\n") == 1


@pytest.mark.parametrize("cache", ["own", "last", "first", "ring(2)", "own/last"])
def test_command_with_a_cache_policy(run: Run, saved_model: Path, cache: str) -> None:
    code, _, err = run("generate", saved_model, "--prompt", "A", "--plan", PLAN, "--cache", cache, "-n", 3)
    assert code == 0, err


def test_prompt_from_standard_input(run: Run, saved_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("A visit of"))
    from_stdin = run("generate", saved_model, "--prompt", "-", "-n", 4)[1]
    assert from_stdin == run("generate", saved_model, "--prompt", "A visit of", "-n", 4)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "0-9"], "layer 4 does not exist"),
        (["--plan", "0 1-"], "bad plan"),
        (["--plan", PLAN, "--loops", "0"], "--loops '0'"),
        (["--plan", PLAN, "--cache", "most"], "most"),
        (["--cache", "last"], "no plan"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--temperature", "-1"], "--temperature -1"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--system", "be kind"], "chat template"),
        (["--prompt", ""], "empty"),
    ],
)
def test_bad_input(refused: Callable[..., str], saved_model: Path, arguments: list[str], message: str) -> None:
    prompt = [] if "--prompt" in arguments else ["--prompt", "A visit"]
    assert message in refused("generate", saved_model, *prompt, *arguments)
