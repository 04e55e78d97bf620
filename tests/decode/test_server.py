"""The HTTP server, over real connections."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from loopwise.decode.engine import Engine
from loopwise.decode.request import Request
from loopwise.decode.sampling import Sampling
from loopwise.decode.sequential import decode_sequential
from tests.decode.serving import (
    CAPACITY,
    COUNT,
    MAX_LOOPS,
    NAME,
    TEMPLATE,
    Client,
    events_of,
    serving,
    tiny_looped,
    tiny_tokenizer,
)

PROMPT = "A visit of"
TOKENIZER = tiny_tokenizer()
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with serving(template=TEMPLATE) as made:
        yield made


def complete(client: Client, prompt: Any = PROMPT, **fields: Any) -> Any:
    answer = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 12, **GREEDY, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def decoded(prompt: str, *, sampling: Sampling | None = None, loops: int = COUNT, count: int = 12) -> str:
    """What the model gives when nobody else is there."""
    ids = TOKENIZER(prompt)["input_ids"]
    found = decode_sequential(
        tiny_looped(len(TOKENIZER)),
        [ids],
        max_new_tokens=count,
        sampling=[sampling or Sampling()],
        stop_ids=(0,),
        loops=loops,
    )
    return TOKENIZER.decode(found.tokens[0], skip_special_tokens=True)


# What is answered.


def test_a_completion_is_what_the_model_gives_alone(client: Client) -> None:
    answer = complete(client, model=NAME)
    (choice,) = answer["choices"]
    assert choice["text"] == decoded(PROMPT)
    assert choice["finish_reason"] == "length"
    prompt_tokens = len(TOKENIZER(PROMPT)["input_ids"])
    assert answer["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 12,
        "total_tokens": prompt_tokens + 12,
        "mean_depth": COUNT,
    }
    assert (answer["object"], answer["model"]) == ("text_completion", NAME)


def test_token_ids_are_the_same_prompt(client: Client) -> None:
    ids = TOKENIZER(PROMPT)["input_ids"]
    assert complete(client, ids)["choices"] == complete(client)["choices"]
    assert complete(client, [ids])["choices"] == complete(client)["choices"]


def test_a_list_of_prompts_has_a_choice_for_each(client: Client) -> None:
    prompts = ["A", "slot", "Eine Schleife", "of a", "twice", "noch"]
    choices = complete(client, prompts)["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    assert [choice["text"] for choice in choices] == [decoded(prompt) for prompt in prompts]


@pytest.mark.parametrize("loops", [1, 2, MAX_LOOPS])
def test_a_request_has_loops_of_its_own(client: Client, loops: int) -> None:
    answer = complete(client, loops=loops)
    assert answer["choices"][0]["text"] == decoded(PROMPT, loops=loops)
    assert answer["usage"]["mean_depth"] == loops


def test_a_request_has_a_halting_rule_of_its_own(client: Client) -> None:
    assert complete(client, halting="fixed(1)")["usage"]["mean_depth"] < COUNT
    assert complete(client)["usage"]["mean_depth"] == COUNT


def test_sampling_fields_reach_the_model(client: Client) -> None:
    fields = {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.001}
    expected = decoded(PROMPT, sampling=Sampling(seed=7, **fields))
    assert complete(client, seed=7, **fields)["choices"][0]["text"] == expected
    assert complete(client, seed=8, **fields)["choices"][0]["text"] != expected


def test_without_a_seed_answers_differ(client: Client) -> None:
    texts = {complete(client, temperature=2.0)["choices"][0]["text"] for _ in range(4)}
    assert len(texts) > 1


def test_numbers_at_the_edge_of_float_are_greedy(client: Client) -> None:
    for edge in ({"temperature": 1e-300}, {"temperature": 1.0, "top_p": 1e-300}, {"temperature": 1.0, "min_p": 1.0}):
        assert complete(client, **edge)["choices"][0]["text"] == decoded(PROMPT)


def streamed(client: Client, path: str, body: dict[str, Any]) -> list[Any]:
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        return events_of(answer.iter_lines())


def test_a_stream_is_the_whole_answer_in_pieces(client: Client) -> None:
    body = {"prompt": [PROMPT, "twice"], "max_tokens": 12, **GREEDY, "stream_options": {"include_usage": True}}
    *events, last = streamed(client, "/v1/completions", body)
    texts, finishes = ["", ""], [None, None]
    for event in events:
        assert event["usage"] is None
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
            finishes[choice["index"]] = choice["finish_reason"]
    assert texts == [decoded(PROMPT), decoded("twice")]
    assert finishes == ["length", "length"]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 24
    assert len({event["id"] for event in events}) == 1
    assert len(events) > 4


def test_without_the_option_a_stream_has_no_usage(client: Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3}
    assert all("usage" not in event for event in streamed(client, "/v1/completions", body))


def test_chat_applies_the_template(client: Client) -> None:
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
    ]
    body = {"messages": messages, "max_completion_tokens": 9, **GREEDY}
    answer = client.post("/v1/chat/completions", json=body).json()
    expected = decoded("<|system|>be kind\n<|user|>hello\n<|assistant|>", count=9)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected}
    events = streamed(client, "/v1/chat/completions", body)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == expected
    assert [event["choices"][0]["finish_reason"] for event in events].count(None) == len(events) - 1
    assert events[0]["object"] == "chat.completion.chunk"


def test_a_stop_text_ends_the_answer_before_it(client: Client) -> None:
    whole = complete(client, max_tokens=40)["choices"][0]["text"]
    stop = whole[5:9]
    cut = whole[: whole.index(stop)]
    answer = complete(client, max_tokens=40, stop=["never seen", stop])
    assert answer["choices"][0]["text"] == cut
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 40
    body = {"prompt": PROMPT, "max_tokens": 40, **GREEDY, "stop": stop}
    events = streamed(client, "/v1/completions", body)
    assert "".join(event["choices"][0]["text"] for event in events) == cut
    assert client.idle()


def test_models_health_and_openapi(client: Client) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"], card["max_loops"]) == (NAME, CAPACITY, MAX_LOOPS)
    assert client.get("/health").json() == {"status": "ok"}
    assert set(client.get("/openapi.json").json()["paths"]) == {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/health",
        "/metrics",
    }


def test_metrics_count(client: Client) -> None:
    before = client.metrics()
    complete(client)
    after = client.metrics()

    def gained(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert gained("loopwise_engine_tokens_total") == 12
    assert gained('loopwise_http_requests_total{path="/v1/completions",status="200"}') == 1
    assert gained("loopwise_first_token_seconds_count") == 1
    assert gained("loopwise_row_iterations_useful_total") == 11 * COUNT  # the first token is the prompt's
    assert gained("loopwise_row_iterations_executed_total") >= 11 * COUNT


# What is refused.

BIG = 10**6
COMPLETION = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
# Path, body, status, field, what the message says.
REFUSED = [
    (COMPLETION, {"prompt": "a", "temprature": 1}, 400, "temprature", "did you mean 'temperature'"),
    (COMPLETION, {"prompt": "a", "logit_bias": {}}, 400, "logit_bias", "unknown field 'logit_bias'"),
    (COMPLETION, {}, 400, "prompt", "missing"),
    (COMPLETION, {"prompt": "a", "model": "other"}, 404, "model", "'other' is not served here"),
    (COMPLETION, {"prompt": ""}, 400, "prompt", "no tokens"),
    (COMPLETION, {"prompt": []}, 400, "prompt", "none of them empty"),
    (COMPLETION, {"prompt": [1, "a"]}, 400, "prompt", "must be text"),
    (COMPLETION, {"prompt": [True]}, 400, "prompt", "must be text"),
    (COMPLETION, {"prompt": [BIG]}, 400, "prompt", f"token {BIG}"),
    (COMPLETION, {"prompt": [-1]}, 400, "prompt", "token -1"),
    (COMPLETION, {"prompt": ["a"] * 129}, 400, "prompt", "must be text"),
    (COMPLETION, {"prompt": "a " * CAPACITY}, 400, "prompt", "over the context limit"),
    (COMPLETION, {"prompt": "a", "max_tokens": CAPACITY}, 400, "prompt", "over the context limit"),
    (COMPLETION, {"prompt": "a", "max_tokens": 10**30}, 400, "prompt", "over the context limit"),
    (COMPLETION, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    (COMPLETION, {"prompt": "a", "max_tokens": 2.5}, 400, "max_tokens", "integer"),
    (COMPLETION, {"prompt": "a", "max_tokens": "5"}, 400, "max_tokens", "integer"),
    (COMPLETION, {"prompt": "a", "n": 2}, 400, "n", "should be 1"),
    (COMPLETION, {"prompt": "a", "temperature": -1}, 400, "temperature", "greater than or equal to 0"),
    (COMPLETION, {"prompt": "a", "top_p": 0}, 400, "top_p", "greater than 0"),
    (COMPLETION, {"prompt": "a", "top_k": True}, 400, "top_k", "integer"),
    (COMPLETION, {"prompt": "a", "min_p": 2}, 400, "min_p", "less than or equal to 1"),
    (COMPLETION, {"prompt": "a", "seed": 2**63}, 400, "seed", "less than"),
    (COMPLETION, {"prompt": "a", "stop": ["a"] * 5}, 400, "stop", "up to 4"),
    (COMPLETION, {"prompt": "a", "stop": ""}, 400, "stop", "up to 4"),
    (COMPLETION, {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options", "stream: true"),
    (
        COMPLETION,
        {"prompt": "a", "stream_options": {"x": 1}},
        400,
        "stream_options",
        "unknown field 'stream_options.x'",
    ),
    (COMPLETION, {"prompt": "a", "loops": 0}, 400, "loops", "greater than or equal to 1"),
    (COMPLETION, {"prompt": "a", "loops": BIG}, 400, "loops", f"loops {BIG}: at most {MAX_LOOPS}"),
    (COMPLETION, {"prompt": "a", "loops": "2"}, 400, "loops", "integer"),
    (COMPLETION, {"prompt": "a", "halting": "kl("}, 400, "halting", "kl("),
    (COMPLETION, {"prompt": "a", "halting": "nosuch(1)"}, 400, "halting", "nosuch"),
    (COMPLETION, {"prompt": "a", "halting": "hazard(threshold=0.5)"}, 400, "halting", "gate"),
    (CHAT, {"messages": []}, 400, "messages", "must be a list"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, 400, "messages", "must be a list"),
    (CHAT, {"messages": [{"role": "robot", "content": "a"}]}, 400, "messages", "must be a list"),
    (CHAT, {"messages": [{**HELLO[0], "x": 1}]}, 400, "messages", "unknown field 'messages.0.x'"),
    (CHAT, {"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 1}, 400, "max_tokens", "not both"),
    (CHAT, {"messages": [{"role": "user", "content": "a " * CAPACITY}]}, 400, "messages", "over the context limit"),
    (COMPLETION, b"", 400, None, "JSON"),
    (COMPLETION, b"[]", 400, None, "JSON object"),
    (COMPLETION, b"null", 400, None, "JSON"),
    (COMPLETION, b'{"prompt": "a"', 400, None, "not JSON"),
    (COMPLETION, b'{"prompt": "\xff\xfe"}', 400, None, "UTF-8"),
    (COMPLETION, b'{"prompt": "\\ud800"}', 400, "prompt", "must be text"),
    (COMPLETION, b'{"\\ud800": 1, "prompt": "a"}', 400, None, "JSON"),
    (COMPLETION, b'{"prompt": "a", "halting": "\\udfff"}', 400, "halting", "surrogate"),
    (COMPLETION, b'{"prompt": "a", "temperature": NaN}', 400, "temperature", "finite"),
    (COMPLETION, b'{"prompt": "a", "temperature": 1e999}', 400, "temperature", "finite"),
    (COMPLETION, b"[" * 100_000, 400, None, "JSON"),
    (COMPLETION, b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", 400, None, "JSON"),
    (COMPLETION, b'{"prompt": "' + b"a" * 10_000_000 + b'"}', 413, None, "limit of 1000000 bytes"),
    ("/v1/nosuch", {}, 404, None, "no /v1/nosuch"),
    ("/v1/models", {}, 405, None, "POST is not for /v1/models"),
]


@pytest.mark.parametrize(
    ("path", "body", "status", "field", "says"), REFUSED, ids=[f"{i}-{row[4][:20]}" for i, row in enumerate(REFUSED)]
)
def test_bad_requests(client: Client, path: str, body: Any, status: int, field: str | None, says: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["type"]) == (field, "invalid_request_error")
    assert says in error["message"] and "\n" not in error["message"] and len(error["message"]) < 400
    assert client.get("/health").status_code == 200


def test_a_body_that_is_not_sent_as_json(client: Client) -> None:
    answer = client.post(COMPLETION, content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


def test_a_refused_prompt_of_a_list_frees_the_others(client: Client) -> None:
    answer = client.post(COMPLETION, json={"prompt": [[1, 2], [3, BIG]], "max_tokens": 1000})
    assert answer.status_code == 400
    assert client.idle()


def test_without_a_template_there_is_no_chat_and_what_is_too_much_waits_elsewhere() -> None:
    engine = Engine(tiny_looped(len(TOKENIZER)), max_requests=1, capacity=CAPACITY)
    with serving(engine, max_waiting=1) as client:
        answer = client.post(CHAT, json={"messages": HELLO})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_chat_template")
        answer = client.post(COMPLETION, json={"prompt": ["a"] * 3})
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert len(complete(client, ["a"] * 2)["choices"]) == 2


# Clients that go away, and ends.


def raw_request(client: Client, body: dict[str, Any]) -> socket.socket:
    data = json.dumps(body).encode()
    headers = [f"POST {COMPLETION} HTTP/1.1", "Host: x", "Content-Type: application/json"]
    head = "\r\n".join([*headers, f"Content-Length: {len(data)}", "", ""])
    made = socket.create_connection((client.base_url.host, client.base_url.port or 0))
    made.sendall(head.encode() + data)
    return made


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(client: Client, stream: bool) -> None:
    assert client.idle()
    body = {"prompt": "a", "max_tokens": CAPACITY - 10, "stream": stream}
    before = client.metrics().get('loopwise_replies_total{outcome="disconnected"}', 0)
    connections = [raw_request(client, body) for _ in range(6)]  # two of them wait
    assert client.wait_busy(4)
    if stream:
        assert connections[0].recv(1000).startswith(b"HTTP/1.1 200")
    for connection in connections:
        connection.close()
    tokens = client.metrics()["loopwise_engine_tokens_total"]
    assert client.idle()
    # Long before the answers would have been complete.
    assert client.metrics()["loopwise_engine_tokens_total"] - tokens < CAPACITY
    assert client.metrics()['loopwise_replies_total{outcome="disconnected"}'] == before + 6
    assert complete(client)["choices"][0]["text"] == decoded(PROMPT)


def test_a_client_that_goes_away_while_it_sends(client: Client) -> None:
    made = socket.create_connection((client.base_url.host, client.base_url.port or 0))
    made.sendall(f"POST {COMPLETION} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
    made.close()
    assert client.get("/health").status_code == 200


def test_many_clients_at_once_get_their_own_answers(client: Client) -> None:
    jobs = [(f"{word} {number}", 1 + number % MAX_LOOPS) for number in range(6) for word in ("visit", "slot")]
    found: dict[tuple[str, int], str] = {}

    def ask(prompt: str, loops: int) -> None:
        with Client(base_url=client.base_url, timeout=60) as own:
            found[prompt, loops] = complete(own, prompt, loops=loops)["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {(prompt, loops): decoded(prompt, loops=loops) for prompt, loops in jobs}


class Stumbling(Engine):
    """Fails in its third step."""

    num_steps = 0

    def step(self) -> list[Any]:
        self.num_steps += 1
        if self.num_steps == 3:
            raise RuntimeError("stumbled")
        return super().step()


def test_a_failure_of_the_engine_is_told_and_survived() -> None:
    with serving(Stumbling(tiny_looped(len(TOKENIZER)), max_requests=2, capacity=64)) as client:
        answer = client.post(COMPLETION, json={"prompt": PROMPT})
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert complete(client)["choices"][0]["text"] == decoded(PROMPT)
        assert client.idle()


def test_the_end_of_the_server_ends_what_runs() -> None:
    with serving() as client:
        connection = raw_request(client, {"prompt": "a", "max_tokens": CAPACITY - 10, "stream": True})
        assert client.wait_busy(1)
    # `serving` insists on an end of its own.
    connection.settimeout(10)
    while connection.recv(65536):
        pass
    connection.close()


def test_a_request_for_the_engine_is_checked_by_it() -> None:
    with pytest.raises(ValueError, match="loops"):
        Request(prompt=[1], max_new_tokens=1, loops=0)
