"""From names and settings to a service whose engine runs: what the command line does, and each replica."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ...bases import located
from ...config import AdapterConfig
from ...errors import ConfigError, TargetError
from ...methods import get_config
from ...model.last_blocks import blocks_of, in_last_blocks
from ...train.data.processors import load_tokenizer
from ...train.running.base_model import device_of, load_base, load_config
from ...train.running.held_dtype import held_dtype
from ...train.settings.sections import ModelSettings
from ...train.tasks import TASKS
from ..engine.continuous_batching import TransformersEngine
from ..engine.cores import apart
from ..engine.encoders import EncoderEngine, pooling_of
from ..engine.interface import Engine
from ..engine.tenant_adapters import AdapterRegistry
from ..learning.feedback import FeedbackLimits
from ..learning.gate import Bounds
from ..learning.jobs import JobLimits
from ..learning.learner import Learner, LearningSettings
from ..learning.training import Training, TrainingLimits
from ..twin import twin_of
from .keys import Key, Keyring
from .prompts import Prompts
from .service import Service
from .settings import EngineSettings, ServeSettings

__all__ = ["build", "task_of"]

CLASSES = {"generate": "causal-lm", "classify": "text-classification"}


def build(
    model: str, store: str, settings: ServeSettings, options: EngineSettings | None = None, more: tuple[Key, ...] = ()
) -> Service:
    """A service that is ready to answer: the base loaded, the store open, the engine warm.

    Args:
        model: the base's folder or hub id.
        store: the store's URL.
        settings: of the service; the file of keys is read here.
        options: of the engine.
        more: keys beside those of the file.

    Raises:
        KilotuneError: the base, the store, the keys or the settings cannot be had.

    """
    options = options or EngineSettings()
    keys = Keyring(settings.keys, more, None if settings.keys else settings.namespace)
    source = ModelSettings(base=model, revision=options.revision, dtype=options.dtype)
    config = load_config(source)
    task = task_of(config, options.task)
    tokenizer = load_tokenizer(model, options.revision)
    base, notes = apart(lambda: _base(source, task, options))
    base.eval()
    twin = twin_of(base) if settings.learn and task == "generate" else None
    with ExitStack() as held:
        adapters = AdapterRegistry(
            store,
            base,
            slots=options.slots,
            forms=options.forms,
            host_bytes=options.host_bytes,
            max_norm=options.max_norm,
            max_rank=options.max_rank,
            form_bytes=options.form_bytes,
            packing=options.packing,
            timeout=options.store_seconds,
        )
        held.callback(adapters.close)
        engine = _engine(task, adapters, tokenizer, options, _folder(model, options.revision))
        engine.start()
        held.callback(engine.stop)
        rows = int(base.get_input_embeddings().weight.shape[0])
        prompts = Prompts(tokenizer, rows, settings.own_chat_templates)
        service = Service(engine, adapters, prompts, keys, settings, settings.name or _last(model))
        service.notes = tuple(notes)
        if settings.learn:
            service.training = _training(store, twin, adapters, engine, tokenizer, service)
            service.training.start()
        held.pop_all()
    return service


def _training(
    store: str, twin: Any, adapters: AdapterRegistry, engine: Engine, tokenizer: Any, service: Service
) -> Training:
    """What trains beside the engine.

    Raises:
        ConfigError: the base does not generate, or no adapter can be made of the settings.

    """
    settings = service.settings
    if twin is None or not isinstance(engine, TransformersEngine):
        raise ConfigError("learn: only a language model that generates is trained; this base does something else")
    config = _config(settings.learn_method, settings.learn_rank)
    personal = _in_last_blocks(
        twin, _config(settings.learn_feedback_method, settings.learn_feedback_rank), settings.learn_last_blocks
    )
    learning = LearningSettings(
        share=settings.learn_share, pass_tokens=settings.learn_pass_tokens, threads=settings.learn_threads
    )
    learner = Learner(twin, adapters, engine, learning, engine.cores)
    jobs = JobLimits(open=settings.learn_jobs, tokens_a_day=settings.learn_tokens_a_day, memory=settings.learn_memory)
    feedback = FeedbackLimits(answer_bytes=settings.learn_answer_bytes)
    bounds = Bounds(divergence=settings.learn_kl)
    limits = TrainingLimits(file_bytes=settings.learn_file_bytes, jobs=jobs, feedback=feedback, bounds=bounds)
    made = Training(store, learner, adapters, engine, service.base, config, tokenizer, limits, personal)
    service.metrics.learns(made)
    return made


def _config(method: str, rank: int | None) -> AdapterConfig:
    """Of an adapter that begins; without a rank 256 of VeRA's, else the method's own."""
    wanted = 256 if rank is None and method == "vera" else rank
    return get_config(method, target_modules="all-linear", **({} if wanted is None else {"r": wanted}))


def _in_last_blocks(base: Any, config: AdapterConfig, last: int | None) -> AdapterConfig:
    """The config for the last blocks of the base; None: a quarter of them, where it has such."""
    try:
        count = len(blocks_of(base).modules)
    except TargetError:
        if last:
            raise
        return config
    wanted = max(1, round(count / 4)) if last is None else last
    return in_last_blocks(base, config, wanted) if 0 < wanted < count else config


def task_of(config: Any, wanted: str) -> str:
    """What a base is for.

    Raises:
        ConfigError: it is for nothing that can be served.

    """
    if wanted != "auto":
        return wanted
    named = " ".join(getattr(config, "architectures", None) or ())
    if "ForSequenceClassification" in named:
        return "classify"
    if "ForCausalLM" in named or "LMHeadModel" in named:
        return "generate"
    if "ForConditionalGeneration" in named or config.is_encoder_decoder:
        raise ConfigError(f"a {config.model_type} ({named}) has an encoder and a decoder, and cannot be served yet")
    return "embed"


def _base(source: ModelSettings, task: str, options: EngineSettings) -> tuple[Any, list[str]]:
    """The base on its device, and what to tell of it."""
    device = device_of(options.device)
    if task in CLASSES:
        made = load_base(source, TASKS[CLASSES[task]](), None, device).model
    else:
        import transformers

        from ...plan import DTYPES

        dtype = "auto" if source.dtype == "auto" else DTYPES[source.dtype]
        made = transformers.AutoModel.from_pretrained(located(source.base), revision=source.revision, dtype=dtype)
    held = held_dtype(made, source.dtype, device, backward=False)
    return held.apply(made).to(device), [held.note] if held.note else []


def _engine(task: str, adapters: AdapterRegistry, tokenizer: Any, options: EngineSettings, folder: Path) -> Engine:
    base = adapters.model.get_base_model()
    if task != "generate":
        pooling = pooling_of(folder) if task == "embed" else None
        return EncoderEngine(base, adapters, pooling=pooling, pad=tokenizer.pad_token_id)
    return TransformersEngine(
        base,
        tokenizer,
        adapters,
        max_running=options.max_running,
        batch_tokens=options.batch_tokens,
        cache_tokens=options.cache_tokens,
    )


def _folder(model: str, revision: str | None) -> Path:
    """Where the base's small files are: what sentence-transformers says of the pooling is not in the config."""
    if (folder := Path(located(model))).is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, allow_patterns=["modules.json", "*/config.json"]))


def _last(model: str) -> str:
    """The last part of a path or a hub id."""
    return Path(model.rstrip("/")).resolve().name if Path(model).exists() else model.rstrip("/").rpartition("/")[2]
