"""What an edit on disk costs: `loopwise edit` beside mergekit's passthrough merge, the same bytes from both.

The checkpoint has the shape of TinyLlama (1.1 B parameters, bfloat16, random bytes, four files of 2.2 GB in all);
layers [0, 16) and [6, 22) make 32 (3.1 GB). Ours is the whole command: start of Python, hashing of headers, copying,
flushing to the disk, renaming. mergekit's time is that of `run_merge` alone, without its imports, which is the better
for it; it does not flush. It has 200 MB files, no model card and no tokenizer to copy, and the faster of writing in
front or behind.

mergekit pins libraries of its own, so it has an environment of its own, for example
`python -m venv mk && mk/bin/pip install torch==2.13.0 && mk/bin/pip install mergekit==0.1.5`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from _timing import exact_entry, finish, interleaved_pairs, median_ratio, parser

from loopwise.io.tensors import INDEX, Tensor, header_bytes, read_checkpoint

ORDER = [*range(16), *range(6, 22)]
MAX_RATIO = 0.5
MAX_MB = 64
SHAPE = {"layers": 22, "hidden": 2048, "mlp": 5632, "vocab": 32000, "keys": 256}
RUN_MERGE = """
import json, sys, time
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
config = MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1])))
options = MergeOptions(**json.loads(sys.argv[3]))
start = time.perf_counter()
run_merge(config, sys.argv[2], options)
print(json.dumps(time.perf_counter() - start))
"""
# What this process has held at most counts as held by those that it starts: it stays small.
_PIECE = 1 << 20
OPTIONS = {"out_shard_size": 200_000_000, "copy_tokenizer": False, "write_model_card": False, "quiet": True}


def tensors_of_llama() -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes."""
    wide, mlp, keys = SHAPE["hidden"], SHAPE["mlp"], SHAPE["keys"]
    layer = {
        "input_layernorm": (wide,),
        "mlp.down_proj": (wide, mlp),
        "mlp.gate_proj": (mlp, wide),
        "mlp.up_proj": (mlp, wide),
        "post_attention_layernorm": (wide,),
        "self_attn.k_proj": (keys, wide),
        "self_attn.o_proj": (wide, wide),
        "self_attn.q_proj": (wide, wide),
        "self_attn.v_proj": (keys, wide),
    }
    inside = [
        (f"model.layers.{n}.{name}.weight", shape) for n in range(SHAPE["layers"]) for name, shape in layer.items()
    ]
    outside = [("model.norm.weight", (wide,)), ("lm_head.weight", (SHAPE["vocab"], wide))]
    return [("model.embed_tokens.weight", (SHAPE["vocab"], wide)), *inside, *outside]


