"""What depth-wise batching gains: `loopwise serve` under one load beside itself with sequence-level batching.

A small random looped model (1 layer, 4 that loop up to 8 times, 1 layer, width 64) is saved into a temporary folder and
served on loopback by two processes: the engine, and the same engine with sequence-level batching with compaction (all
rows of a batch as deep as the deepest, finished sequences replaced between tokens). This process is the client. Every
request has a prompt, a seed, a number of iterations (uniform from 1 to 8) and a length of its own, and its answer is
compared with what `decode_sequential` gives for it without a server.

* Saturated: blocks of requests with Poisson arrivals at twice the rate that a server can take, both servers in turn.
* 70 %: Poisson arrivals at 0.7 of the depth-wise server's saturated rate; latency counts from the planned arrival.
* Leaving: every fifth client closes its stream after the first text; afterwards no slot may be in use.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import torch
from _timing import exact_entry, finish, median_ratio, parser
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import loopwise
from loopwise.decode.sampling import Sampling
from loopwise.decode.sequential import decode_sequential
from loopwise.models.blocks import BlockConfig
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.mixers import AttentionConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.rotary import RotaryConfig

LOOPS = 8
WIDTH = 64
SLOTS = 16
CAPACITY = 96
TOKENS = (12, 36)
PROMPT_CHARACTERS = (4, 24)
EOS = 0
MIN_USEFUL = 0.85
LOAD = 0.7
LEAVING = 5
ROUNDS = 5
PREFIX = "loopwise_"


@dataclass(kw_only=True)
class Job:
    """A request and the answer that it must get."""

    prompt: str
    loops: int
    seed: int
    max_tokens: int
    stream: bool
    text: str = ""
    finish: str = ""

    @property
    def body(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "loops": self.loops,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "stream": self.stream,
        }


@dataclass(kw_only=True)
class Block:
    """What came out of some requests."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    lost: int = 0
    wrong: int = 0
    left: int = 0
    counters: dict[str, float] = field(default_factory=dict)

    def add(self, other: Block) -> None:
        """Take in the answers of another; its counters are its own."""
        self.latencies += other.latencies
        self.lost, self.wrong = self.lost + other.lost, self.wrong + other.wrong

    @property
    def useful(self) -> float:
        """Useful over executed row-iterations, those of prompts included."""
        return self._sum("useful") / self._sum("executed")

    def _sum(self, kind: str) -> float:
        return self.counters[f"row_iterations_{kind}_total"] + self.counters[f"prompt_iterations_{kind}_total"]


