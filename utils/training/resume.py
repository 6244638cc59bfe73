"""Whether a training goes on from an earlier run's checkpoint: whose its folder is, and what makes two runs the same.

A run leaves in ``run.json`` what it was asked to do and what it has read, before its first checkpoint.
"""

import contextlib
import json
import logging
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import IO

from ..arguments.scripts import DEFAULT_MODEL, input_paths
from ..arguments.training import TrainArguments
from ..files.json_files import as_json, read_object
from ..files.outputs import DRAFT, LOCK_PATIENCE_S, described, remove, with_links, write_whole
from ..files.report import shortened
from ..models.checkpoint import DESCRIPTION, WEIGHT_PATTERNS
from ..process import own_files
from .folder import MODEL_DRAFT, WEIGHTS, checkpoints, not_leading_to, step_of

logger = logging.getLogger(__name__)

_RECORD = "run.json"
# What a training writes to its folder, or takes away there, beside its checkpoints.
_WRITTEN = {
    _RECORD, "training.jsonl", "report.json", "lock", MODEL_DRAFT, "huggingface", WEIGHTS, *DESCRIPTION,
}  # fmt: skip
_CHECKPOINT = re.compile(r"checkpoint-\d+(\.work)?")
# What an export consists of.
_EXPORTED = {"model.safetensors", *DESCRIPTION}
# What may differ between a run and the one that it continues. What is read is compared by its content.
_FREE_TO_CHANGE = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "logging_steps", "save_total_limit",
    "export_format", "report_to", "logging_dir", "disable_tqdm", "save_steps", "save_minutes", "dataloader_num_workers",
    "model_name_or_path", "tokenizer_name_or_path", "dataset_name_or_path", "dev_dataset_path", "dev_corpus_path",
}  # fmt: skip
# What the other keys of a run's record stand for.
_READ_OTHERWISE = {
    "data": "training rows", "dev_data": "dev rows", "model": "content of the base model's folder",
    "ranks": "number of processes",
}  # fmt: skip
# So many differences are named, and so much of their values.
_MOST_NAMED, _SHOWN_WIDTH = 4, 60
# The key under which a run's record says which checkpoint it was asked to go on from.
_RESUMED = "resume_from_checkpoint"


