"""What a training leaves in its folder: checkpoints that appear whole, the journal, and the model."""

import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..files.outputs import described, remove, write_whole
from ..process import own_files

logger = logging.getLogger(__name__)

# Where the files of a model are until all are whole.
MODEL_DRAFT = "model.part"
# The trained weights, in PaddleNLP's form.
WEIGHTS = "model_state.pdparams"
# What to do about a checkpoint that another training has left.
FIT_CURE = "give the arguments of that training, or another checkpoint"
# A file in a checkpoint that the next one takes the place of.
TEMPORARY = "temporary"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def checkpoint_of(output_dir: str, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return Path(output_dir) / f"checkpoint-{step}"


def is_checkpoint(path: Path) -> bool:
    """True if a training can go on from this folder: a checkpoint appears whole."""
    return (path / "trainer_state.json").is_file()


def checkpoints(output_dir: str) -> list[Path]:
    """The folders of the whole checkpoints there, oldest first."""
    found = {path: _CHECKPOINT.fullmatch(path.name) for path in Path(output_dir).iterdir()}
    whole = {path: match for path, match in found.items() if match and is_checkpoint(path)}
    return [path for _, path in sorted((int(match[1]), path) for path, match in whole.items())]


def remove_old(output_dir: str, limit: int | None, best: int | None) -> None:
    """Keep the newest ``limit`` checkpoints (None: all), and the one of the best step. Temporary ones are not counted,
    and only the newest checkpoint may be one.
    """
    found = checkpoints(output_dir)
    for path in found[:-1]:
        if (path / TEMPORARY).is_file():
            remove(path)
    found = [path for path in found if not (path / TEMPORARY).is_file() and path.exists()]
    for path in found[:-limit] if limit else []:
        if best is None or path != checkpoint_of(output_dir, best):
            remove(path)


def step_of(checkpoint: Path) -> int:
    """Of a checkpoint's folder, the step after which it was saved."""
    return int(_CHECKPOINT.fullmatch(checkpoint.name)[1])


def not_leading_to(asked: str, found: list[Path]) -> list[Path]:
    """Of a folder's checkpoints, oldest first, those that a run from the one asked for would take for its own.

    Raises:
        ValueError: there is no checkpoint where one was asked for.
    """
    if not is_checkpoint(Path(asked)):
        raise ValueError(f"{asked}: no checkpoint there; expected a folder such as output_dir/checkpoint-100")
    places = [i for i, path in enumerate(found) if os.path.samefile(path, asked)]
    return found[places[0] + 1 :] if places else found


def check_fit(path: Path, found: dict[str, tuple], own: dict[str, tuple], what: str) -> None:
    """Refuse a checkpoint's file whose arrays are not those of the model in training, by name and shape.

    Raises:
        ValueError: with the first difference.
    """
    missing, unknown = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    other = [name for name in own if name in found and own[name] != found[name]]
    if missing:
        told = f"has no {what} {missing[0]}, and lacks {len(missing):,} of {len(own):,}"
    elif unknown:
        told = f"has a {what} {unknown[0]}, which is not trained here, and {len(unknown):,} such of {len(found):,}"
    elif other:
        told = f"has {what} {other[0]} of shape {list(found[other[0]])}, here {list(own[other[0]])}"
    else:
        return
    raise ValueError(f"{path}: does not fit this training: {told}; {FIT_CURE}")


def shapes(arrays: dict) -> dict[str, tuple]:
    """Of whatever has one."""
    return {name: tuple(value.shape) for name, value in arrays.items() if hasattr(value, "shape")}


@contextmanager
def whole(folder: str | Path) -> Iterator[None]:
    """What goes wrong because a checkpoint is damaged becomes one line about it."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise described(error, f"{folder}: cannot be read") from None
        raise ValueError(
            f"{folder}: cannot be read ({type(error).__name__}); the checkpoint is damaged. Remove it to go on from the"
            " one before"
        ) from error


def renamed(state: dict, names: dict[str, str]) -> dict:
    """An optimizer's state under other names of the parameters.

    Paddle numbers parameters as they are made in a process (``linear_3.w_0``), which a resumed run may do in
    another order; checkpoints hold the names that the parameters have in their model.
    """
    renamed = {}
    for key, value in state.items():
        owner = next((name for name in names if key.startswith(name + "_")), None)
        renamed[key if owner is None else names[owner] + key[len(owner) :]] = value
    return renamed


def sizes(folder: Path) -> str:
    """How large a checkpoint is, in all and by its large files, for people."""
    found = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    parts = [f"{name} {_megabytes(size)}" for name, size in sorted(found.items()) if size > sum(found.values()) / 20]
    return f"{_megabytes(sum(found.values()))} ({', '.join(parts)})"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"


@contextmanager
def put_into(folder: Path, what: str, earlier: Sequence[str] = ()) -> Iterator[Path]:
    """A work folder; what is in it in the end appears in ``folder``, each file whole, the weights last.

    If it cannot be put there, the work folder stays: it holds the only copy.

    Args:
        earlier: names that go before anything is put there, in this order; looked at when all is written. With the
            weights before what describes them, a kill leaves the weights of either model with all of its own
            description, or no weights.
    """
    work = folder / MODEL_DRAFT
    try:
        remove(work)
        work.mkdir(parents=True)
        yield work
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise described(error, f"{folder}: cannot write {what}") from None
    try:
        for name in earlier:
            remove(folder / name)
        for path in sorted(work.iterdir(), key=lambda p: p.suffix == ".pdparams"):
            if path.is_dir():
                remove(folder / path.name)
            os.replace(path, folder / path.name)
        work.rmdir()
    except OSError as error:
        raise described(error, f"{folder}: cannot put {what} there from {work.name}") from None


class Journal:
    """``training.job.jsonl``: a line for every log of the Trainer, and log lines for people."""

    def __init__(self, path: Path):
        self.path = path

    def cut(self, step: int | None) -> None:
        """Drop what an earlier run wrote after a step, which comes again now; all of it if None is gone on with."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []
        kept = [line for line in lines if step is not None and _step_of(line) <= step]
        write_whole(self.path, b"".join(kept))

    def add(self, step: int, logs: dict, shown: bool = True) -> None:
        """One log entry, for people too if it is ``shown``."""
        kept = {"step": step, "time": round(time.time(), 1)}
        kept |= {name: value for name, value in logs.items() if isinstance(value, int | float)}
        try:
            with own_files.append(self.path) as stream:
                stream.write(json.dumps(kept).encode() + b"\n")
        except OSError as error:
            raise described(error, f"{self.path}: cannot write") from None
        worth = {name: kept[name] for name in ("loss", "learning_rate") if name in kept}
        worth |= {name: value for name, value in kept.items() if name.startswith("eval_")}
        if worth and shown:
            logger.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in worth.items()))


def _step_of(line: bytes) -> float:
    """Of a line of the journal; infinite if a kill has left only a part of it."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf
