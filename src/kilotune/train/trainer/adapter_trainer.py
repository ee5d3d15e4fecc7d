"""The one file that is built on transformers' classes: the Trainer with our methods, and its callback.

Importing it needs transformers; :mod:`.from_settings` does that where it is used. Tested with transformers 5.19 and
5.23.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from ...model.adapter_model import AdapterModel
from ...model.optimizer_groups import optimizer_groups
from ..settings.schedule import rate_factor
from ..settings.sections import TrainSettings
from .failures import Guard, Numbered, NumberedCollate, refuse_metric, told_of_damage, told_of_disk
from .output_folder import write_checksums
from .stopping import Stopper

__all__ = ["AdapterTrainer", "Flow", "Loss", "Own"]

SILENCE = 30.0  # seconds without a logged loss
Loss = Callable[[Any, Any], Tensor]
"""The loss of a model's output and the labels, for modules that compute none themselves."""


@final
class Own:
    """What our methods of the Trainer need to know."""

    def __init__(
        self,
        settings: TrainSettings,
        model: nn.Module,
        guard: Guard,
        folder: Path,
        steps_per_epoch: int,
        loss: Loss | None,
    ) -> None:
        self.settings, self.model, self.guard, self.folder = settings, model, guard, folder
        self.steps_per_epoch, self.loss = steps_per_epoch, loss
        self.rate = 0.0  # the highest one; make_trainer knows it
        self.normalises: bool | None = None  # whether the model divides its loss by the labels of a whole step
        self.still = [m for m in model.modules() if isinstance(m, _BatchNorm) and not _trains(m)]
        self.losses: list[tuple[Tensor, Tensor]] = []  # of an evaluation: each batch's mean loss, and labels in it

    def groups(self) -> list[dict[str, Any]] | None:
        """The optimizer's groups; None where the model has no adapters, and the Trainer makes them."""
        run = self.settings.training
        if not isinstance(self.model, AdapterModel):
            return None
        return optimizer_groups(
            self.model,
            self.rate,
            head_lr=run.head_learning_rate,
            lora_plus_ratio=run.lora_plus_ratio,
            weight_decay=run.weight_decay,
        )

    def keep_still(self) -> None:
        """Frozen batch norms compute with the base's statistics: moving them would change the base for everybody."""
        for module in self.still:
            module.eval()

    def loss_of(self, model: Any, inputs: dict[str, Any], loss: Loss) -> dict[str, Any]:
        """The output of a module that computes no loss, and its loss."""
        given = inputs["inputs"]
        if isinstance(given, dict):
            output = model(**given)
        else:
            output = model(*given) if isinstance(given, (tuple, list)) else model(given)
        return {"loss": loss(output, inputs["labels"]), "logits": output}


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


