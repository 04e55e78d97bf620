"""`loopwise generate`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from loopwise.cli.decoded import agreement, token_pieces
from loopwise.cli.decoding import Decoding, parse_wave
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


LOOP = "0 core:(1-2)x4 3"
PROMPT = ["--prompt", "A visit of", "-n", 10]
EXACT = [
    ["--decoder", "sequential"],
    ["--halt", "fixed"],
    ["--halt", "kl(0)"],
    ["--halt", "fixed", "--cache", "monotone"],
    ["--decoder", "speculative"],
    ["--decoder", "speculative", "--draft-loops", "3", "--lookahead", "2"],
    ["--decoder", "jacobi"],
    ["--decoder", "jacobi", "--lookahead", "3"],
    ["--decoder", "wavefront", "--wave", "freeze=fixed, inner=2, width=1"],
]


@pytest.mark.parametrize("arguments", EXACT, ids=lambda arguments: " ".join(arguments))
def test_exact_decoders_stream_what_the_model_generates(run: Run, saved_model: Path, arguments: list[str]) -> None:
    code, out, err = run("generate", saved_model, *PROMPT, "--plan", LOOP, *arguments)
    assert code == 0, err
    assert out == run("generate", saved_model, *PROMPT, "--plan", LOOP)[1]
    assert re.search(r"^10 tokens in \S+ s, \S+ tokens/s\nmean depth 4.00 of 4 iterations, ", err)
    assert re.search(r"[0-9.]+ core passes and [0-9.]+ visits per token, .* of cache per token", err)


def test_the_plan_of_a_plain_model_has_exits(run: Run, saved_model: Path) -> None:
    plain = run("generate", saved_model, *PROMPT)[1]
    code, out, err = run("generate", saved_model, *PROMPT, "--halt", "confidence(1.0)", "--exits", "1,3")
    assert (code, out) == (0, plain) and "mean depth 3.00 of 3 exits" in err
    out, err = run("generate", saved_model, *PROMPT, "--halt", "fixed(1)", "--exits", "1,3")[1:]
    assert out != plain and "mean depth 1.20 of 3 exits" in err  # the prompt has full depth


def test_depth_that_is_skipped_saves_visits_and_says_what_it_costs(run: Run, saved_model: Path) -> None:
    code, _, err = run("generate", saved_model, *PROMPT, "--plan", LOOP, "--halt", "fixed(2)", "--cache", "copy")
    assert code == 0 and "mean depth 2.20 of 4 iterations, 1.80 core passes" in err
    assert "cache policy copy is approximate: over 10 new tokens of mean depth 2 the largest logit difference" in err
    assert re.search(r"full depth, given the same text before, takes the same token for \S+% of 10", err)
    exact = run("generate", saved_model, *PROMPT, "--plan", LOOP, "--halt", "fixed(2)")[2]
    assert "cache policy" not in exact and "takes the same token" in exact


@pytest.mark.parametrize("cache", ["last", "own/last", "ring(2)", "first"])
def test_shared_stores_say_how_far_they_are_off(run: Run, saved_model: Path, cache: str) -> None:
    arguments = [*PROMPT, "--plan", LOOP, "--cache", cache]
    code, out, err = run("generate", saved_model, *arguments, "--decoder", "sequential")
    assert code == 0 and f"cache policy {cache} is approximate" in err
    assert out == run("generate", saved_model, *arguments)[1]


def test_decoders_say_what_they_counted(run: Run, saved_model: Path) -> None:
    start = [*PROMPT, "--plan", LOOP, "--decoder"]
    assert re.search(
        r"\d+ of \d+ drafts accepted in \d+ full passes", run("generate", saved_model, *start, "speculative")[2]
    )
    assert re.search(r"outer passes; of \d+ guessed tokens", run("generate", saved_model, *start, "jacobi")[2])
    err = run("generate", saved_model, *start, "wavefront", "--wave", "inner=1, threshold=0.5")[2]
    assert re.search(r"outer passes; of \d+ guessed tokens", err) and "takes the same token" in err


def test_sampling_is_the_same_for_every_seed(run: Run, saved_model: Path) -> None:
    sampled = [*PROMPT, "--temperature", 1.2, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01, "--seed"]

    def text(seed: int, *arguments: str) -> str:
        code, out, err = run("generate", saved_model, *sampled, seed, *arguments)
        assert code == 0, err
        return out

    for arguments in ([], ["--decoder", "sequential"], ["--halt", "latent(0.3)"]):
        assert text(1, *arguments) == text(1, *arguments) != text(2, *arguments)


def test_a_depth_map_is_printed_and_drawn(run: Run, saved_model: Path, tmp_path: Path) -> None:
    png = tmp_path / "map.png"
    arguments = [*PROMPT, "--plan", LOOP, "--halt", "fixed(2)", "--depth-map", "--png", png]
    code, out, err = run("generate", saved_model, *arguments)
    text, shown = out.split("\n\n", 1) if "\n\n" in out else out.rsplit("\n", 1)
    assert code == 0, err
    assert shown.count("[2]") == 9 and shown.count("[4]") == 1
    assert re.sub(r"\[[24]\]", "", shown).strip() == text.strip()
    assert png.read_bytes().startswith(b"\x89PNG")


def test_pieces_of_tokens_make_the_text(loaded) -> None:
    _, tokenizer = loaded
    before = tokenizer("A visit")["input_ids"]
    ids = tokenizer(" of a l\u00e4yer \u6f22\U0001f600 twice\n")["input_ids"]
    pieces = token_pieces(tokenizer, ids, before)
    assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids)
    assert "\u6f22" in pieces and "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_agreement_is_that_of_a_whole_forward(loaded) -> None:
    import torch

    import loopwise

    model, tokenizer = loaded
    loopwise.attach(model.eval(), LOOP)
    prompt, tokens = tokenizer("A visit of")["input_ids"], [5, 7, 9, 200]
    with torch.no_grad():
        best = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
    assert agreement(model, prompt, tokens) == 0.25 * sum(a == b for a, b in zip(best, tokens, strict=True))
    assert agreement(model, prompt, [best[0], 7]) >= 0.5


def test_waves_are_read() -> None:
    wave = parse_wave("inner=2, freeze=stable, threshold=1e-2, restart=true, max_passes=none")
    assert (wave.inner, wave.freeze, wave.threshold, wave.restart, wave.max_passes) == (2, "stable", 0.01, True, None)


def test_flags_name_a_decoder() -> None:
    none = {"halt": None, "cache": None, "exits": None, "draft_loops": None, "lookahead": None, "wave": None}
    assert Decoding.of(decoder=None, **none) is None
    found = Decoding.of(decoder=None, **none | {"halt": "latent"})
    assert found is not None and (found.decoder, found.policy) == ("adaptive", "catch_up")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--halt", "kll"], "halting rule 'kll' is unknown"),
        (["--halt", "kl(treshold=1)"], "did you mean 'threshold'"),
        (["--halt", "kl(-1)"], "must be at least 0"),
        (["--plan", LOOP, "--halt", "hazard(0.5)"], "exit gate, which the main loop of this model lacks"),
        (["--halt", "fixed(9)"], "4 rungs"),
        (["--plan", LOOP, "--halt", "kl", "--cache", "most"], "'most' is unknown"),
        (["--plan", LOOP, "--halt", "kl", "--decoder", "jacobi"], "--halt kl: goes with --decoder adaptive"),
        (["--decoder", "adaptive"], "--halt RULE"),
        (["--plan", LOOP, "--draft-loops", "2"], "--draft-loops 2: goes with --decoder speculative"),
        (["--plan", LOOP, "--decoder", "speculative", "--draft-loops", "4"], "draft_rungs 4: from 1 to 3"),
        (["--plan", LOOP, "--decoder", "speculative", "--lookahead", "0"], "lookahead 0"),
        (["--plan", LOOP, "--decoder", "wavefront", "--wave", "iner=2"], "did you mean 'inner'"),
        (["--plan", LOOP, "--decoder", "wavefront", "--wave", "inner=0"], "inner=0 must be at least 1"),
        (["--plan", LOOP, "--decoder", "wavefront", "--wave", "inner"], "--wave 'inner'"),
        (["--plan", LOOP, "--wave", "inner=2"], "goes with --decoder wavefront"),
        (["--decoder", "wavefront"], "needs a loop"),
        (["--plan", LOOP, "--decoder", "jacobi", "--temperature", "1"], "temperature 0"),
        (["--exits", "1,2"], "--exits"),
        (["--halt", "kl", "--exits", "2,1"], "--exits '2,1'"),
        (["--halt", "kl", "--exits", "9"], "from 1 to 4"),
        (["--halt", "kl", "--exits", "x"], "--exits 'x'"),
        (["--plan", LOOP, "--loops", "0", "--halt", "kl"], "--loops '0'"),
        (["--plan", LOOP, "--loops", "1000000", "--halt", "kl"], "a loop count must be between 1 and"),
        (["--plan", LOOP, "--loops", "99999", "--halt", "kl"], "more than the 100000 allowed"),
        (["--halt", "kl", "-n", "500"], "can add at most"),
        (["--decoder", "sequential", "-n", "0"], "--max-new-tokens 0"),
        (["--top-k", "5"], "--temperature above 0"),
        (["--temperature", "1", "--top-k", "-5"], "--top-k -5"),
        (["--temperature", "1", "--top-p", "0"], "--top-p 0"),
        (["--temperature", "1", "--min-p", "2"], "--min-p 2"),
        (["--seed", "9" * 30], "--seed"),
        (["--depth-map"], "--halt or --decoder"),
        (["--halt", "kl", "--png", "missing/map.png"], "create it first"),
    ],
)
def test_bad_decoding(refused: Callable[..., str], saved_model: Path, arguments: list[str], message: str) -> None:
    assert message in refused("generate", saved_model, "--prompt", "A visit", *arguments)


def test_a_model_that_cannot_be_taken_apart_says_what_to_leave_out(
    refused: Callable[..., str], saved_model: Path, tmp_path: Path
) -> None:
    from tiny import tiny_model
    from transformers import AutoTokenizer

    folder = tmp_path / "mamba"
    tiny_model("mamba").save_pretrained(folder)
    AutoTokenizer.from_pretrained(saved_model).save_pretrained(folder)
    error = refused("generate", folder, "--prompt", "A", "-n", 2, "--decoder", "sequential")
    assert "no keys and values by position" in error and error.endswith("(leave out --decoder and --halt)")


def test_the_context_is_the_limit(run: Run, refused: Callable[..., str], saved_model: Path) -> None:
    """126 tokens are left after two: without -n the text ends there, with it more are refused."""
    start = ["generate", saved_model, "--prompt", "A visit", "--decoder", "sequential"]
    assert "126 tokens in" in run(*start)[2]
    assert "can add at most 126" in refused(*start, "-n", 127)
    long = ["generate", saved_model, "--prompt", "A visit" * 64, "--decoder", "sequential"]
    assert "this model reads at most 128" in refused(*long)
