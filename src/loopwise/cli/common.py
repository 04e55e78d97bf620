"""What several verbs share: arguments, loading a model, reading texts, writing results."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

import loopwise
from loopwise.io.amounts import amount as amount

if TYPE_CHECKING:
    from rich.console import Console

    from loopwise.plan import Plan

PlanText = Annotated[str | None, arg(metavar="PLAN")]
LoopsText = Annotated[str | None, arg(metavar="COUNTS")]
ExitsText = Annotated[str | None, arg(metavar="VISITS")]
FilePath = Annotated[Path | None, arg(metavar="FILE")]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which model to load, and how."""

    source: Positional[str]
    """a transformers folder, a GGUF file, or a name on a reachable hub"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """number type of the weights; auto keeps what the source says"""
    device: str = "auto"
    """where to run: auto (a GPU when there is one), cpu, cuda, cuda:1, mps"""
    allow_untied: FlagCreatePairsOff[bool] = False
    """load a checkpoint whose recursions should share tensors and do not, as separate layers"""


def load_model(source: Source, plan: str | Plan | None = None) -> Any:
    """Load the model that `source` names, attached to `plan` if one is given, in evaluation mode on its device.

    Raises:
        ValueError: the source is not a model, the plan does not fit it, or the device does not exist.
    """
    quiet_libraries()
    import torch

    device = pick_device(source.device)
    dtype = None if source.dtype == "auto" else getattr(torch, source.dtype)
    with notes():
        model = loopwise.load(source.source, plan=plan, dtype=dtype, allow_untied=source.allow_untied)
    return model.to(device).eval()


@contextmanager
def notes() -> Iterator[None]:
    """Print warnings of loopwise as notes on standard error."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        if "loopwise" in Path(warning.filename).parts:
            print(f"note: {warning.message}", file=sys.stderr)
        else:
            warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)


def pick_device(name: str) -> Any:
    """The torch device that `name` means; ValueError when this machine does not have it."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"--device {name}: this machine or this build of torch has no such device, use cpu") from None
    return device


def quiet_libraries() -> None:
    """Keep advice and progress bars of libraries out of the command's output; errors still show."""
    import warnings

    if not sys.stderr.isatty():
        # Read when tqdm is first imported, and the only switch for the bar of the GGUF reader.
        os.environ.setdefault("TQDM_DISABLE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(transformers|torch)\..*")


def parse_loops(text: str | None) -> int | dict[str, int] | None:
    """Read loop counts: `4` is 4, `core=4` or `outer=2,inner=3` is a dict, None stays None.

    Raises:
        ValueError: anything else; counts below 1 included.
    """
    if text is None:
        return None
    counts: dict[str, int] = {}
    for item in text.split(","):
        name, equals, count = (part.strip() for part in item.rpartition("="))
        if not (count.isascii() and count.isdigit() and 0 < int(count[:9]) and len(count) < 9) or bool(equals) != bool(
            name
        ):
            raise ValueError(f"--loops {text!r}: write a count from 1 such as 4, or names with counts such as core=4")
        if name in counts:
            raise ValueError(f"--loops {text!r}: {name or 'the count'} is given twice")
        counts[name] = int(count)
    if "" not in counts:
        return counts
    if len(counts) > 1:
        raise ValueError(f"--loops {text!r}: give one count, or a name with every count")
    return counts[""]


def parse_exits(text: str | None) -> list[int] | None:
    """Read numbers of visits such as `10,20`; None stays None.

    Raises:
        ValueError: anything else; numbers that do not ascend included.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 9 for part in parts):
        raise ValueError(f"--exits {text!r}: write numbers of visits such as 10,20")
    exits = [int(part) for part in parts]
    if exits != sorted(set(exits)) or exits[0] < 1:
        raise ValueError(f"--exits {text!r}: ascending numbers from 1 are needed")
    return exits


def planned(plan: str | Plan | None, loops: str | None) -> Plan | None:
    """The plan with its loop counts set, read before any model is loaded so that a typo costs no time.

    Raises:
        ValueError: the plan cannot be read or has no such loop (`PlanError`); or `loops` without a plan, which
            only a model that carries its own plan can take: then the caller passes `loops` to `set_loops`.
    """
    from loopwise.plan import Plan

    if plan is None:
        return None
    parsed = Plan.parse(plan) if isinstance(plan, str) else plan
    counts = parse_loops(loops)
    return parsed if counts is None else parsed.with_loops(counts)


def set_own_loops(model: Any, loops: str | None) -> None:
    """Set the loop counts of the plan that a loaded model carries; ValueError when it carries none."""
    counts = parse_loops(loops)
    if counts is None:
        return
    if loopwise.plan_of(model) is None:
        raise ValueError(f"--loops {loops}: the model has no plan, give one with --plan")
    loopwise.set_loops(model, counts)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; ValueError when it is not UTF-8 or empty, OSError when it cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from None
    if not text.strip():
        raise ValueError(f"{path} holds no text")
    return text


def check_writable(path: Path | None) -> None:
    """Refuse a result file that could not be written, before the work whose result it is; ValueError says why."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder, name a file")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is not a folder, create it first")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent} cannot be written to")


def check_destination(dst: Path) -> None:
    """ValueError when folder `dst` is taken, or its parent is missing or not writable."""
    if dst.is_dir():
        if any(dst.iterdir()):
            raise ValueError(f"{dst} is not empty, name a new folder")
    elif dst.exists() or dst.is_symlink():
        raise ValueError(f"{dst} exists and is not a folder, name a new folder")
    check_writable(dst.absolute().parent / f"{dst.name}.probe")


@contextmanager
def whole_folder(dst: Path) -> Iterator[Path]:
    """A neighbouring folder to fill, which becomes `dst` at the end; on an error nothing is left.

    Raises:
        ValueError: see `check_destination`.
    """
    check_destination(dst)
    temporary = Path(tempfile.mkdtemp(prefix=f".{dst.name}-", dir=dst.absolute().parent))
    try:
        folder = temporary / "model"
        folder.mkdir()
        yield folder
        for path in folder.iterdir():
            path.chmod(0o666 & ~current_umask())
        if dst.exists():
            dst.rmdir()
        folder.rename(dst)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def size_of(folder: Path) -> str:
    """How much a folder holds, for people."""
    return amount(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()), "B")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in its place; on an error nothing is left."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~current_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def current_umask() -> int:
    """The mode bits that this process clears on new files; temporary files are made private, results are not."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON, whole or not at all."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def console(*, stderr: bool = False) -> Console:
    """A console that follows the terminal's width, or does not fold lines where there is no terminal."""
    from rich.console import Console

    class PlainConsole(Console):
        """Leaves it to `main` what happens when the reader of the output goes away."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    made = PlainConsole(stderr=stderr, highlight=False)
    return made if made.is_terminal else PlainConsole(stderr=stderr, highlight=False, width=200)


def versions() -> dict[str, str]:
    """The versions that results depend on."""
    from importlib.metadata import version

    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, **{name: version(name) for name in ("torch", "transformers")}}