def write_checkpoint(folder: Path, num_files: int = 4) -> None:
    """A checkpoint of random bytes, without torch: a process that is measured shows the memory of its parent."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": SHAPE["hidden"],
        "intermediate_size": SHAPE["mlp"],
        "num_hidden_layers": SHAPE["layers"],
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": SHAPE["vocab"],
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    sizes = {name: 2 * shape[0] * (shape[1] if len(shape) > 1 else 1) for name, shape in tensors_of_llama()}
    limit = -(-sum(sizes.values()) // num_files)
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    for name, shape in tensors_of_llama():
        if sum(sizes[item] for item, _ in groups[-1]) >= limit:
            groups.append([])
        groups[-1].append((name, shape))
    where = {}
    for number, group in enumerate(groups, start=1):
        file, position, tensors = f"model-{number:05d}-of-{len(groups):05d}.safetensors", 0, []
        for name, shape in group:
            stop = position + sizes[name]
            tensors.append((name, Tensor(file=file, dtype="BF16", shape=shape, start=position, stop=stop)))
            position, where[name] = stop, file
        with open(folder / file, "wb") as out:
            out.write(header_bytes(tensors, {"format": "pt"}))
            for start in range(0, position, _PIECE):
                out.write(os.urandom(min(_PIECE, position - start)))
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def run(command: Sequence[str], environment: dict[str, str]) -> tuple[float, float, str]:
    """(seconds, peak resident MB, standard output) of a whole process."""
    start = perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
    assert process.stdout is not None and process.stderr is not None
    out, error = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed: {error.strip().splitlines()[-1] if error.strip() else status}")
    return seconds, usage.ru_maxrss * 1024 / 1e6, out


def same_tensors(ours: Path, theirs: Path) -> int:
    """Number of tensors that both folders have, bit for bit; SystemExit where they differ."""
    first, second = read_checkpoint(ours), read_checkpoint(theirs)
    if first.tensors.keys() != second.tensors.keys():
        raise SystemExit("the two folders have different tensors")
    for name in first.tensors:
        if digest(first.folder, first.tensors[name]) != digest(second.folder, second.tensors[name]):
            raise SystemExit(f"tensor {name} differs")
    return len(first.tensors)


def digest(folder: Path, tensor: Tensor) -> str:
    """Of type, shape and bytes."""
    found = hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode())
    with open(folder / tensor.file, "rb") as file:
        file.seek(tensor.start)
        left = tensor.num_bytes
        while left:
            piece = file.read(min(left, _PIECE))
            found.update(piece)
            left -= len(piece)
    return found.hexdigest()


class Sides:
    """Both ways of doing the same edit, each into a folder that is removed before the next time."""

    def __init__(self, folder: Path, mergekit: Path):
        self.source, self.ours, self.theirs = folder / "source", folder / "ours", folder / "theirs"
        self.mergekit, self.recipe, self.options = mergekit, folder / "merge.yml", dict(OPTIONS)
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self.megabytes: dict[str, list[float]] = {"ours": [], "theirs": []}
        self.whole: list[float] = []
        slices = [f"  - sources:\n      - {{model: {self.source}, layer_range: {span}}}" for span in ([0, 16], [6, 22])]
        lines = ["slices:", *slices, "merge_method: passthrough", "dtype: bfloat16", ""]
        self.recipe.write_text("\n".join(lines), encoding="utf-8")

    def run_ours(self) -> float:
        """Seconds of the whole command."""
        self._clean(self.ours)
        operator = f"order({ORDER})"
        command = [sys.executable, "-m", "loopwise", "edit", str(self.source), str(self.ours), "--op", operator]
        seconds, megabytes, _ = run(command, self.environment)
        self.megabytes["ours"].append(megabytes)
        return seconds

    def run_theirs(self) -> float:
        """Seconds of `run_merge` inside a process whose imports are done."""
        self._clean(self.theirs)
        arguments = [str(self.recipe), str(self.theirs), json.dumps(self.options)]
        whole, megabytes, out = run([str(self.mergekit), "-c", RUN_MERGE, *arguments], self.environment)
        self.megabytes["theirs"].append(megabytes)
        self.whole.append(whole)
        return float(out.splitlines()[-1])

    def choose(self, tries: int = 2) -> None:
        """Keep the faster of mergekit's two ways to write."""
        found = {}
        for behind in (False, True):
            self.options = {**OPTIONS, "async_write": behind}
            found[behind] = min(self.run_theirs() for _ in range(tries))
            print(f"mergekit, async_write={behind}: {found[behind]:.2f} s", flush=True)
        self.options = {**OPTIONS, "async_write": found[True] < found[False]}

    def _clean(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()  # what the other side has not flushed is not to slow this one down


def most(name: str, values: Sequence[float], target: float) -> dict[str, Any]:
    """A result: the largest value; it holds when that is at most the target. The interval is what was seen."""
    ends = [round(min(values), 1), round(max(values), 1)]
    return {"name": name, "value": ends[1], "ci95": ends, "target": target, "holds": ends[1] <= target}


def main() -> int:
    options = parser((__doc__ or "").splitlines()[0], "edit")
    options.add_argument("--mergekit", type=Path, required=True, help="python of an environment with mergekit 0.1.5")
    options.add_argument("--folder", type=Path, help="where 9 GB have room; default a temporary folder")
    options.set_defaults(pairs=20)
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="edit-", dir=given.folder) as temporary:
        folder = Path(temporary)
        write_checkpoint(folder / "source")
        sides = Sides(folder, given.mergekit.absolute())
        sides.choose()
        sides.run_ours()
        count = same_tensors(sides.ours, sides.theirs)
        print(f"{count} tensors are bit-identical", flush=True)
        for values in (sides.megabytes["ours"], sides.megabytes["theirs"], sides.whole):
            values.clear()
        times = interleaved_pairs(sides.run_ours, sides.run_theirs, pairs=given.pairs, warmup=0)
    ours, theirs = (statistics.median(side) for side in zip(*times, strict=True))
    whole = statistics.median(sides.whole)
    ratio, interval = median_ratio(times)
    shared = {
        "seconds": {
            "ours": round(ours, 3),
            "mergekit run_merge": round(theirs, 3),
            "mergekit process": round(whole, 3),
        },
        "pairs": len(times),
        "identical_tensors": count,
        "mergekit": {"version": "0.1.5", "options": sides.options},
    }
    low, high = interval
    name = "22 -> 32 layers, 3.1 GB: whole command over run_merge"
    rounded = {"ratio": round(ratio, 4), "ci95": [round(low, 4), round(high, 4)]}
    entries = [
        {"name": name, **rounded, "target": MAX_RATIO, "holds": high <= MAX_RATIO, **shared},
        most("peak resident MB", sides.megabytes["ours"], MAX_MB),
        exact_entry("bit-identical tensors", count, target=len(ORDER) * 9 + 3),
    ]
    print(f"ours {ours:.2f} s, mergekit {theirs:.2f} s ({whole:.2f} s with imports), medians of {len(times)} pairs")
    print(f"peak resident MB of mergekit: {max(sides.megabytes['theirs']):.0f}")
    entries[1]["mergekit_mb"] = round(max(sides.megabytes["theirs"]), 1)
    return finish(entries, given.out, f"python benchmarks/edit.py --pairs {len(times)} --mergekit mk/bin/python")


if __name__ == "__main__":
    sys.exit(main())
