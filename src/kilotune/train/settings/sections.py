"""What a fine-tuning is run with. Frozen, checked when built, every fault reported with the nearest valid name.

The text beside each field is its only home: ``kilotune init`` writes it into the config file, the command line and
docs/training.md show it. Plain values, YAML and overrides are read in :mod:`kilotune.train.settings.config_file`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast, final

from ...config import AdapterConfig, FrozenDict, check_listed_options
from ...errors import ConfigError, did_you_mean, faults_of, gather
from ...known_names import METHOD_OPTIONS, PRESET_NAMES, may_be_method, methods_are_loaded
from .data_names import ROLES, columns, splits
from .fields import EPOCH, Section, flag, interval, mapping, number, one_of, or_none, paths, setting, text, warmup
from .rates import rate_for
from .schedule import SCHEDULES

__all__ = [
    "TASK_NAMES",
    "AdapterSettings",
    "DataSettings",
    "LogSettings",
    "ModelSettings",
    "TrainSettings",
    "TrainingSettings",
    "adapter_names",
]

TASK_NAMES = (
    "causal-lm",
    "text-classification",
    "regression",
    "token-classification",
    "image-classification",
    "seq2seq",
)
RATE_WORDS = ("rule", "auto")
WHOLE_METHODS = ("full", "head")  # no adapter: every weight, or the task's head alone, is trained
METHOD_NAMES = (*METHOD_OPTIONS, *PRESET_NAMES, *WHOLE_METHODS)


def _base(name: str, value: Any) -> list[str]:
    return [f"{name}: is missing: a folder, or a hub id such as 'org/name'"] if value == "" else text(name, value)


def _rate(name: str, value: Any) -> list[str]:
    if isinstance(value, str):
        hint = did_you_mean(value, RATE_WORDS)
        return [] if value in RATE_WORDS else [f"{name}: expected a number, rule or auto, got {value!r}.{hint}"]
    return number(0, above=True)(name, value)


@final
@dataclass(frozen=True, kw_only=True)
class ModelSettings(Section):
    """The base model: which one, and how its weights are held."""

    SECTION: ClassVar[str] = "model"

    base: str = setting(
        "",
        _base,
        "The base model: a folder, a hub id such as 'org/name', a GGUF file, or smollm2 (kilotune fetch says more).",
    )
    revision: str | None = setting(None, or_none(text), "The revision of a hub id: a branch, tag or commit.")
    dtype: str = setting(
        "auto",
        one_of("auto", "float32", "bfloat16", "float16"),
        "In what the frozen weights are held. auto: as they were saved, and on a CPU whose products of that dtype are "
        "slow in float32, where memory allows. What is trained is float32 in any case.",
    )
    quantization: str = setting(
        "none",
        one_of("none", "nf4", "int8"),
        "Quantise the frozen weights while loading, with bitsandbytes: nf4 (QLoRA's 4 bits) or int8.",
    )
    gradient_checkpointing: bool = setting(
        False, flag, "Compute activations again in the backward pass: less memory, about a third more time."
    )
    attention: str | None = setting(
        None, or_none(text), "transformers' implementation of attention: eager, sdpa, ...; null: its own choice."
    )


def adapter_names(wanted: str) -> tuple[str, ...]:
    """The methods and presets that ``wanted`` is looked up among: as they are listed, where that is enough."""
    listed = (*METHOD_OPTIONS, *PRESET_NAMES)
    if wanted in listed or not may_be_method(wanted):
        return listed
    from ...methods import METHODS, PRESETS

    return (*METHODS, *PRESETS)


def _method(name: str, value: Any) -> list[str]:
    return one_of(*adapter_names(str(value)), *WHOLE_METHODS)(name, value)


@final
@dataclass(frozen=True, kw_only=True)
class AdapterSettings(Section):
    """What is trained."""

    SECTION: ClassVar[str] = "adapter"

    method: str = setting(
        "vera",
        _method,
        f"What is trained: {', '.join(METHOD_NAMES)}. 'full' is every weight, 'head' the task's head alone.",
    )
    options: Mapping[str, Any] = setting(
        FrozenDict(),
        mapping,
        "The method's own options, such as r; docs/adapters.md lists them. target_modules: all-linear by default here, "
        "but for methods with places of their own.",
    )
    start: str | None = setting(
        None,
        or_none(text),
        "An adapter of the same base and method (a folder or a hub id) to go on from; it brings its options.",
    )
    last_blocks: int | None = setting(
        None,
        or_none(number(1, whole=True)),
        "Adapt only the last so many blocks of the model. What goes into them is computed once a row, and kept.",
    )

    @classmethod
    def together(cls, values: Mapping[str, Any]) -> list[str]:
        method, options, start = values["method"], values["options"], values["start"]
        if start is not None and options:
            return [
                f"{cls.key('options')}: an adapter that is gone on from ({cls.key('start')}) brings its own options"
            ]
        if method in WHOLE_METHODS:
            given = [name for name, value in (("options", options), ("start", start)) if value]
            faults = [f"{cls.key(name)}: method {method!r} is no adapter, so it has none" for name in given]
            if method == "head" and values["last_blocks"] is not None:
                faults.append(f"{cls.key('last_blocks')}: method 'head' trains no block")
            return faults
        if not options and not methods_are_loaded():
            return []  # every method can do without; torch, which methods need, is not imported for that
        try:
            check_listed_options(method, options)
            from ...methods import get_config

            get_config(method, **options)
        except (ConfigError, TypeError) as error:
            return [f"{cls.key('options')}: {line}" for line in faults_of(error)]
        return []

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter is trained, and not the model itself."""
        return self.method not in WHOLE_METHODS

    def config(self, **more: Any) -> AdapterConfig:
        """The adapter's configuration; ``more`` adds options that were not given.

        Where nothing is said of what to adapt, it is all linear layers, or the method's own places where it has such.

        Raises:
            ConfigError: 'full' and 'head' have none.

        """
        if not self.is_adapter:
            raise ConfigError(f"{self.key('method')}: {self.method!r} is no adapter, so it has no configuration")
        from ...methods import get_config

        config = get_config(self.method, **{**more, **self.options})
        chosen = {"target_modules", "target_parameters", "layers_to_transform"} & set(self.options)
        if chosen or config.usual_targets is None:
            return config
        return config.replace(target_modules=config.usual_targets)


