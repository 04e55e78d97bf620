"""Requests made from the server's own OpenAPI document, right and wrong: none of them is answered with 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from loopwise.decode.engine import Engine
from tests.decode.serving import MAX_LOOPS, TEMPLATE, Client, serving, tiny_looped, tiny_tokenizer

PATHS = ["/v1/completions", "/v1/chat/completions"]
QUIET = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
load_all_checks()
# Not "valid data is accepted": what a halting rule may be and how long a prompt, a schema cannot say.
WANTED = CHECKS.get_by_names(
    ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]
)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    engine = Engine(tiny_looped(len(tiny_tokenizer())), max_requests=4, capacity=48, max_loops=MAX_LOOPS)
    with serving(engine, template=TEMPLATE) as made:
        yield made


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", PATHS)
def test_no_request_breaks_the_server(client: Client, path: str, mode: GenerationMode) -> None:
    operation = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")[path]["POST"]

    @QUIET
    @given(case=operation.as_strategy(generation_mode=mode))
    def attack(case: Any) -> None:
        case.call_and_validate(checks=WANTED)

    def answered() -> float:
        return sum(count for name, count in client.metrics().items() if f'_requests_total{{path="{path}"' in name)

    before = answered()
    attack()
    assert answered() - before >= QUIET.max_examples / 2  # that there was an attack
    assert client.idle()
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_no_bytes_break_the_server(client: Client, path: str) -> None:
    @QUIET
    @given(st.binary(max_size=200), st.sampled_from(["application/json", "text/plain", "", "application/x; a=\xff"]))
    def attack(body: bytes, kind: str) -> None:
        answer = client.post(path, content=body, headers={"Content-Type": kind.encode("latin-1")})
        assert 400 <= answer.status_code < 500
        assert "\n" not in answer.json()["error"]["message"]

    attack()


@pytest.mark.parametrize("field", ["halting", "stop", "model", "user"])
def test_no_text_breaks_the_server(client: Client, field: str) -> None:
    @QUIET
    @given(st.text(max_size=30) | st.text("klfixed_minp(=,).0123456789e-", max_size=30))
    def attack(text: str) -> None:
        answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3, field: text})
        assert answer.status_code < 500, answer.text

    attack()
