"""A fine-tuning from its settings to its files: open, fit, evaluate; and :func:`train`, which is all of them.

::

    settings = load_settings("config.yaml")
    result = train(settings)                     # what `kilotune train config.yaml` does

    session = open_session(settings)             # or in parts: the model with its adapter, and the data
    result = fit(session)
    evaluate(session, "test")
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ConfigError, did_you_mean
from .results.before_after import compare, samples_of
from .results.outcome import Result, finish, is_main, take_best
from .results.report import require_for, write_report
from .running import base_model as models
from .running.events import SPEEDS, Listener, watching, without_own_output
from .running.history import History, tensorboard_callback
from .running.planning import RunPlan, plan_run
from .running.process_memory import forget_peak
from .running.progress import progress_for
from .running.rate_test import take_rate
from .running.session import Session, open_session
from .settings.config_file import settings_text
from .settings.data_names import SPLITS
from .settings.rates import TakenRate
from .settings.sections import TrainSettings
from .trainer import output_folder
from .trainer.failures import advise_on_memory, knobs_of, told_of_disk, told_to_go_on
from .trainer.from_settings import best_by, generating, make_trainer, quiet
from .trainer.output_folder import CHECKPOINTS, LOGS, SETTINGS_NAME
from .trainer.stopping import Stopper

__all__ = ["Result", "Session", "evaluate", "fit", "open_session", "train"]


def train(
    settings: TrainSettings,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
    *,
    listeners: Sequence[Listener] = (),
    show: Callable[[RunPlan, str], None] | None = None,
) -> Result | None:
    """All of a fine-tuning: read, load, plan, train, score, write, report.

    Args:
        settings: what to do; ``output`` is needed.
        resume: go on with the training in ``output``; one that is over is only finished up.
        force: take away what an earlier training left in ``output``, and start anew.
        dry_run: stop after the plan; nothing is written.
        listeners: hear what happens beside the progress that ``logging.progress`` asks for.
        show: is given the plan, and one example as the model sees it. None: they are written to stderr, or as one line
            to stdout where ``logging.progress`` is json; not at all where it is quiet, but for a dry run.

    Returns:
        What it came to; None after a dry run.

    Raises:
        KilotuneError: see :func:`open_session` and :func:`fit`.

    """
    folder = _folder(settings)
    _check_processes(settings)
    require_for(settings.logging)
    if is_main():
        output_folder.refuse_overwriting(folder, _sources(settings), resume=resume, force=force)
    with contextlib.ExitStack() as held:
        early = (folder / CHECKPOINTS).is_dir() and not dry_run
        if early:  # before minutes of loading; a new folder is made when there is something to write
            held.enter_context(_alone(folder))
        if resume and is_main():
            output_folder.check_same_run(folder, settings)
        session = open_session(settings, held=output_folder.held_of_run(folder) if resume else None)
        plan = plan_run(session, knobs_of(settings)) if is_main() else None
        if plan is not None and (show is not None or dry_run or settings.logging.progress != "quiet"):
            (show or _shown_by(settings))(plan, session.prepared.preview)
        if dry_run:
            return None
        if force and is_main():
            output_folder.clear(folder)
        shown = progress_for(settings.logging.progress, better=best_by(settings, session.prepared))
        if not early:
            held.enter_context(_alone(folder))
        return _fit(session, resume, (), [shown, *listeners], plan)


def _alone(folder: Path) -> contextlib.AbstractContextManager[None]:
    """One of the processes of a training keeps others out."""
    return output_folder.alone(folder) if is_main() else contextlib.nullcontext()


def _shown_by(settings: TrainSettings) -> Callable[[RunPlan, str], None]:
    def as_line(plan: RunPlan, preview: str) -> None:
        sys.stdout.write(json.dumps({"event": "plan", **plan.to_dict(), "example": preview}) + "\n")
        sys.stdout.flush()

    def as_text(plan: RunPlan, preview: str) -> None:
        sys.stderr.write("\n".join([*plan.lines(), *([preview] if preview else []), ""]))

    return as_line if settings.logging.progress == "json" else as_text


def _folder(settings: TrainSettings) -> Path:
    if settings.output is None:
        raise ConfigError("output: is missing: the folder for the adapter, its checkpoints and its report")
    return Path(settings.output)


def _sources(settings: TrainSettings) -> dict[str, str]:
    """Setting -> path of everything that is read."""
    found = {"model.base": settings.model.base}
    if settings.adapter.start is not None:
        found["adapter.start"] = settings.adapter.start
    for split in SPLITS:
        given = getattr(settings.data, split)
        paths = (given,) if isinstance(given, str) else given or ()
        found |= {f"data.{split}": path for path in paths if not path.startswith("hub:")}
    return found


# -- fit -----------------------------------------------------------------------------------------------


def fit(
    session: Session,
    resume: bool = False,
    callbacks: Sequence[Any] = (),
    listeners: Sequence[Listener] = (),
    plan: RunPlan | None = None,
) -> Result:
    """Train, and write the adapter, its checkpoints and logs into the session's folder.

    Args:
        session: from :func:`open_session`.
        resume: go on from the newest checkpoint in the folder, if there is one; the weights at the end are those of an
            unbroken run.
        callbacks: more callbacks of transformers' Trainer.
        listeners: hear what happens beside the history; see :mod:`kilotune.train.running.events`.
        plan: for the report, which holds it against what came.

    Raises:
        DivergedError: a loss or the gradients stopped being numbers. ResourceError: memory or disk ran out.
        ConfigError: ``resume``, and something is not as it was; another process trains in the folder.
        Stopped: Ctrl-C or SIGTERM; a KeyboardInterrupt, raised once a checkpoint is written.

    """
    with _alone(session.folder):
        return _fit(session, resume, callbacks, listeners, plan)


def _fit(
    session: Session, resume: bool, callbacks: Sequence[Any], listeners: Sequence[Listener], plan: RunPlan | None
) -> Result:
    settings, folder = session.settings, session.folder
    kept = folder / CHECKPOINTS
    _check_processes(settings)
    require_for(settings.logging)
    from_checkpoint = _begin(session, resume)
    if settings.training.shard:
        _shard(session)
    state = None if from_checkpoint is None else output_folder.state_of(from_checkpoint)
    step = None if state is None else int(state["global_step"])
    history = History(folder / LOGS, resume_step=step if resume else None, csv=settings.logging.csv)
    forget_peak(models.device_of(settings.training.device))
    stopper = Stopper(f"Go on with --resume: {folder} has all that is needed.", alone=output_folder.processes() == 1)
    unit = "tokens" if session.prepared.tokens else "rows"
    with told_to_go_on(folder, kept), quiet(), watching([history, *listeners], unit=unit) as watcher, stopper:
        from .trainer.adapter_trainer import Flow

        flow = Flow(stopper, time.perf_counter)
        boards = [tensorboard_callback(folder / LOGS / "tensorboard", step)] if settings.logging.tensorboard else []
        hooks = [flow, watcher, *boards, *callbacks]
        with _use_cache_kept(session.model), advise_on_memory(settings, "while the learning rate was tested"):
            session.rate = _rate(session, from_checkpoint is not None, stopper)
        with _use_cache_kept(session.model), session.keeping():
            trainer = make_trainer(
                settings,
                session.model,
                session.prepared,
                kept,
                loss=session.loss,
                callbacks=hooks,
                rate=session.rate.value,
            )
            without_own_output(trainer)
            with advise_on_memory(settings, "while training", trainer.own.guard):
                if from_checkpoint is not None and state is not None and output_folder.is_finished(state):
                    _take_state(trainer, from_checkpoint)
                else:
                    trainer.train(resume_from_checkpoint=None if from_checkpoint is None else str(from_checkpoint))
                best_step = take_best(session, trainer)
                compared = compare(session, trainer, flow.seconds) if settings.logging.report else None
        result = finish(session, trainer.state, best_step, history, flow.seconds, compared)
        if settings.logging.report and is_main():
            write_report(session, result, plan, samples_of(session))
    return result


def _rate(session: Session, goes_on: bool, stopper: Stopper) -> TakenRate:
    """The learning rate: that of the run which goes on, else the one to take now, told and written down."""
    if goes_on and (noted := output_folder.noted_rate(session.folder)) is not None:
        return TakenRate(float(noted["value"]), str(noted["why"]))
    taken = take_rate(session, stopper)
    if is_main():
        output_folder.note_rate(session.folder, taken.to_dict())
        progress = session.settings.logging.progress
        if taken.why == "given" or progress == "quiet":
            return taken
        if progress == "json":
            sys.stdout.write(json.dumps({"event": "learning rate", **taken.to_dict()}) + "\n")
        else:
            sys.stderr.write(f"{taken.why}\n")
    return taken


def _begin(session: Session, resume: bool) -> Path | None:
    """Write down what the run begins with, or find the checkpoint that it goes on from."""
    settings, folder = session.settings, session.folder
    kept = folder / CHECKPOINTS
    there = (kept / output_folder.RECORD_NAME).is_file()
    if is_main():
        if there and not resume:
            raise ConfigError(f"output: {folder} holds a training; go on with it (resume), or take another folder")
        if there:
            output_folder.check_same_run(folder, settings, session.start)
        else:
            with told_of_disk(kept, "what the training begins with", kept):
                output_folder.write_record(folder, settings, session.start)
                if session.task is not None:  # a module of one's own has nothing that a file could say
                    output_folder.write_text(folder / SETTINGS_NAME, settings_text(settings))
    if not (there and resume):
        return None
    found, told = output_folder.find(kept, drop=is_main())
    if is_main():
        for line in told:
            sys.stderr.write(f"warning: {line}\n")
    return found


def _check_processes(settings: TrainSettings) -> None:
    if settings.training.shard and output_folder.processes() == 1:
        raise ConfigError("training.shard: there is one process only; start several with torchrun or accelerate launch")


def _shard(session: Session) -> None:
    """Leave each process a part of the frozen weights."""
    from accelerate import PartialState

    from .trainer.parallel import shard_base

    state = PartialState(cpu=session.settings.training.device == "cpu")  # makes the group that the Trainer uses
    shard_base(session.model.to(state.device))


@contextlib.contextmanager
def _use_cache_kept(model: nn.Module) -> Iterator[None]:
    """The Trainer turns a model's cache for generation off, which training does not need, and leaves it so."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    try:
        yield
    finally:
        if config is not None and before is not None:
            config.use_cache = before