@final
@dataclass(frozen=True, kw_only=True)
class DataSettings(Section):
    """The data: where it is, what its columns mean, how it is cut."""

    SECTION: ClassVar[str] = "data"

    train: str | Sequence[str] | None = setting(
        None, or_none(paths), "A file, a list of files, a folder of images, or 'hub:NAME' for a data set of the hub."
    )
    validation: str | Sequence[str] | None = setting(
        None,
        or_none(paths),
        "The same, for the evaluations between; null: validation_fraction of train, if that is set.",
    )
    test: str | Sequence[str] | None = setting(
        None, or_none(paths), "The same, for one evaluation at the end; null: test_fraction of train, if that is set."
    )
    subset: str | None = setting(None, or_none(text), "The configuration of a hub data set that has several.")
    splits: Mapping[str, str] = setting(
        FrozenDict(),
        splits,
        "Which splits of a hub data set are train, validation and test: {train: train, validation: dev}.",
    )
    validation_fraction: float = setting(
        0.0, number(0, 0.9), "The part of train that is held out for validation; the seed decides which rows."
    )
    test_fraction: float = setting(0.0, number(0, 0.9), "The part of train that is held out as the test split.")
    format: str = setting(
        "auto",
        one_of("auto", "jsonl", "json", "csv", "parquet", "images", "hub"),
        "What the files are; auto: by their names.",
    )
    columns: Mapping[str, str] = setting(
        FrozenDict(),
        columns,
        f"Which column has which role, where its name is another: {{prompt: question}}. Roles: {', '.join(ROLES)}.",
    )
    max_length: int | None = setting(
        None,
        or_none(number(2, whole=True)),
        "Tokens per row; longer rows are cut, and counted in the plan. null: what the model takes, 1024 at most.",
    )
    loss_on: str = setting(
        "answer",
        one_of("answer", "all"),
        "answer: the loss is on completions and the assistant's messages; all: on every token. Plain text has no "
        "answer, so all of it counts.",
    )
    plain: bool = setting(
        False,
        flag,
        "Prompts and completions of a model with a chat template. false: as a user's and the assistant's messages in "
        "the template; true: as they stand, one directly after the other.",
    )
    packing: bool = setting(False, flag, "Put several short rows into one sequence, each blind to the others.")
    limit: int | None = setting(None, or_none(number(1, whole=True)), "Take the first so many rows of train only.")

    @classmethod
    def together(cls, values: Mapping[str, Any]) -> list[str]:
        faults = []
        for split in ("validation", "test"):
            if values[split] is not None and values[f"{split}_fraction"]:
                faults.append(
                    f"{cls.key(f'{split}_fraction')}: has no effect beside {cls.key(split)}; give one of them"
                )
        if values["validation_fraction"] + values["test_fraction"] >= 1:
            faults.append(f"{cls.key('validation_fraction')} and {cls.key('test_fraction')} leave nothing to train on")
        return faults


