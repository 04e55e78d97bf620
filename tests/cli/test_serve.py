"""`loopwise serve`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

PLAN = "0 core:(1-2)x2 3"
Refused = Callable[..., str]


@contextmanager
def served(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A process of the command, what it says when it is ready, and where it listens."""
    command = [sys.executable, "-m", "loopwise", "serve", *map(str, arguments), "--port", "0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, encoding="utf-8") as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert "http://127.0.0.1:" in line, process.stderr.read() if process.stderr else ""
            yield process, line, line.split()[-1]
        finally:
            process.kill()


def test_it_serves_until_a_signal(saved_model: Path) -> None:
    arguments = ["--plan", PLAN, "--max-loops", 4, "--halt", "fixed(2)", "--capacity", 64, "--max-requests", 2]
    with served(saved_model, *arguments) as (process, line, url):
        assert line == f"serving {saved_model.name} on {url}\n"
        (card,) = httpx2.get(f"{url}/v1/models").json()["data"]
        assert (card["plan"], card["max_model_len"], card["max_loops"]) == (PLAN, 64, 4)
        body = {"prompt": "A visit", "max_tokens": 5, "temperature": 0, "loops": 3}
        answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 5
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, ""), err
        assert err == "depth-wise batching, 2 slots of 64 tokens\n"


def test_a_signal_lets_a_running_answer_end(saved_model: Path) -> None:
    with served(saved_model) as (process, _, url):
        body = {"prompt": "A visit", "max_tokens": 60, "temperature": 0, "stream": True}
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        _, err = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "plain batching (it has no loop" in err


def test_sequence_level_batching_gives_what_the_model_gives(saved_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import loopwise

    tokenizer = AutoTokenizer.from_pretrained(saved_model)
    model = loopwise.attach(AutoModelForCausalLM.from_pretrained(saved_model), PLAN)
    ids = tokenizer("A visit", return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=8)[0, ids.shape[1] :], skip_special_tokens=True)
    with served(saved_model, "--plan", PLAN, "--batching", "sequence") as (_, _, url):
        body = {"prompt": "A visit", "max_tokens": 8, "temperature": 0}
        answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["text"] == expected


def test_a_port_in_use_is_refused(refused: Refused, saved_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}: Address already in use" in refused("serve", saved_model, "--port", port)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", 70000], "--port 70000: from 1 to 65535"),
        (["--host", "203.0.113.7"], "cannot listen on 203.0.113.7"),
        (["--host", "no such host"], "--host no such host"),
        (["--plan", PLAN, "--loops", 0], "--loops '0'"),
        (["--loops", 2], "no plan"),
        (["--plan", "0 core:(1-2x2 3"], ")"),
        (["--plan", PLAN, "--loops", 4, "--max-loops", 2], "max_loops 2 is below loops 4"),
        (["--max-loops", 2], "no loop"),
        (["--plan", PLAN, "--cache", "nosuch"], "nosuch"),
        (["--plan", PLAN, "--cache", "own/last"], "own/last"),
        (["--plan", PLAN, "--halt", "nosuch"], "nosuch"),
        (["--plan", PLAN, "--halt", "hazard(threshold=0.5)"], "gate"),
        (["--max-requests", 0], "max_requests 0"),
        (["--capacity", 0], "capacity 0"),
        (["--capacity", 4096], "--capacity 4096: this model reads at most 128 tokens"),
        (["--max-waiting", -1], "--max-waiting -1"),
        (["--batching", "depth"], "no loop"),
        (["--device", "cuda:9"], "--device cuda:9"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(refused: Refused, saved_model: Path, arguments: list[object], says: str) -> None:
    port = [] if "--port" in arguments else ["--port", 0]
    assert says in refused("serve", saved_model, *arguments, *port)


def test_a_source_that_is_no_model(refused: Refused, tmp_path: Path) -> None:
    assert str(tmp_path) in refused("serve", tmp_path, "--port", 0)


def test_without_the_extra_it_says_what_to_install(saved_model: Path) -> None:
    code = "import sys\nsys.modules['fastapi'] = None\nfrom loopwise.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "serve", str(saved_model), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'error: serve needs the package fastapi: pip install "loopwise[serve]"\n'