def _take_state(trainer: Any, checkpoint: Path) -> None:
    """A training that is over, but for its last files: its weights and what it knew."""
    from transformers import TrainerState

    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = TrainerState.load_from_json(str(checkpoint / output_folder.STATE_NAME))


# -- evaluate ------------------------------------------------------------------------------------------


def evaluate(
    session: Session, split: str = "validation", generate: bool = False, listeners: Sequence[Listener] = ()
) -> dict[str, float]:
    """Score the model as it is now on ``train``, ``validation`` or ``test``: the loss and the task's metrics.

    Args:
        session: from :func:`open_session`.
        split: whose rows.
        generate: let the model write its answers, and score those; of the tasks, seq2seq can.
        listeners: hear what happens.

    Raises:
        ConfigError: there is no such split, or the task does not generate.

    """
    if split not in SPLITS:
        raise ConfigError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}.{did_you_mean(split, SPLITS)}")
    rows = getattr(session.prepared, split)
    if rows is None:
        raise ConfigError(f"data.{split}: there is no such split")
    if generate and (session.task is None or not session.task.generates):
        raise ConfigError(f"the task {session.settings.task} is not scored by what the model writes")
    with quiet(), tempfile.TemporaryDirectory() as folder, watching(listeners) as watcher:
        trainer = make_trainer(
            session.settings, session.model, session.prepared, Path(folder), loss=session.loss, callbacks=[watcher]
        )
        without_own_output(trainer)
        writing = generating(trainer, rows) if generate else contextlib.nullcontext()
        advice = advise_on_memory(session.settings, "while evaluating", trainer.own.guard)
        with _use_cache_kept(session.model), session.keeping(), writing, advice:
            scores = trainer.evaluate(rows, metric_key_prefix="test")
    plain = {name.removeprefix("test_"): value for name, value in scores.items() if name.startswith("test_")}
    return {name: float(value) for name, value in plain.items() if not f"_{name}".endswith(SPEEDS)}