@final
@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Section):
    """How it is trained."""

    SECTION: ClassVar[str] = "training"

    epochs: float | None = setting(
        None,
        or_none(number(0, above=True)),
        "How often all of train is gone through; null: 3 times, or as often as makes 100 steps.",
    )
    max_steps: int | None = setting(
        None, or_none(number(1, whole=True)), "Stop after so many steps of the optimizer, whatever epochs says."
    )
    batch_size: int = setting(8, number(1, whole=True), "Rows per device and forward pass.")
    eval_batch_size: int | None = setting(
        None, or_none(number(1, whole=True)), "The same where nothing is learned; null: batch_size."
    )
    accumulation: int = setting(1, number(1, whole=True), "Batches whose gradients are added up for one step.")
    learning_rate: float | str | None = setting(
        None,
        or_none(_rate),
        "The highest learning rate: a number; rule: by the method and the number of steps; auto: by that and a short "
        "test, where the training is long enough for one. null: auto.",
    )
    head_learning_rate: float | None = setting(
        None,
        or_none(number(0, above=True)),
        "Another one for what is trained whole beside the adapter, such as a classifier.",
    )
    lora_plus_ratio: float | None = setting(
        None, or_none(number(1)), "LoRA+: the second factor (B) learns at so many times the rate; 16 in the paper."
    )
    schedule: str = setting("linear", one_of(*SCHEDULES), "How the learning rate goes from its highest to the end.")
    warmup: float = setting(
        0.06, warmup, "How long the rate rises: below 1 a part of all steps, else a number of steps."
    )
    weight_decay: float = setting(0.0, number(0), "AdamW's weight decay.")
    max_grad_norm: float | None = setting(
        1.0, or_none(number(0, above=True)), "Gradients are scaled down to this norm; null: never."
    )
    seed: int = setting(
        0, number(0, whole=True), "Decides what is drawn: splits, order, dropout, fresh heads, adapters."
    )
    precision: str = setting(
        "float32",
        one_of("float32", "bfloat16"),
        "bfloat16: products run in bfloat16 (autocast), what is trained and its sums stay float32.",
    )
    eval_every: int | str | None = setting(
        EPOCH, or_none(interval), "Evaluate on validation every so many steps, or every 'epoch'; null: never."
    )
    save_every: int | str | None = setting(
        None,
        or_none(interval),
        "Write a checkpoint every so many steps or every 'epoch'; null: as eval_every. Best and last always are.",
    )
    keep_checkpoints: int = setting(2, number(1, whole=True), "How many checkpoints are kept; the best one always is.")
    early_stopping: int | None = setting(
        None, or_none(number(1, whole=True)), "Stop after so many evaluations without a better one; null: never."
    )
    best_metric: str | None = setting(
        None,
        or_none(text),
        "By which number an evaluation is the better one, such as loss or accuracy; null: the task's.",
    )
    load_best: bool | None = setting(
        None, or_none(flag), "Whether the best evaluation's adapter is the result; null: where there is validation."
    )
    workers: int = setting(0, number(0, 256, whole=True), "Processes that prepare batches beside the one that trains.")
    device: str = setting("auto", one_of("auto", "cpu", "cuda"), "Where it runs; auto: a GPU where there is one.")
    input_cache: str = setting(
        "memory",
        one_of("memory", "disk", "off"),
        "With adapter.last_blocks: where what goes into them is kept. disk: a file in output, gone at the end.",
    )
    input_cache_mb: float = setting(
        2000.0, number(0), "How much of that is kept, in megabytes; rows beyond it run through all blocks each time."
    )
    shard: bool = setting(
        False,
        flag,
        "Of several processes (torchrun), each holds a part of the frozen weights (FSDP2), not all; same result.",
    )

    @classmethod
    def together(cls, values: Mapping[str, Any]) -> list[str]:
        if values["eval_every"] is not None:
            return []
        given = [name for name in ("early_stopping", "best_metric", "load_best", "eval_batch_size") if values[name]]
        return [f"{cls.key(name)}: has no effect with {cls.key('eval_every')} null" for name in given]

    @property
    def saving(self) -> int | str:
        """``save_every``, filled in."""
        return self.save_every or self.eval_every or EPOCH