@final
class AdapterTrainer(Seq2SeqTrainer):  # type: ignore[misc]  # transformers is untyped here
    """The Trainer (the one that can also generate to score), with the methods of :class:`Own`."""

    own: Own
    train_dataset: Any
    data_collator: Any
    optimizer: Any
    lr_scheduler: Any

    def get_train_dataloader(self) -> Any:
        rows, collate = self.train_dataset, self.data_collator
        self.train_dataset, self.data_collator = Numbered(rows), NumberedCollate(collate)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = rows, collate

    def create_optimizer(self, model: Any = None) -> Any:
        groups = self.own.groups() if self.optimizer is None else None
        if groups is not None:
            made, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = made(groups, **options)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            run = self.own.settings.training
            factor = partial(rate_factor, steps=num_training_steps, warmup=run.warmup, schedule=run.schedule)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.own.guard.take(inputs)
        if self._spread and num_items_in_batch is not None and self.own.normalises is None:
            self.own.normalises = self._normalises(model, inputs, num_items_in_batch)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.own.guard.lost(loss)
        return loss

    @property
    def _spread(self) -> bool:
        """Whether a step is made of several batches."""
        return bool(self.args.gradient_accumulation_steps > 1 or self.args.world_size > 1)

    def _normalises(self, model: Any, inputs: Any, items: Any) -> bool:
        """Whether the model divides its loss by the number of labels that it is told.

        Many take the number in their ``**kwargs`` and give the mean over their own batch all the same, which the
        Trainer then adds up without dividing: with n batches a step the gradient would be n times too large. Asking
        is the only way to know; the model is run twice, without dropout and gradients.
        """
        state = torch.get_rng_state()
        model.eval()
        with torch.no_grad():
            loss, other = (Trainer.compute_loss(self, model, dict(inputs), False, n) for n in (items, 2 * items))
        torch.set_rng_state(state)
        return not torch.allclose(loss, other, rtol=1e-3)

    def _share(self, inputs: Any, items: Any) -> Any:
        """The part that a batch has of all the labels of a step."""
        labels = inputs["labels"]
        counted = labels[..., 1:] if self._loss_shifts_labels else labels
        return counted.ne(-100).sum() / items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self.own.keep_still()
        if self.own.loss is None:
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if self.own.normalises is not False or num_items_in_batch is None:
                return found
            share = self._share(inputs, num_items_in_batch)
            return (found[0] * share, found[1]) if return_outputs else found * share
        outputs = self.own.loss_of(model, inputs, self.own.loss)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None, **generation: Any
    ) -> Any:
        found = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **generation)
        if found[0] is not None:
            self.own.losses.append((found[0].detach().reshape(()), self._counted(inputs["labels"])))
        return found

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: Any = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self.own.losses = []
        found = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.own.losses and f"{metric_key_prefix}_loss" in found.metrics:
            found.metrics[f"{metric_key_prefix}_loss"] = self._mean_loss()
        return found

    def _counted(self, labels: Any) -> Tensor:
        """How many labels a batch's loss is the mean of: not those that it passes over."""
        if not isinstance(labels, Tensor):  # of a module of one's own
            return torch.tensor(1.0, device=self.args.device)
        if labels.is_floating_point():
            return torch.tensor(float(labels.numel()), device=labels.device)
        return (labels[..., 1:] if self._loss_shifts_labels else labels).ne(-100).sum()

    def _mean_loss(self) -> float:
        """The mean over all labels of an evaluation. The Trainer's is one over batches, each by its rows."""
        losses, self.own.losses = self.own.losses, []
        values = torch.stack([loss.float() for loss, _ in losses]).double()
        counts = torch.stack([count.to(values.device) for _, count in losses]).double()
        sums = torch.stack([(values * counts)[counts > 0].sum(), counts.sum()])  # without labels, a loss is no number
        total, number = (self.accelerator.reduce(sums, "sum") if self.args.world_size > 1 else sums).tolist()
        return total / number if number else float("nan")

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        rate = self.lr_scheduler.get_last_lr()[0]
        self.own.guard.before_step(norm, self.state, self.own.steps_per_epoch, rate)
        return norm

    def _init_training_state(self, *args: Any) -> Any:
        made = super()._init_training_state(*args)
        best = self.own.folder / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and best.is_dir():  # wherever the folder was when that was written
            self.state.best_model_checkpoint = str(best)
        return made

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        wanted = self.args.metric_for_best_model
        if wanted is not None and f"eval_{wanted.removeprefix('eval_')}" not in metrics:
            refuse_metric(wanted, metrics)
        better: bool = super()._determine_best_metric(metrics=metrics, trial=trial)
        if better or self.control.should_training_stop:  # the best one is kept, and an early stop is the last step
            self.control.should_save = True
        return better

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        with told_of_disk(self.own.folder / f"checkpoint-{step}", f"the checkpoint of step {step}", self.own.folder):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process writes the state of its own random numbers
            if self.args.should_save:
                write_checksums(self.own.folder / f"checkpoint-{step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
        with told_of_damage(resume_from_checkpoint, "model*.safetensors"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        with told_of_damage(checkpoint, "optimizer.pt, or scheduler.pt,"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: Any) -> None:
        with told_of_damage(checkpoint, "rng_state*.pth"):
            super()._load_rng_state(checkpoint)

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle that nothing reads: the settings stand in kilotune-train.yaml.
        Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)


@final
class Flow(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Stops where the user asked for it, right after a checkpoint, and takes the time of each step, in ``seconds``.

    Slow steps are logged one by one, so that no more than half a minute goes without a loss; in one process alone, for
    several add their losses up, and would have to agree on when.

    Args:
        stopper: knows whether the user asked.
        clock: seconds, from any start.

    """

    def __init__(self, stopper: Stopper, clock: Callable[[], float]) -> None:
        self.stopper, self.clock = stopper, clock
        self.seconds: list[float] = []
        self.began = self.logged = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.logged = self.clock()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = self.clock()
        self.seconds.append(now - self.began)
        if now - self.logged >= SILENCE and args.world_size == 1:
            control.should_log = True
        if self.stopper.asked:
            control.should_save = True
        if control.should_save or control.should_evaluate:
            control.should_log = True  # so that a resumed run's next loss is a mean over the same steps
        if control.should_log:
            self.logged = now

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stopper.stop(state.global_step)