def take_folder(given: TrainArguments) -> IO:
    """Make the output folder, and lock it until what is returned is closed.

    Raises:
        OSError: it cannot be written.
        ValueError: it holds what must not be written over or loaded with the model, or another run is training there.
    """
    folder = Path(given.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: output_dir is a file; expected a folder, or a path for a new one")
    if folder.is_dir():
        for path in (given.model_name_or_path, given.tokenizer_name_or_path):
            if path not in (None, DEFAULT_MODEL) and os.path.isdir(path) and os.path.samefile(folder, path):
                raise ValueError(f"{folder}: is the base model's folder; give another output_dir")
        others = {path.name for kind in WEIGHT_PATTERNS for path in folder.glob(kind)} - {WEIGHTS}
        if others:
            raise ValueError(
                f"{folder}: holds {min(others)}, which would be loaded in place of what is trained or with it; give"
                " another output_dir"
            )
        _check_inputs(given, folder)
    try:
        lock = own_files.take_lock(folder, LOCK_PATIENCE_S, is_given=True)
    except OSError as error:
        raise described(error, f"{folder}: cannot write there") from None
    if lock is None:
        raise ValueError(f"{folder}: another run is training there; wait for it or give another output_dir")
    return lock


def leave_nothing_else(given: TrainArguments, existed: bool) -> None:
    """Remove a folder that was made for a run that has written nothing; call it while the lock is held.

    Args:
        existed: the folder was there before.
    """
    if existed:
        return
    with contextlib.suppress(OSError):
        if os.listdir(given.output_dir) == ["lock"]:
            os.unlink(Path(given.output_dir) / "lock")
            os.rmdir(given.output_dir)


def _check_inputs(given: TrainArguments, folder: Path) -> None:
    """Refuse to write over, or remove, what is read, and what no training has left there."""
    own = Path(os.path.realpath(folder))
    for given_path in with_links(path for path in input_paths(given) if os.path.exists(path)):
        path = Path(os.path.realpath(given_path))
        first = path.relative_to(own).parts[0] if path.is_relative_to(own) and path != own else ""
        if _is_written(first):
            reason = f"is an input, and lies where training writes or removes {first}; give another output_dir"
            raise ValueError(f"{given_path}: {reason}")
    export = folder / "huggingface"
    foreign = sorted({*os.listdir(export)} - _EXPORTED) if export.is_dir() else []
    if foreign:
        reason = f"holds {foreign[0]}, which is of no export, and would be removed; move it elsewhere"
        raise ValueError(f"{export}: {reason}")
    # A kill may have left the draft of the very first file.
    threatened = sorted(name for name in {*os.listdir(folder)} - {"lock", _RECORD + DRAFT} if _is_written(name))
    if threatened and not _is_ours(folder / _RECORD):
        reason = f"holds {threatened[0]}, of no earlier training there, and would lose it; give another output_dir"
        raise ValueError(f"{folder}: {reason}")


def _is_written(name: str) -> bool:
    """Whether training writes or removes what is called so in its folder."""
    return not _WRITTEN.isdisjoint((name, name.removesuffix(DRAFT))) or bool(_CHECKPOINT.fullmatch(name))


def _is_ours(record: Path) -> bool:
    """Whether a run has left this file. One that is damaged is taken for its own."""
    try:
        return record.is_file() and "data" in read_object(record)
    except ValueError:
        return True


def resumed(given: TrainArguments, read: dict) -> str | None:
    """The checkpoint to go on from, on rank 0: this run's last one, or what ``resume_from_checkpoint`` says.

    Checkpoints that are not this run's are removed, and its model written over, if ``overwrite_output_dir`` says so.

    Args:
        read: digests of all that the run has read, and whatever else its weights depend on, as JSON holds it.

    Raises:
        ValueError: the folder holds checkpoints or a model that are not this run's, or no checkpoint is there where one
            was asked for.
    """
    folder = Path(given.output_dir)
    for stale in folder.glob("checkpoint-*.work"):
        if _CHECKPOINT.fullmatch(stale.name):
            remove(stale)
    found = checkpoints(given.output_dir)
    asked = given.resume_from_checkpoint
    arguments = {name: value for name, value in asdict(given).items() if name not in _FREE_TO_CHANGE}
    own = json.loads(json.dumps(arguments | read)) | {_RESUMED: asked and os.path.realpath(asked)}
    record = folder / _RECORD
    anew = asked is None and given.overwrite_output_dir
    trained = found or (folder / WEIGHTS).is_file()
    other = _differences(own, record, asked is not None) if trained and not anew else []
    if found and not anew and not other:
        logger.info("going on from %s", found[-1])
        return str(found[-1])
    what = f"{'checkpoints' if found else 'the model'} of a run with other {', '.join(other[:_MOST_NAMED])}"
    is_lost = bool(found or other)
    if asked is not None:
        later = not_leading_to(asked, found)
        if found or os.path.samefile(Path(asked).parent, folder):
            what, is_lost = f"{', '.join(path.name for path in later)}, not on the way to {asked}", bool(later)
        found = later
    if is_lost and not given.overwrite_output_dir:
        raise ValueError(f"{folder}: holds {what}; give another output_dir, or --overwrite_output_dir true")
    for path in found:
        logger.info("removing %s, of an earlier run", path)
        remove(path)
    write_whole(record, as_json(own))
    return asked


class Promise:
    """What an interrupted training says of the next run.

    Attributes:
        is_settled: the checkpoints in ``output_dir`` are this run's, or lead to what it goes on from.
    """

    def __init__(self, given: TrainArguments):
        self._given, self.is_settled = given, False

    def __call__(self) -> str:
        given = self._given
        if not self.is_settled:
            return "nothing was saved by this run; the same command starts where it did"
        found = checkpoints(given.output_dir)
        if not found:
            start = f"from {given.resume_from_checkpoint} again" if given.resume_from_checkpoint else "at step 0 again"
            return f"nothing was saved, so the same command starts {start}"
        anew = given.overwrite_output_dir and given.resume_from_checkpoint is None
        command = "the same command without overwrite_output_dir" if anew else "the same command"
        return f"{found[-1].name} is saved, and {command} goes on from step {step_of(found[-1])}"


def _differences(own: dict, record: Path, asked: bool) -> list[str]:
    """In which arguments the run that a folder's record tells of is another one, with its values and ours.

    Args:
        asked: True if a checkpoint to go on from was asked for; the run goes on as it began where none is.
    """
    before = read_object(record, "what an earlier run left; --overwrite_output_dir true begins anew")
    # What only the record has was an argument of an earlier version.
    names = {*own} - (_FREE_TO_CHANGE - {_RESUMED} if asked else _FREE_TO_CHANGE)
    return [
        _READ_OTHERWISE.get(name) or f"{name} ({_shown(before.get(name))} then, {_shown(own.get(name))} now)"
        for name in sorted(names)
        if own.get(name) != before.get(name)
    ]


def _shown(value) -> str:
    """As in a file of arguments, but short."""
    return shortened(json.dumps(value, ensure_ascii=False), _SHOWN_WIDTH)
