"""Requests one by one through a model's own `generate`: what an engine does for models that cannot be taken apart."""

from __future__ import annotations

import threading
from collections import Counter, deque
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

from loopwise.decode.request import Event
from loopwise.decode.sampling import Samplers
from loopwise.decode.scheduler import Row
from loopwise.loop.config import Component


class Generated:
    """Requests in order of arrival, one at a time, a token per tick.

    Args:
        model: anything that has `generate`.
    """

    num_rungs = 0

    def __init__(self, model: nn.Module):
        self.model = model.eval()
        self._waiting: deque[Row] = deque()
        self._run: _Run | None = None
        self._counts: Counter[str] = Counter()

    @property
    def has_work(self) -> bool:
        """True while a request waits or runs."""
        return self._run is not None or bool(self._waiting)

    def rule(self, halting: Component | str) -> Component:
        """No rule fits."""
        raise ValueError(f"halting {halting}: this model cannot be taken apart, so that no depth can be left out")

    def submit(self, row: Row) -> None:
        """Take a request in."""
        self._waiting.append(row)

    def cancel(self, request_id: int) -> bool:
        """Take a request out."""
        if self._run is not None and self._run.row.id == request_id:
            self._run.stop()
            self._run = None
            self._counts["cancelled"] += 1
            return True
        for row in self._waiting:
            if row.id == request_id:
                self._waiting.remove(row)
                self._counts["cancelled"] += 1
                return True
        return False

    def tick(self) -> list[Event]:
        """The next token of the request whose turn it is."""
        self._counts["ticks"] += 1
        if self._run is None:
            self._run = _Run(self.model, self._waiting.popleft())
        run, row = self._run, self._run.row
        token = run.next()
        if token is None:
            self._run = None
            self._counts["finished"] += 1
            return [Event(row.id, None, 0, "error")]
        row.tokens.append(token)
        self._counts["tokens"] += 1
        finish = None
        if token in row.request.stop_ids:
            finish = "stop"
        elif len(row.tokens) >= row.request.max_new_tokens:
            finish = "length"
        if finish:
            run.stop()
            self._run = None
            self._counts["finished"] += 1
        return [Event(row.id, token, row.count, finish)]

    def stats(self) -> dict[str, Any]:
        """Counts so far; depth is not known."""
        return {
            "ticks": self._counts["ticks"],
            "tokens": self._counts["tokens"],
            "requests_finished": self._counts["finished"],
            "requests_cancelled": self._counts["cancelled"],
            "executed_row_iterations": 0,
            "useful_row_iterations": 0,
            "slots_in_use": int(self._run is not None),
            "queues": {"waiting": len(self._waiting)},
        }


class _StoppedError(Exception):
    """Ends a generation from inside."""


class _Run:
    """One `generate`, in a thread that runs only while the next token is waited for.

    `generate` cannot be left and entered again, so it has a thread of its own; the two hand a baton to each other and
    never run at the same time.
    """

    def __init__(self, model: nn.Module, row: Row):
        self.row = row
        self._model: Any = model
        self._token: int | None = None
        self._stopped = False
        self._mine, self._its = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._generate, daemon=True)
        self._thread.start()

    def next(self) -> int | None:
        """The next token; None where the model failed."""
        self._token = None
        self._its.release()
        self._mine.acquire()
        return self._token

    def stop(self) -> None:
        """End it."""
        self._stopped = True
        self._its.release()
        self._thread.join()

    def take(self, token: int) -> None:
        """Called by the thread with a new token: hands it over and waits until another is wanted."""
        self._token = token
        self._mine.release()
        self._its.acquire()
        if self._stopped:
            raise _StoppedError

    def _generate(self) -> None:
        self._its.acquire()
        try:
            if not self._stopped:
                self._run_model()
        except _StoppedError:
            return
        except Exception as error:  # of the model: the request ends, the engine does not
            self.error = error
        self._token = None
        self._mine.release()

    def _run_model(self) -> None:
        request = self.row.request
        device = next(self._model.parameters()).device
        ids_BT = torch.tensor([list(request.prompt)], device=device)
        options: dict[str, Any] = {} if request.loops is None else {"loops": request.loops}
        self._model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=request.max_new_tokens + 1,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([_Chooser(self)]),
            **options,
        )


class _Chooser(LogitsProcessor):
    """Chooses as the request says, and leaves `generate` no other choice."""

    def __init__(self, run: _Run):
        self.run = run
        self.samplers = Samplers([run.row.request.sampling], 1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `[1, V]` in which only the chosen token is possible."""
        if not bool(scores.amax().isfinite()):
            raise FloatingPointError("logits are not finite")
        token = int(self.samplers.pick(scores)[0])
        self.run.take(token)
        only = torch.full_like(scores, -torch.inf)
        only[0, token] = 0
        return only
