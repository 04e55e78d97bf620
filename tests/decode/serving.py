"""A real server on a real port, over a tiny model: for tests of the server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import loopwise
from loopwise.decode.engine import Engine
from loopwise.decode.server import Service, bind, make_server

NAME = "tiny"
CAPACITY = 4096
COUNT = 3
MAX_LOOPS = 5
TEXT = "A visit of a layer is a slot. Eine Schleife läuft noch einmal. 層を二度訪れる。 \U0001f300\U0001f300\n"
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}<|assistant|>"
)


def tiny_tokenizer() -> Any:
    """Byte-level BPE with all bytes, so that characters are often several tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    raw.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")


def tiny_looped(vocabulary: int) -> Any:
    """Layer 0, layers 1-2 three times, layer 3; always the same weights."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=CAPACITY,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return loopwise.attach(model.eval(), f"0 core:(1-2)x{COUNT} 3")


class Client(httpx2.Client):
    """Of one server."""

    def metrics(self) -> dict[str, float]:
        """Every value of /metrics by its name with labels."""
        lines = [line for line in self.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def idle(self, seconds: float = 20) -> bool:
        """Wait until no slot is in use and nothing waits."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.metrics()
            busy = found["loopwise_slots_in_use"]
            if busy == 0 and not any(found[name] for name in found if name.startswith("loopwise_queue_requests")):
                return True
            time.sleep(0.02)
        return False

    def wait_busy(self, slots: int, seconds: float = 20) -> bool:
        """Wait until so many slots are in use."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.metrics()["loopwise_slots_in_use"] == slots:
                return True
            time.sleep(0.01)
        return False


def events_of(lines: Iterator[str]) -> list[Any]:
    """The data of server-sent events; the last must be [DONE]."""
    data = [line[len("data: ") :] for line in lines if line]
    assert data[-1] == "[DONE]"
    return [json.loads(item) for item in data[:-1]]


@contextmanager
def serving(engine: Engine | None = None, *, template: str | None = None, **options: Any) -> Iterator[Client]:
    """Serve on a free port in a thread; at the end the server must stop by itself."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    if engine is None:
        engine = Engine(tiny_looped(len(tokenizer)), max_requests=4, capacity=CAPACITY, max_loops=MAX_LOOPS)
    service = Service(engine=engine, tokenizer=tokenizer, name=NAME, stop_ids=(0,), drain_seconds=1, **options)
    bound, ready = bind("127.0.0.1", 0), threading.Event()
    server = make_server(service, ready.set)
    address = f"http://127.0.0.1:{bound.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        assert ready.wait(30)
        with Client(base_url=address, timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()