@final
@dataclass(frozen=True, kw_only=True)
class LogSettings(Section):
    """What is shown and written while it runs."""

    SECTION: ClassVar[str] = "logging"

    progress: str = setting(
        "auto",
        one_of("auto", "bar", "plain", "json", "quiet"),
        "bar: a bar that moves; plain: lines; json: one JSON object a line; quiet: nothing. auto: bar on a terminal.",
    )
    log_every: int = setting(
        10,
        number(1, whole=True),
        "Write the loss every so many steps; that of the first step always, and of slow steps every half minute.",
    )
    csv: bool = setting(True, flag, "Write logs/history.csv beside logs/history.jsonl.")
    tensorboard: bool = setting(False, flag, "Write TensorBoard's files into logs/tensorboard.")
    report: bool = setting(True, flag, "Write plots/*.png and report.html at the end.")


_NO_MODEL = cast("ModelSettings", None)  # TrainSettings refuses it: its absence is one clear line


@final
@dataclass(frozen=True, kw_only=True)
class TrainSettings(Section):
    """Everything that decides a fine-tuning."""

    task: str = setting("causal-lm", one_of(*TASK_NAMES), f"What is learned: {', '.join(TASK_NAMES)}.")
    output: str | None = setting(
        None,
        or_none(text),
        "The folder for the adapter, its checkpoints, logs and report; never overwritten without --force.",
    )
    model: ModelSettings = _NO_MODEL
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    data: DataSettings = field(default_factory=DataSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    logging: LogSettings = field(default_factory=LogSettings)

    @classmethod
    def known(cls) -> list[str]:
        return [*cls.names(), *SECTIONS]

    def __post_init__(self) -> None:
        faults = [
            f"{name}: expected {wanted.__name__}, got {getattr(self, name)!r}"
            for name, wanted in SECTIONS.items()
            if not isinstance(getattr(self, name), wanted)
        ]
        if faults:
            raise ConfigError(gather("TrainSettings:", faults))
        super().__post_init__()
        if faults := between({name: getattr(self, name) for name in self.known()}):
            raise ConfigError(gather("TrainSettings:", faults))

    def rate(self, steps: int) -> float:
        """The highest learning rate: the one given, or that of the rule for the method and so many steps."""
        given = self.training.learning_rate
        return float(given) if isinstance(given, float | int) else rate_for(self.adapter.method, steps)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **{name: getattr(self, name).to_dict() for name in SECTIONS}}


SECTIONS: Mapping[str, type[Section]] = {
    section.SECTION: section
    for section in (ModelSettings, AdapterSettings, DataSettings, TrainingSettings, LogSettings)
}


def _input_cache_faults(task: str, adapter: AdapterSettings, training: TrainingSettings) -> list[str]:
    defaults = TrainingSettings.defaults()
    if adapter.last_blocks is None:
        changed = [name for name in ("input_cache", "input_cache_mb") if getattr(training, name) != defaults[name]]
        return [f"training.{name}: has no effect without adapter.last_blocks" for name in changed]
    faults = []
    if task == "seq2seq":
        faults.append("adapter.last_blocks: a seq2seq model has two lists of blocks; name layers in target_modules")
    if training.input_cache == "off" and training.input_cache_mb != defaults["input_cache_mb"]:
        faults.append("training.input_cache_mb: has no effect with training.input_cache off")
    if training.shard and training.input_cache != "off":
        faults.append(
            "training.input_cache: processes that share the weights out have to run all blocks together; set it off"
        )
    return faults


# -- what holds between fields -------------------------------------------------------------------------


def between(values: Mapping[str, Any]) -> list[str]:
    """What is wrong between sections; each is right by itself."""
    task, model, adapter, data, training = (values[n] for n in ("task", "model", "adapter", "data", "training"))
    faults = []
    if not adapter.is_adapter:
        if adapter.method == "full" and model.quantization != "none":
            faults.append("model.quantization: quantised weights cannot be trained by 'full'; train an adapter on them")
        if training.shard:
            faults.append(f"training.shard: is for adapters, not for adapter.method {adapter.method!r}")
        for name in ("lora_plus_ratio", "head_learning_rate"):
            if getattr(training, name) is not None:
                faults.append(f"training.{name}: has no effect with adapter.method {adapter.method!r}")
    faults += _input_cache_faults(task, adapter, training)
    if training.shard and model.quantization != "none":
        faults.append("training.shard: FSDP2 shards floating-point weights only; leave model.quantization out")
    if task != "causal-lm":
        changed = [
            name for name in ("packing", "loss_on", "plain") if getattr(data, name) != DataSettings.defaults()[name]
        ]
        faults += [f"data.{name}: is for the task causal-lm only, and the task is {task}" for name in changed]
    if (data.format == "images") != (task == "image-classification") and data.format not in ("auto", "hub"):
        faults.append(f"data.format: {data.format!r} does not fit the task {task}")
    if task == "image-classification" and data.max_length is not None:
        faults.append("data.max_length: pictures have no tokens")
    return faults
