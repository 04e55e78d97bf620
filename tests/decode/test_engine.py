"""What a request gets from a batching engine is what it gets alone, whoever comes, goes and shares the batch."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from laws import looping_plan
from tiny import tiny_model

import loopwise
from loopwise.decode.adaptive import decode_adaptive
from loopwise.decode.engine import Engine, SequenceEngine
from loopwise.decode.request import Request
from loopwise.decode.sampling import Sampling
from loopwise.loop.passes import LoopModule
from loopwise.loop.update import Chain, Update
from loopwise.models.hub import layer_list
from loopwise.models.relaxation import add_relaxation

GOLDENS = Path(__file__).parents[1] / "goldens"
VOCABULARY = 40  # ids that every model here knows


def looped(model_type="llama", count=3):
    model = tiny_model(model_type)
    return loopwise.attach(model, looping_plan(len(layer_list(model).layers)).replace("x2", f"x{count}"))


def relaxed():
    model = add_relaxation(looped(), 2)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "relaxation" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    return model


MODELS = {
    "llama": looped,
    "gpt2": lambda: looped("gpt2"),
    "gemma3_text": lambda: looped("gemma3_text"),  # sliding windows
    "mixtral": lambda: looped("mixtral"),
    "plain": lambda: tiny_model("llama"),
    "relaxed": relaxed,
    "mamba": lambda: looped("mamba"),
} | {
    name: lambda name=name: loopwise.load(GOLDENS / name)  # a random first state, a gate, an update, told the time
    for name in ("huginn", "ouro", "parcae", "loopformer", "mor_expert", "hrm_text")
}
BEST = {"llama": "depth-wise", "gpt2": "depth-wise", "gemma3_text": "depth-wise", "mixtral": "depth-wise"}
BEST |= {"huginn": "depth-wise", "ouro": "depth-wise", "parcae": "depth-wise"}
BEST |= {"plain": "plain", "relaxed": "plain", "loopformer": "plain"}
BEST |= {"mamba": "generate", "mor_expert": "generate", "hrm_text": "generate"}


def alone(model, request, **options):
    """Tokens, depths and finish of a request by itself."""
    if request.loops is not None:
        options["loops"] = request.loops
    found = decode_adaptive(
        model,
        [request.prompt],
        max_new_tokens=request.max_new_tokens,
        sampling=[request.sampling],
        stop_ids=request.stop_ids,
        seeds=[request.sampling.seed],
        halting=request.halting or "fixed",
        **options,
    )
    return found.tokens[0], found.depths[0], found.finish[0]


def some_request(rng, *, max_loops=None, rules=(None,), longest=14):
    return Request(
        prompt=[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, longest))],
        max_new_tokens=rng.randint(1, 8),
        sampling=Sampling(temperature=1.3 if rng.random() < 0.5 else 0.0, seed=rng.randrange(1000)),
        stop_ids=[rng.randrange(VOCABULARY)] if rng.random() < 0.3 else [],
        loops=rng.randint(1, max_loops) if max_loops and rng.random() < 0.7 else None,
        halting=rng.choice(rules),
    )


class Watched:
    """An engine, and what came out of it by request."""

    def __init__(self, engine):
        self.engine, self.requests, self.found = engine, {}, {}

    def submit(self, request):
        number = self.engine.submit(request)
        assert number not in self.requests
        self.requests[number], self.found[number] = request, ([], [], [])
        return number

    def step(self):
        for event in self.engine.step():
            tokens, depths, finishes = self.found[event.request_id]
            assert not finishes, "an event after the end"
            if event.token is not None:
                tokens.append(event.token)
                depths.append(event.depth)
            if event.finish is not None:
                finishes.append(event.finish)

    def drain(self):
        while self.engine.has_work:
            self.step()
        return self

    def check(self, model, **options):
        """Every request got what it gets alone, or the beginning of that; nothing is held any more."""
        for number, request in self.requests.items():
            tokens, depths, finishes = self.found[number]
            want_tokens, want_depths, want_finish = alone(model, request, **options)
            if finishes == ["cancelled"]:
                want_tokens, want_depths = want_tokens[: len(tokens)], want_depths[: len(tokens)]
            else:
                assert finishes == [want_finish]
            assert (tokens, depths) == (want_tokens, want_depths), request
        stats = self.engine.stats()
        assert stats["slots_in_use"] == 0 and not any(stats["queues"].values())


def live(watched, rng, number, *, cancels=0.2, **kinds):
    """Requests come at random moments, and some are given up at random moments."""
    pending = number
    while pending or watched.engine.has_work:
        if pending and rng.random() < 0.4:
            watched.submit(some_request(rng, **kinds))
            pending -= 1
        going = [number for number, (_, _, finishes) in watched.found.items() if not finishes]
        if going and rng.random() < cancels * 0.2:
            assert watched.engine.cancel(rng.choice(going))
        watched.step()
    return watched


@pytest.mark.parametrize("name", [name for name in MODELS if BEST[name] != "generate"])
def test_requests_that_come_and_go_get_what_they_get_alone(name):
    model = MODELS[name]()
    rng = random.Random(name)
    has_loop = name != "plain"
    most = {"relaxed": 3, "plain": None, "loopformer": 8}.get(name, 6)
    engine = Engine(model, max_requests=3, capacity=24, prefill_chunk=5, max_loops=most)
    assert engine.mode == BEST[name] and bool(engine.reason) == (engine.mode != "depth-wise")
    options = {} if has_loop else {"exits": []}
    live(Watched(engine), rng, 12, max_loops=most).check(model, **options)


@pytest.mark.parametrize("mode", ["depth-wise", "plain", "sequence"])
@pytest.mark.parametrize("name", ["llama", "huginn"])
def test_every_mode_and_any_gathering_gives_the_same(name, mode):
    model, rng = MODELS[name](), random.Random(mode)
    engine = Engine(model, max_requests=4, capacity=24, prefill_chunk=7, max_loops=5, mode=mode, gather=rng.random())
    assert engine.mode == mode
    live(Watched(engine), rng, 12, max_loops=5).check(model)


RULES = [None, "fixed(2)", "latent(0.6)", "kl(0.5)", "confidence(threshold=0.1, decay=4)", "argmax", "cosine(0.1)"]
RULES += ["entropy(0.2)", "second_difference(0.5)"]


@pytest.mark.parametrize("mode", ["depth-wise", "plain", "sequence"])
@pytest.mark.parametrize("policy", ["own", "latest", "propagate", "absent", "monotone", "catch_up"])
def test_each_request_has_its_own_rule(policy, mode):
    model = looped(count=5)
    rng = random.Random(policy + mode)
    engine = Engine(model, max_requests=4, capacity=24, prefill_chunk=6, cache=policy, mode=mode)
    watched = live(Watched(engine), rng, 12, rules=RULES)
    watched.check(model, cache=policy)
    depths = {depth for _, found, _ in watched.found.values() for depth in found}
    assert len(depths) > 1, "rules that never act show nothing"


@pytest.mark.parametrize("mode", ["depth-wise", "sequence"])
def test_rules_that_read_a_gate(mode):
    model = MODELS["ouro"]()
    engine = Engine(model, max_requests=3, capacity=24, mode=mode, halting="hazard(0.6)")
    rng = random.Random(0)
    rules = ["hazard(0.5)", "hazard(0.9)", "ponder", "act", "q"]
    live(Watched(engine), rng, 14, rules=rules).check(model)


@pytest.mark.parametrize("policy", ["last", "first", "ring(2)", "stride(2)"])
def test_stores_that_iterations_share(policy):
    model, rng = looped(count=4), random.Random(policy)
    engine = Engine(model, max_requests=3, capacity=24, prefill_chunk=4, cache=policy, max_loops=4)
    assert engine.mode == "depth-wise"
    live(Watched(engine), rng, 10, max_loops=4, rules=[None, "fixed(1)", "latent(0.6)"]).check(model, cache=policy)


def test_early_exit_from_a_plain_model():
    model = tiny_model("llama")
    engine = Engine(model, max_requests=3, capacity=24, halting="confidence(0.05)", exits=[2, 4])
    watched = Watched(engine)
    rng = random.Random(5)
    requests = [some_request(rng, rules=["confidence(0.05)", "fixed(1)", "fixed"]) for _ in range(8)]
    for request in requests:
        watched.submit(request)
    watched.drain().check(model, exits=[2, 4])


@pytest.mark.parametrize("name", [name for name in MODELS if BEST[name] == "generate"])
def test_what_cannot_be_taken_apart_is_generated_one_by_one(name):
    model, rng = MODELS[name](), random.Random(name)
    engine = Engine(model, max_requests=3, capacity=24)
    assert engine.mode == "generate" and len(engine.reason) > 10
    watched = Watched(engine)
    ids = [watched.submit(some_request(rng)) for _ in range(5)]
    watched.step()
    assert engine.cancel(ids[1]) and not engine.cancel(99)
    watched.step()
    watched.drain()
    for number, request in watched.requests.items():
        tokens, _, finishes = watched.found[number]
        if number == ids[1]:
            assert finishes == ["cancelled"] and not tokens
        elif not request.sampling.temperature:
            ids_BT = torch.tensor([request.prompt])
            options = {"max_new_tokens": len(tokens), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            want = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options)
            assert tokens == want[0, ids_BT.shape[1] :].tolist()
            assert finishes == ["stop" if tokens[-1] in request.stop_ids else "length"]
    assert engine.stats()["slots_in_use"] == 0


def test_a_generation_is_given_up_in_the_middle():
    engine = Engine(looped("mamba"), capacity=24)
    watched = Watched(engine)
    first, second = (watched.submit(Request([1, 2], 9)) for _ in range(2))
    for _ in range(3):
        watched.step()
    assert engine.cancel(first)
    watched.drain()
    assert len(watched.found[first][0]) == 3 and watched.found[first][2] == ["cancelled"]
    assert len(watched.found[second][0]) == 9 and watched.found[second][2] == ["length"]
    assert watched.found[second][0][:3] == watched.found[first][0]


def test_requests_are_admitted_in_order():
    engine = Engine(looped(), max_requests=2, capacity=16)
    watched = Watched(engine)
    ids = [watched.submit(Request([1, 2, 3], 3)) for _ in range(7)]
    begun = []
    while engine.has_work:
        for event in engine.step():
            begun += [event.request_id] if event.request_id not in begun else []
    assert begun == ids


def test_a_cancelled_request_frees_its_slot_at_once():
    engine = Engine(looped(count=4), max_requests=2, capacity=40, prefill_chunk=4)
    watched = Watched(engine)
    first, second, third = (watched.submit(Request([3] * 30, 5)) for _ in range(3))
    watched.step()  # both are in the middle of their prompts
    assert engine.stats()["slots_in_use"] == 2 and engine.stats()["queues"]["waiting"] == 1
    assert engine.cancel(first) and engine.cancel(third) and not engine.cancel(first)
    assert engine.stats()["slots_in_use"] == 1 and engine.stats()["queues"]["waiting"] == 0
    watched.drain()
    assert [watched.found[number][2] for number in (first, second, third)] == [["cancelled"], ["length"], ["cancelled"]]


def test_a_long_prompt_holds_nobody_up():
    engine = Engine(looped(count=3), max_requests=2, capacity=120, prefill_chunk=4)
    watched = Watched(engine)
    short = watched.submit(Request([1, 2], 12))
    for _ in range(4):
        watched.step()
    long = watched.submit(Request([5] * 100, 1))
    while not watched.found[short][2]:
        before = engine.stats()["prompt_executed_iterations"]
        watched.step()
        assert engine.stats()["prompt_executed_iterations"] - before <= 4
    assert not watched.found[long][0]
    watched.drain()


def test_prompts_of_different_loops_climb_together():
    model = looped(count=8)
    requests = [Request([1, 2, 3], 1, loops=loops) for loops in (8, 1, 5, 8)]
    runs = {}
    for mode in ("depth-wise", "plain"):
        engine = Engine(model, max_requests=4, capacity=16, prefill_chunk=12, mode=mode)
        watched = Watched(engine)
        for request in requests[:3]:
            watched.submit(request)
        watched.step()
        watched.submit(requests[3])
        watched.drain().check(model)
        stats = engine.stats()
        assert stats["prompt_executed_iterations"] == stats["prompt_useful_iterations"] == 3 * (8 + 1 + 5 + 8)
        runs[mode] = stats["prompt_runs"]
    assert runs == {"depth-wise": 9, "plain": 16}  # whoever comes later joins, or waits until the others are through


def test_short_prompts_do_not_overtake_a_long_one_for_ever():
    engine = Engine(looped(count=4), max_requests=3, capacity=80, prefill_chunk=8)
    watched = Watched(engine)
    watched.submit(Request([1] * 3, 1))
    watched.step()
    long = watched.submit(Request([2] * 60, 1))
    ticks = 0
    while not watched.found[long][2]:
        watched.submit(Request([1] * 3, 1))  # there is always a younger one whose prompt would fit beside others
        watched.step()
        ticks += 1
        assert ticks <= 4 * (1 + 8), "the parts of a prompt follow each other"


class Slower(Update):
    """Goes on less and less: rows at different iterations, or with different counts, differ."""

    reads_iteration = True

    def forward(self, state_BTD, e_BTD, *, iteration, num_iterations, time=None):
        return state_BTD + e_BTD * (num_iterations / (1 + iteration))

    def leave(self, before_BTD, after_BTD, e_BTD, *, iteration, num_iterations, time=None):
        return before_BTD + (after_BTD - before_BTD) / (1 + iteration)


@pytest.mark.parametrize("chained", [False, True])
def test_an_update_that_reads_the_iteration(chained):
    model = loopwise.load(GOLDENS / "parcae")
    module = next(module for module in model.modules() if isinstance(module, LoopModule))
    module.update = Chain([Slower(), Update()]) if chained else Slower()
    engine = Engine(model, max_requests=3, capacity=24, prefill_chunk=9, max_loops=6)
    assert engine.mode == "depth-wise"
    live(Watched(engine), random.Random(4), 10, max_loops=6).check(model)


def test_slots_keep_nothing_of_earlier_requests():
    model = looped(count=3)
    engine = Engine(model, max_requests=1, capacity=40)
    Watched(engine).submit(Request([7] * 30, 5))
    while engine.has_work:
        engine.step()
    for pair in engine._worker.runner.cache._stores.values():
        for tensor in pair:
            tensor.fill_(1e4)
    watched = Watched(engine)
    watched.submit(Request([1, 2, 3], 6, halting="latent(0.6)"))
    watched.drain().check(model)


def test_numbers_that_are_not_finite_end_one_request_only():
    model = looped(count=3)
    model.get_input_embeddings().weight.data[50] = float("nan")
    engine = Engine(model, max_requests=2, capacity=16)
    watched = Watched(engine)
    good, bad, later = (watched.submit(Request(prompt, 6)) for prompt in ([1, 2, 3], [4, 50], [6, 7, 8, 9]))
    watched.drain()
    assert [watched.found[number][2] for number in (good, bad, later)] == [["length"], ["error"], ["length"]]
    for number in (good, later):
        assert watched.found[number][0] == alone(model, watched.requests[number])[0]


def test_what_is_not_finite_leaves_with_a_cancelled_request():
    model = looped(count=3)
    model.get_input_embeddings().weight.data[50] = float("nan")
    engine = Engine(model, max_requests=1, capacity=40, prefill_chunk=4)
    watched = Watched(engine)
    bad = watched.submit(Request([50] * 30, 4))
    for _ in range(9):
        watched.step()
    assert engine.cancel(bad)
    good = watched.submit(Request([1, 2, 3], 6))
    watched.drain()
    assert watched.found[good][0] == alone(model, watched.requests[good])[0]


def test_work_is_counted():
    model, depths = looped(count=6), [1, 2, 3, 6]
    found = {}
    for kind in (Engine, SequenceEngine):
        engine = kind(model, max_requests=4, capacity=16)
        watched = Watched(engine)
        for depth in depths:
            watched.submit(Request([1, 2], 5, halting=f"fixed({depth})"))
        watched.drain().check(model)
        found[engine.mode] = engine.stats()
    useful = sum(depths) * 4  # the first token comes from the prompt
    assert found["depth-wise"]["useful_row_iterations"] == found["sequence"]["useful_row_iterations"] == useful
    assert found["depth-wise"]["executed_row_iterations"] == useful
    assert found["sequence"]["executed_row_iterations"] == 6 * 4 * 4  # as deep as the deepest of four rows
    for stats in found.values():
        assert stats["tokens"] == 20 and stats["mean_depth"] == 3
        assert stats["prompt_executed_iterations"] == stats["prompt_useful_iterations"] == 6 * 2 * 4
    assert found["sequence"]["mean_max_depth"] == 6 and found["sequence"]["bound"] == 2


def test_depth_is_not_waited_for():
    model = looped(count=8)
    ticks = {}
    for gather in (0.0, 1.0):
        engine = Engine(model, max_requests=2, capacity=64, gather=gather)
        watched = Watched(engine)
        deep = watched.submit(Request([1, 2], 7, loops=8))
        watched.submit(Request([1, 2], 50, loops=1))
        while not watched.found[deep][2]:
            watched.step()
        ticks[gather] = len(watched.found[deep + 1][0])
        watched.drain()
    assert ticks[0.0] > 3 * ticks[1.0]


BAD = {
    "max_requests 0": lambda model: Engine(model, max_requests=0),
    "capacity 0": lambda model: Engine(model, capacity=0),
    "prefill_chunk 0": lambda model: Engine(model, prefill_chunk=0),
    "gather 2": lambda model: Engine(model, gather=2),
    "mode 'fast'": lambda model: Engine(model, mode="fast"),
    "max_loops 2 is below": lambda model: Engine(model, max_loops=2),
    "loops 0": lambda model: Engine(model, loops=0),
    "own/last changes after the prompt": lambda model: Engine(model, cache="own/last"),
    "driven by an exit gate": lambda model: Engine(model, halting="hazard(0.5)"),
    "'nonsense' is unknown": lambda model: Engine(model, halting="nonsense"),
    "has no loop": lambda model: Engine(loopwise.attach(tiny_model("llama"), "0-5"), loops=2),
    "does not write text": lambda model: Engine(loopwise.load(GOLDENS / "albert")),
    "mode 'depth-wise' is not for this": lambda model: Engine(tiny_model("llama"), mode="depth-wise"),
    "mode 'plain' is not for this": lambda model: Engine(looped("mamba"), mode="plain"),
    "has no position": lambda model: Engine(looped("gpt2"), capacity=10**6),
    "prompt has no tokens": lambda model: Request([], 4),
    "max_new_tokens 0": lambda model: Request([1], 0),
    "loops 0: ": lambda model: Request([1], 1, loops=0),
    "at most 3": lambda model: Engine(model).submit(Request([1], 1, loops=10**6)),
    "context limit of 8": lambda model: Engine(model, capacity=8).submit(Request([1] * 8, 1)),
    "ids from 0 to 98": lambda model: Engine(model).submit(Request([99], 1)),
    "no depth can be left out": lambda model: Engine(looped("mamba")).submit(Request([1], 1, halting="kl")),
    "one rung": lambda model: Engine(tiny_model("llama")).submit(Request([1], 1, halting="kl")),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_in_one_line(message):
    with pytest.raises(ValueError) as caught:
        BAD[message](looped())
    assert message in str(caught.value) and "\n" not in str(caught.value)
