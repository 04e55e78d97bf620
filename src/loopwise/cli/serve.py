"""`loopwise serve`: answer OpenAI-compatible HTTP requests with a batching engine."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

import loopwise
from loopwise.cli import common

_DEFAULT_CAPACITY = 1024
_MODES = {"auto": None, "depth": "depth-wise", "sequence": "sequence"}


@dataclass(frozen=True, kw_only=True)
class Serve(common.Source):
    """Arguments of `loopwise serve`."""

    plan: common.PlanText = None
    """order of visits, such as "0-9 (10-19)x2 20-29"; without it the source's own"""
    loops: common.LoopsText = None
    """loop counts of requests that name none: 4, or core=4"""
    max_loops: Annotated[int | None, arg(metavar="INT")] = None
    """the most iterations of the main loop that a request may ask for; without it those of --loops or the plan"""
    cache: Annotated[str, arg(metavar="POLICY")] = "own"
    """how depth is stored: own, last, first, ring(k), stride(k), or a rule for skipped depth such as latest"""
    halt: Annotated[str | None, arg(metavar="RULE")] = None
    """halting rule of requests that name none, such as "kl(threshold=1e-3)"; without it every iteration runs"""
    max_requests: int = 8
    """slots: how many requests run at a time; the others wait"""
    capacity: Annotated[int | None, arg(metavar="TOKENS")] = None
    """tokens of a slot, prompt and answer together; without it the model's context, at most 1024"""
    max_waiting: int = 1024
    """requests that may wait for a slot; more are answered with HTTP 429"""
    batching: Literal["auto", "depth", "sequence"] = "auto"
    """auto takes depth where the model allows it; sequence is for comparison"""
    host: str = "127.0.0.1"
    """address to listen on; the default is reached from this machine only"""
    port: int = 8000
    """0 takes a free one"""

    def run(self) -> None:
        """Load, say where it listens on standard output, and serve until SIGINT or SIGTERM."""
        plan = common.planned(self.plan, self.loops)
        if self.max_waiting < 0:
            raise ValueError(f"--max-waiting {self.max_waiting}: 0 or more")
        try:
            from loopwise.decode import server
        except ImportError as error:
            if (error.name or "").startswith("loopwise"):
                raise
            raise ValueError(f'serve needs the package {error.name}: pip install "loopwise[serve]"') from None
        with server.bind(self.host, self.port) as bound:
            service = self._service(plan)
            engine = service.engine
            why = f" ({engine.reason})" if engine.reason else ""
            print(
                f"{engine.mode} batching{why}, {engine.max_requests} slots of {engine.capacity} tokens", file=sys.stderr
            )
            server.run_server(
                service, bound, lambda url: print(f"serving {service.name} on {url}", file=sys.stdout, flush=True)
            )

    def _service(self, plan: Any) -> Any:
        common.quiet_libraries()
        tokenizer = loopwise.load_tokenizer(self.source)
        model = common.load_model(self, plan)
        if plan is None:
            common.set_own_loops(model, self.loops)

        from loopwise.decode.engine import Engine
        from loopwise.decode.server import Service

        engine = Engine(
            model,
            max_requests=self.max_requests,
            capacity=_capacity(model, self.capacity),
            cache=self.cache,
            halting=self.halt,
            max_loops=self.max_loops,
            mode=_MODES[self.batching],
        )
        found = loopwise.plan_of(model)
        return Service(
            engine=engine,
            tokenizer=tokenizer,
            name=Path(self.source).resolve().name,
            stop_ids=stop_ids(model, tokenizer),
            plan=None if found is None else str(found),
            max_waiting=self.max_waiting,
        )


def stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a text, by the tokenizer and by the model's generation config."""
    config = getattr(model, "generation_config", None)
    values = (tokenizer.eos_token_id, getattr(config, "eos_token_id", None))
    found = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return tuple(sorted({item for item in found if isinstance(item, int)}))


def _capacity(model: Any, wanted: int | None) -> int:
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(context, int) or context < 1:
        return wanted if wanted is not None else _DEFAULT_CAPACITY
    if wanted is not None and wanted > context:
        raise ValueError(f"--capacity {wanted}: this model reads at most {context} tokens")
    return wanted if wanted is not None else min(context, _DEFAULT_CAPACITY)
