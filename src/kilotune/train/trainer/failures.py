"""What can go wrong while it runs, each as one clear line: a loss that is no number, no memory left, a full disk."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, final

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    KilotuneError,
    ResourceError,
    did_you_mean,
    first_line,
    is_out_of_memory,
)
from ..settings.sections import TrainSettings
from .output_folder import RECORD_NAME, newest

__all__ = [
    "ROWS",
    "Guard",
    "Numbered",
    "NumberedCollate",
    "advise_on_memory",
    "knobs_of",
    "refuse_metric",
    "told_of_damage",
    "told_of_disk",
    "told_to_go_on",
]

ROWS = "kilotune_rows"  # in a training batch: which rows of train it is made of
SHOWN_ROWS = 16
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room, no more of one's share, no larger file
# What torch.save says of a disk that takes no more, in one version or another.
NO_DISK = ("PytorchStreamWriter", "iostream error", "file write failed", "No space left", "unexpected pos")


# -- which batch ---------------------------------------------------------------------------------------


@final
class Numbered(Dataset[tuple[int, Any]]):
    """A data set whose rows bring their number."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)


@final
class NumberedCollate:
    """A collate function for the rows of :class:`Numbered`: the batch brings their numbers, too."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, pairs: list[tuple[int, Any]]) -> dict[str, Any]:
        batch = dict(self.collate([row for _, row in pairs]))
        batch[ROWS] = torch.tensor([index for index, _ in pairs])
        return batch


@final
class Guard:
    """Looks at each step before the weights change.

    Args:
        settings: for what to advise.
        folder: of the checkpoints, for what to say.

    """

    def __init__(self, settings: TrainSettings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.batches: list[tuple[Tensor | None, Tensor]] = []
        self.rows: Tensor | None = None
        self.shape: tuple[int, ...] = ()

    def take(self, inputs: dict[str, Any]) -> None:
        """A batch comes: its row numbers are kept, and taken out of what the model gets."""
        self.rows = inputs.pop(ROWS, None)
        self.shape = next((tuple(value.shape) for value in inputs.values() if isinstance(value, Tensor)), ())

    def lost(self, loss: Tensor) -> None:
        """The loss of the batch that came last."""
        self.batches.append((self.rows, loss.detach()))

    def before_step(self, norm: float | Tensor, state: Any, steps_per_epoch: int, rate: float) -> None:
        """All batches of a step are through; the weights change next.

        Raises:
            DivergedError: a loss or the gradients are not finite; names step, epoch, batch and rows.

        """
        batches, self.batches = self.batches, []
        losses = torch.stack([loss.float().reshape(()) for _, loss in batches])
        size = torch.as_tensor(norm, dtype=torch.float32, device=losses.device).reshape(())
        values = torch.cat([losses, size[None]]).tolist()  # one wait for the device
        wrong = next((i for i, value in enumerate(values) if not abs(value) < float("inf")), None)
        if wrong is None:
            return
        whole = wrong == len(batches)
        what = f"the gradients' norm became {values[wrong]}" if whole else f"the loss became {values[wrong]}"
        rows = [row for held, _ in (batches if whole else batches[wrong : wrong + 1]) for row in _numbers(held)]
        epoch, before = divmod(state.global_step, steps_per_epoch)
        first = before * self.settings.training.accumulation + 1
        several = whole and len(batches) > 1
        batch = f"batches {first} to {first + len(batches) - 1}" if several else f"batch {first + wrong % len(batches)}"
        place = f"step {state.global_step + 1} (epoch {epoch + 1}, {batch}"
        raise DivergedError(
            f"{what} at {place}, rows {_listed(rows)} of train), so the training stopped before the weights changed. "
            f"{last_checkpoint(self.folder)} Look at these rows, or start anew with a lower training.learning_rate "
            f"(it was {rate:g}), a longer training.warmup{self._precision()}"
        )

    def _precision(self) -> str:
        return " or training.precision float32" if self.settings.training.precision != "float32" else ""


def _numbers(rows: Tensor | None) -> list[int]:
    return [] if rows is None else [int(row) for row in rows.tolist()]


def _listed(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:SHOWN_ROWS]))
    return f"{shown} and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else shown


def last_checkpoint(folder: Path) -> str:
    """A sentence that says what is kept."""
    found = newest(folder)
    return "No checkpoint had been written yet." if found is None else f"The last good checkpoint is kept: {found}."


# -- memory --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def advise_on_memory(settings: TrainSettings, where: str, guard: Guard | None = None) -> Iterator[None]:
    """Memory that runs out becomes an error that names the settings which need less, those not used up yet only.

    Raises:
        ResourceError: instead of what PyTorch or the system raised.

    """
    try:
        yield
    except KilotuneError:
        raise
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        shape = "" if guard is None or not guard.shape else f" with a batch of {' x '.join(map(str, guard.shape))}"
        knobs = "; ".join(knobs_of(settings, loading=guard is None))
        raise ResourceError(
            f"out of memory {where}{shape} ({first_line(error)}). What needs less, first things first: {knobs}"
        ) from error


def knobs_of(settings: TrainSettings, loading: bool = False) -> list[str]:
    """The settings that need less memory, first things first, without those that are turned already.

    Args:
        settings: as they are.
        loading: whether memory runs out before any step, so that only the model itself matters.

    """
    model, data, training = settings.model, settings.data, settings.training
    found = []
    if not loading:
        if training.batch_size > 1:
            half = training.batch_size // 2
            found.append(
                f"training.batch_size {half} with training.accumulation {training.accumulation * 2} (now "
                f"{training.batch_size} with {training.accumulation}; the same result)"
            )
        if not model.gradient_checkpointing:
            found.append("model.gradient_checkpointing true")
        if settings.task != "image-classification":
            found.append(f"a smaller data.max_length (now {data.max_length or 'what the model takes'})")
        if training.precision == "float32":
            found.append("training.precision bfloat16")
        if settings.adapter.method == "full":
            found.append("an adapter in place of adapter.method full")
    if model.dtype in ("auto", "float32") and model.quantization == "none":
        found.append("model.dtype bfloat16")
    if model.quantization != "nf4" and settings.adapter.is_adapter:
        found.append("model.quantization nf4")
    return [*found, "a smaller model"]


# -- disk ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def told_of_disk(folder: Path, what: str, kept: Path) -> Iterator[None]:
    """A file that cannot be written becomes one line; what was written of ``folder`` is taken away.

    Args:
        folder: what is being written; removed on failure.
        what: its name in the message.
        kept: the folder of the checkpoints.

    Raises:
        ResourceError: instead of what the system, PyTorch or safetensors raised.

    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointError) as error:
        writing = isinstance(error, OSError | SafetensorError | CheckpointError)
        if not writing and not any(phrase in str(error) for phrase in NO_DISK):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        cause, full = _cause(error)
        again = "go on with --resume" if (kept / RECORD_NAME).is_file() else "start it again"
        do = f"Make room, and {again}" if full else f"Mend that, and {again}"
        more = "; training.keep_checkpoints says how many are kept" if full and newest(kept) is not None else ""
        raise ResourceError(
            f"{what} cannot be written to {folder}: {cause} ({_room(folder)}). {last_checkpoint(kept)} {do}{more}"
        ) from error


