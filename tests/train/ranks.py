"""Run a function on several processes that talk over loopback (gloo), and hand back what each returned."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PRELOAD = ["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "loopwise.train.parallel", "peft"]
_TIMEOUT = 120.0


def on_ranks(function: Callable[..., Any], *args: Any, num_ranks: int = 2) -> list[Any]:
    """What `function(rank, *args)` returned on every rank, in order.

    The function is one of a module (it goes by its name); arguments and results are pickled. An error on any rank is
    raised here, with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)  # imported once; every rank is then a cheap fork of that process
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(num_ranks)]
        call = pickle.dumps((function, args))
        ranks = [
            context.Process(target=_run, args=(rank, num_ranks, folder, call, send), daemon=True)
            for rank, (_, send) in enumerate(pipes)
        ]
        for rank in ranks:
            rank.start()
        for _, send in pipes:
            send.close()
        answers = [_receive(receive) for receive, _ in pipes]
        for rank in ranks:
            rank.join(1)
            rank.kill()
    errors = [text for text, _ in answers if text is not None]
    if errors:
        raise AssertionError("\n".join(errors))
    return [value for _, value in answers]


def _receive(pipe: Any) -> tuple[str | None, Any]:
    if not pipe.poll(_TIMEOUT):
        return f"a rank did not answer within {_TIMEOUT:.0f} s", None
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return "a rank ended without an answer", None


def _run(rank: int, num_ranks: int, folder: str, call: bytes, pipe: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        function, args = pickle.loads(call)
        dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'store'}", rank=rank, world_size=num_ranks)
        answer = None, function(rank, *args)
        dist.barrier()  # a rank that leaves before another has connected takes the store away from it
        dist.destroy_process_group()
    except Exception:
        answer = f"rank {rank}: {traceback.format_exc()}", None
    pipe.send_bytes(pickle.dumps(answer))