def tokenizer_of_characters() -> Any:
    """A token for every printable ASCII character."""
    letters = ["Ġ", *map(chr, range(33, 127))]
    raw = Tokenizer(models.BPE({"<eos>": EOS} | {letter: index for index, letter in enumerate(letters, 1)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")


def looped_model(vocabulary: int) -> Any:
    """Random weights, large enough that an answer depends on its prompt and its iterations."""
    block = BlockConfig(
        hidden_size=WIDTH,
        mixer=AttentionConfig(num_heads=4, rope=RotaryConfig(dim=WIDTH // 4)),
        mlp=MLPConfig(intermediate_size=2 * WIDTH),
        placement="pre",
    )
    config = LoopwiseDecoderConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        num_hidden_layers=6,
        blocks=[block.to_dict()],
        plan=f"0 core:(1-4)x{LOOPS} 5",
        loops={"core": {"update": {"kind": "update.add"}}},
        norm={},
        initializer_range=0.2,
        max_position_embeddings=CAPACITY,
        eos_token_id=EOS,
    )
    torch.manual_seed(0)
    return LoopwiseForCausalLM(config).eval()


def make_jobs(count: int, tokenizer: Any) -> list[Job]:
    """Distinct prompts; every fourth answer is streamed."""
    draw = random.Random(0)
    letters = "".join(map(chr, range(32, 127)))
    jobs = []
    for number in range(count):
        prompt = f"{number} " + "".join(draw.choices(letters, k=draw.randint(*PROMPT_CHARACTERS)))
        settings = {"loops": draw.randint(1, LOOPS), "seed": draw.getrandbits(62), "max_tokens": draw.randint(*TOKENS)}
        jobs.append(Job(prompt=prompt, stream=number % 4 == 0, **settings))
    assert all(tokenizer.decode(tokenizer(job.prompt)["input_ids"]) == job.prompt for job in jobs[:50])
    return jobs


def fill_in_answers(jobs: Sequence[Job], model: Any, tokenizer: Any) -> None:
    """What each job must get, from decoding without a server."""
    for loops in range(1, LOOPS + 1):
        mine = [job for job in jobs if job.loops == loops]
        for start in range(0, len(mine), 64):
            part = mine[start : start + 64]
            found = decode_sequential(
                model,
                [tokenizer(job.prompt)["input_ids"] for job in part],
                max_new_tokens=max(job.max_tokens for job in part),
                sampling=[Sampling(temperature=1.0, seed=job.seed) for job in part],
                stop_ids=(EOS,),
                loops=loops,
            )
            for job, tokens in zip(part, found.tokens, strict=True):
                tokens = tokens[: job.max_tokens]
                job.text = tokenizer.decode(tokens, skip_special_tokens=True)
                job.finish = "stop" if tokens[-1] == EOS else "length"


class Served:
    """A server in a process of its own, and its client."""

    def __init__(self, url: str):
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
        self.client = httpx2.AsyncClient(base_url=url, timeout=120, limits=limits)

    async def metrics(self) -> dict[str, float]:
        """All counters without labels."""
        lines = (await self.client.get("/metrics")).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line.startswith(PREFIX) and "{" not in line)
        return {name.removeprefix(PREFIX): float(value) for name, value in pairs}

    async def slots_left(self, seconds: float = 20) -> int:
        """Slots in use once the server is idle, or at the latest after some seconds."""
        end = time.monotonic() + seconds
        while True:
            used = int((await self.metrics())["slots_in_use"])
            if used == 0 or time.monotonic() > end:
                return used
            await asyncio.sleep(0.05)

    async def run(self, jobs: Sequence[Job], rate: float, seed: int, leaving: int = 0) -> Block:
        """Send jobs at the times of a Poisson process; every so many-th leaves, if `leaving` is given."""
        draw, block, before = random.Random(seed), Block(), await self.metrics()
        start, planned = time.perf_counter(), 0.0
        tasks = []
        for number, job in enumerate(jobs):
            planned += draw.expovariate(rate)
            leaves = bool(leaving) and number % leaving == 0
            tasks.append(asyncio.create_task(self._one(job, start + planned, block, leaves)))
        await asyncio.gather(*tasks)
        block.seconds = time.perf_counter() - start
        after = await self.metrics()
        block.counters = {name: after[name] - before.get(name, 0.0) for name in after}
        return block

    async def _one(self, job: Job, at: float, block: Block, leaves: bool) -> None:
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        try:
            if leaves:
                await self._leave(job)
                block.left += 1
                return
            found = await (self._streamed(job) if job.stream else self._whole(job))
        except (httpx2.HTTPError, KeyError, ValueError, IndexError) as error:
            print(f"lost: {error!r}", file=sys.stderr)
            block.lost += 1
            return
        block.latencies.append(time.perf_counter() - at)
        if found != (job.text, job.finish):
            print(f"wrong: {found} in the place of {(job.text, job.finish)}", file=sys.stderr)
            block.wrong += 1

    async def _whole(self, job: Job) -> tuple[str, str]:
        answer = await self.client.post("/v1/completions", json=job.body)
        choice = answer.raise_for_status().json()["choices"][0]
        return choice["text"], choice["finish_reason"]

    async def _streamed(self, job: Job) -> tuple[str, str]:
        text, reason, done = "", "", False
        async with self.client.stream("POST", "/v1/completions", json=job.body) as answer:
            async for line in answer.raise_for_status().aiter_lines():
                done = done or line == "data: [DONE]"
                if line.startswith("data: {"):
                    choice = httpx2.Response(200, content=line[6:]).json()["choices"][0]
                    text, reason = text + choice["text"], choice["finish_reason"]
        if not done:
            raise ValueError("the stream has no end")
        return text, reason

    async def _leave(self, job: Job) -> None:
        body = {**job.body, "stream": True, "max_tokens": CAPACITY - PROMPT_CHARACTERS[1] - 8}
        async with self.client.stream("POST", "/v1/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                return


@contextmanager
def server(folder: Path, batching: str) -> Iterator[str]:
    """Start `loopwise serve`; gives its address."""
    command = [sys.executable, "-m", "loopwise", "serve", str(folder), "--batching", batching, "--port", "0"]
    command += ["--max-requests", str(SLOTS), "--capacity", str(CAPACITY), "--max-waiting", "100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "http://" not in line:
            raise SystemExit(f"the server did not start: {line}")
        yield line.split()[-1]
    finally:
        process.terminate()
        process.wait(30)


async def saturated(
    depth: Served, sequence: Served, jobs: Sequence[Job], pairs: int
) -> tuple[list[tuple[Block, Block]], float]:
    """Blocks of both servers in turn, and the depth-wise server's rate in requests per second."""
    size = len(jobs) // pairs
    first = jobs[:size]
    warm = [await side.run(first, 1e6, seed=0) for side in (depth, sequence)]
    rate = 2 * size / min(block.seconds for block in warm)
    blocks = []
    for index in range(pairs):
        part = jobs[index * size : (index + 1) * size]
        if index % 2:
            second = await sequence.run(part, rate, seed=index)
            blocks.append((await depth.run(part, rate, seed=index), second))
        else:
            one = await depth.run(part, rate, seed=index)
            blocks.append((one, await sequence.run(part, rate, seed=index)))
        print(f"pair {index + 1} of {pairs}: {blocks[-1][0].seconds:.2f} s, {blocks[-1][1].seconds:.2f} s", flush=True)
    return blocks, size / statistics.median(block.seconds for block, _ in blocks)


def resampled(
    values: Sequence[Any], statistic: Callable[[Sequence[Any]], float], resamples: int = 1000
) -> tuple[float, list[float]]:
    """A statistic and its 95 % bootstrap interval."""
    draw = random.Random(0)
    found = sorted(statistic(draw.choices(values, k=len(values))) for _ in range(resamples))
    ends = [found[int(0.025 * resamples)], found[int(0.975 * resamples)]]
    return round(statistic(values), 4), [round(end, 4) for end in ends]


def entry(
    name: str, values: Sequence[Any], statistic: Callable[[Sequence[Any]], float], least: float | None = None
) -> dict[str, Any]:
    """A result; without a target it is a number that is reported."""
    value, ci95 = resampled(values, statistic)
    return {"name": name, "value": value, "ci95": ci95, "target": least, "holds": least is None or ci95[0] >= least}


def quantile(share: float) -> Callable[[Sequence[float]], float]:
    """The value below which so large a share lies."""
    return lambda values: sorted(values)[min(len(values) - 1, int(share * len(values)))]


def mean_of(name: str, over: str, scale: float = 1.0) -> Callable[[Sequence[Block]], float]:
    """One counter over another, summed over blocks."""
    return lambda blocks: (
        sum(block.counters[name] for block in blocks) / sum(block.counters[over] for block in blocks) / scale
    )


def throughput_entries(blocks: Sequence[tuple[Block, Block]]) -> list[dict[str, Any]]:
    """What the two servers did under the saturating load."""
    ratio, interval = median_ratio([(first.seconds, second.seconds) for first, second in blocks])
    entries: list[dict[str, Any]] = [
        {
            "name": "serve: seconds, depth-wise over sequence-level",
            "ratio": round(ratio, 4),
            "ci95": [round(end, 4) for end in interval],
            "target": 1.0,
            "holds": interval[1] <= 1.0,
        }
    ]
    executed = "row_iterations_executed_total"
    for side, name in enumerate(("depth-wise", "sequence-level")):
        mine, least = [pair[side] for pair in blocks], None if side else MIN_USEFUL
        entries += [
            entry(f"serve: useful / executed, {name}", mine, lambda b: statistics.fmean(x.useful for x in b), least),
            entry(f"serve: rows per run over slots, {name}", mine, mean_of(executed, "core_runs_total", SLOTS)),
            entry(
                f"serve: tokens/s, {name}",
                mine,
                lambda b: sum(x.counters["engine_tokens_total"] for x in b) / sum(x.seconds for x in b),
            ),
        ]
    return entries


async def measure(depth: Served, sequence: Served, jobs: Sequence[Job], pairs: int) -> list[dict[str, Any]]:
    """All of it."""
    blocks, rate = await saturated(depth, sequence, jobs, pairs)
    entries = throughput_entries(blocks)
    names = ("depth-wise", "sequence-level")
    calm = [Block(), Block()]
    size = max(len(jobs) // 4 // ROUNDS, 1)
    for index in range(ROUNDS):  # in turn, so that a busy moment of the machine hits both
        part = jobs[index * size : (index + 1) * size]
        for total, side in zip(calm, (depth, sequence), strict=True):
            total.add(await side.run(part, LOAD * rate, seed=-1 - index))
    for name, total in zip(names, calm, strict=True):
        for share in (0.5, 0.99):
            label = f"serve: p{round(100 * share)} seconds at {LOAD:.0%} of the depth-wise rate, {name}"
            load = {"requests": len(total.latencies), "requests_per_second": round(LOAD * rate, 2)}
            entries.append(entry(label, total.latencies, quantile(share)) | load)
    crowd = jobs[: max(len(jobs) // 10, LEAVING)]
    leaving = await depth.run(crowd, 2 * rate, seed=-100, leaving=LEAVING)
    answered = [*(pair[0] for pair in blocks), calm[0], leaving]
    count = sum(len(block.latencies) + block.lost for block in answered)
    others = [*(pair[1] for pair in blocks), calm[1]]
    return [
        *entries,
        exact_entry(f"serve: lost of {count}", sum(block.lost for block in answered), target=0),
        exact_entry(f"serve: wrong of {count}", sum(block.wrong for block in answered), target=0),
        exact_entry("serve: lost or wrong, sequence-level", sum(b.lost + b.wrong for b in others), target=0),
        exact_entry(f"serve: clients that left of {len(crowd)}", leaving.left, target=-(-len(crowd) // LEAVING)),
        exact_entry("serve: slots in use after they left", await depth.slots_left(), target=0),
    ]


def main() -> int:
    options = parser((__doc__ or "").splitlines()[0], "serve")
    options.add_argument("--requests", type=int, default=2000, help="requests under the saturating load")
    options.set_defaults(pairs=20)
    given = options.parse_args()
    if given.requests < given.pairs:
        options.error(f"--requests {given.requests}: at least one for each of {given.pairs} pairs")
    torch.set_num_threads(1)
    tokenizer = tokenizer_of_characters()
    model = looped_model(len(tokenizer))
    jobs = make_jobs(given.requests, tokenizer)
    fill_in_answers(jobs, model, tokenizer)
    print(f"{len(jobs)} requests, {len({job.text for job in jobs})} different answers", flush=True)

    async def both(addresses: Sequence[str]) -> list[dict[str, Any]]:
        depth, sequence = map(Served, addresses)
        async with depth.client, sequence.client:
            return await measure(depth, sequence, jobs, given.pairs)

    with tempfile.TemporaryDirectory(prefix="serve-") as temporary:
        folder = Path(temporary) / "model"
        loopwise.save(model, folder)
        tokenizer.save_pretrained(folder)
        with server(folder, "depth") as first, server(folder, "sequence") as second:
            entries = asyncio.run(both((first, second)))
    return finish(entries, given.out, f"python benchmarks/serve.py --pairs {given.pairs} --requests {given.requests}")


if __name__ == "__main__":
    sys.exit(main())