@contextlib.contextmanager
def told_of_damage(checkpoint: Any, what: str) -> Iterator[None]:
    """A checkpoint's file that cannot be loaded is named; those with checksums were held against them before.

    Args:
        checkpoint: its folder; None where none is loaded.
        what: which files are loaded.

    Raises:
        CheckpointError: instead of what PyTorch, pickle or safetensors raised.

    """
    try:
        yield
    except (KilotuneError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle raises anything
        if checkpoint is None:
            raise
        raise CheckpointError(
            f"{what} of {checkpoint} cannot be loaded: {first_line(error)}. Take that folder away, and --resume goes "
            "on from the checkpoint before"
        ) from error


@contextlib.contextmanager
def told_to_go_on(folder: Path, kept: Path) -> Iterator[None]:
    """Any other file for which there is no room, a log or the report, ends in a line that says how to go on.

    Args:
        folder: the output.
        kept: the folder of the checkpoints.

    Raises:
        ResourceError: instead of what it was.

    """
    try:
        yield
    except ResourceError:
        raise
    except (OSError, KilotuneError) as error:
        cause, full = _cause(error)
        if not full:
            raise
        what = f"cannot write into {folder}: {cause}" if isinstance(error, OSError) else first_line(error)
        raise ResourceError(
            f"{what} ({_room(folder)}). {last_checkpoint(kept)} Make room, and go on with --resume"
        ) from error


def _cause(error: BaseException) -> tuple[str, bool]:
    """The system's own words, wherever they are in the chain; and whether it is for want of room."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror, inner.errno in FULL
        inner = inner.__cause__ or inner.__context__
    text = first_line(error)
    if isinstance(error, RuntimeError):  # PyTorch does not pass the reason on
        return f"the system takes no more bytes ({text})", True
    return text, any(f"os error {number}" in text for number in FULL)  # of safetensors


def _room(folder: Path) -> str:
    place = next((p for p in (folder, *folder.parents) if p.exists()), Path("/"))
    try:
        return f"{shutil.disk_usage(place).free / 1e6:.1f} MB are free there"
    except OSError:
        return "how much is free there is not known"


# -- metrics -------------------------------------------------------------------------------------------


def refuse_metric(wanted: str, metrics: Mapping[str, Any]) -> NoReturn:
    """The best evaluation is to be told by a number that the task does not give.

    Raises:
        ConfigError: always; lists what there is.

    """
    there = sorted(name.removeprefix("eval_") for name in metrics if name.startswith("eval_"))
    there = [name for name in there if not name.endswith(("runtime", "per_second", "preparation_time"))]
    raise ConfigError(
        f"training.best_metric: there is no {wanted!r} here.{did_you_mean(wanted, there)} There is: {', '.join(there)}"
    )
