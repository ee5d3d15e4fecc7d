"""What is counted: for Prometheus, with a bounded number of tenants, and each tenant's last minutes for the page."""

from __future__ import annotations

import copy
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any, final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..engine.interface import EngineStats
from ..learning.personal import LearningCounts
from ..learning.training import Training
from ..learning.users import without_user

__all__ = ["Metrics", "Recent"]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
OTHER = "other"
SPAN = 10  # seconds over which the page's rates are taken
KEPT = 512  # first tokens and ends that percentiles are of
TENANTS = 4096  # whose last minutes are kept


@final
class Recent:
    """One tenant's last answers: tokens by second, and how long the last ones took."""

    def __init__(self) -> None:
        self.tokens: deque[tuple[int, int]] = deque(maxlen=SPAN + 1)
        self.first: deque[float] = deque(maxlen=KEPT)
        self.whole: deque[float] = deque(maxlen=KEPT)
        self.running = self.requests = self.errors = 0

    def add_token(self, now: float) -> None:
        second = int(now)
        if self.tokens and self.tokens[-1][0] == second:
            self.tokens[-1] = (second, self.tokens[-1][1] + 1)
        else:
            self.tokens.append((second, 1))

    def to_dict(self) -> dict[str, Any]:
        """For the page: times in seconds, None where there are none yet."""
        since = int(time.monotonic()) - SPAN
        return {
            "tokens_per_second": sum(count for second, count in self.tokens if second >= since) / SPAN,
            "running": self.running,
            "requests": self.requests,
            "errors": self.errors,
            "first_token_p50": percentile(self.first, 0.5),
            "first_token_p99": percentile(self.first, 0.99),
            "answer_p50": percentile(self.whole, 0.5),
            "answer_p99": percentile(self.whole, 0.99),
        }


def percentile(values: deque[float], part: float) -> float | None:
    """The value that so great a part of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)] if ordered else None


@final
class _EngineNumbers(Collector):
    """The engine as it stands when somebody asks."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        now = self._stats()
        for name, text, value in (
            ("waiting", "Requests that wait in the engine.", now.waiting),
            ("running", "Requests that the engine runs.", now.running),
            ("cache_used", "The part of the key-value cache in use.", now.cache),
            ("adapters_resident", "Adapters on the device.", now.resident),
            ("adapter_slots", "Adapters that the device can hold.", now.slots),
        ):
            yield GaugeMetricFamily(f"kilotune_engine_{name}", text, value=value)
        for name, text, count in (
            ("generated_tokens", "Tokens generated since the start.", now.tokens),
            ("steps", "Steps of the engine since the start.", now.steps),
        ):
            yield CounterMetricFamily(f"kilotune_engine_{name}", text, value=count)


@final
class _TrainingNumbers(Collector):
    """What trains, when somebody asks."""

    def __init__(self, training: Training) -> None:
        self._training = training

    def collect(self) -> Iterator[Metric]:
        now = self._training.learner.stats()
        for name, text, count in (
            ("passes", "Passes of training since the start.", now.passes),
            ("seconds", "Seconds of the processor that these took.", now.seconds),
            ("tokens", "Tokens of these, filled up to the longest row.", now.tokens),
            ("waiting_seconds", "Seconds in which training waited for answers.", now.waited),
            ("failed", "Operations of training that failed.", now.failed),
        ):
            yield CounterMetricFamily(f"kilotune_training_{name}", text, value=count)
        yield GaugeMetricFamily("kilotune_training_models", "Models that are in training here.", value=now.models)
        jobs = GaugeMetricFamily(
            "kilotune_jobs_open", "Fine-tuning jobs of all servers that are not done, by state.", labels=["state"]
        )
        for state, count in self._training.jobs_open().items():
            jobs.add_metric([state], count)
        yield jobs
        ended = CounterMetricFamily(
            "kilotune_jobs_ended", "Fine-tuning jobs that ended here, by state.", labels=["state"]
        )
        for state in ("succeeded", "failed"):
            ended.add_metric([state], self._training.jobs_ended().get(state, 0))
        yield ended


@final
class _FeedbackNumbers(Collector):
    """What learning from feedback has done, when somebody asks."""

    def __init__(self, counts: Callable[[], LearningCounts]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        now = self._counts()
        runs = CounterMetricFamily(
            "kilotune_learning_runs",
            "Runs of learning from feedback, by what came of them.",
            labels=["result"],
        )
        for result in ("learned", "refused", "failed", "taken_back"):
            runs.add_metric([result], getattr(now, result))
        yield runs
        for name, text, count in (
            ("learning_lessons", "Pieces of feedback that went live.", now.lessons),
            ("learning_corrections", "Of these, corrections.", now.corrections),
            ("learning_seconds", "Seconds of all runs.", now.seconds),
            (
                "correction_seconds",
                "Seconds from corrections to when they were live.",
                now.correction_seconds,
            ),
            ("rollbacks", "Shared adapters that went back by their ratings.", now.rolled_back),
        ):
            yield CounterMetricFamily(f"kilotune_{name}", text, value=count)


@final
class _OfOne(CollectorRegistry):
    """What of a registry is one tenant's own; nothing of others, and nothing of all together, which tells of them."""

    def __init__(self, whole: CollectorRegistry, tenant: str) -> None:
        super().__init__()
        self._whole, self._tenant = whole, tenant

    def collect(self) -> Iterator[Metric]:
        for metric in self._whole.collect():
            if own := [sample for sample in metric.samples if sample.labels.get("tenant") == self._tenant]:
                shown = copy.copy(metric)
                shown.samples = own
                yield shown


@final
class _ByAdapter:
    """What is counted of each adapter; its labels are few (:meth:`Metrics.of_adapter`)."""

    def __init__(self, registry: CollectorRegistry) -> None:
        both = ("tenant", "adapter")

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"kilotune_adapter_{name}", text, (*both, *more), registry=registry)

        self.requests = counter("requests", "Requests that came to the engine, by adapter and status.", "status")
        self.prompt = counter("prompt_tokens", "Tokens of prompts, by adapter.")
        self.cached = counter("cached_tokens", "Of the prompts, tokens that were in the cache, by adapter.")
        self.completion = counter("completion_tokens", "Tokens of answers, by adapter.")
        self.first = Histogram(
            "kilotune_adapter_first_token_seconds", "Seconds to an answer's first token, by adapter.", both,
            buckets=SECONDS, registry=registry,
        )  # fmt: skip


@final
class Metrics:
    """Used on the loop's thread.

    Tenants beyond the first ``tenants``, and adapters beyond the first ``adapters`` that are asked, share one label.
    base: what the base alone is called, as an adapter.
    """

    def __init__(self, tenants: int, adapters: int, base: str, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineNumbers(stats))
        self.by_adapter = _ByAdapter(self.registry)
        self._named: set[str] = set()
        self._most = tenants
        self._adapters: set[tuple[str, str]] = set()
        self._most_adapters, self._base = adapters, base
        self._recent: OrderedDict[str, Recent] = OrderedDict()
        to = self.registry
        self.requests = Counter(
            "kilotune_requests", "Requests, by route, status and tenant.", ("route", "status", "tenant"), registry=to
        )
        self.seconds = Histogram(
            "kilotune_request_seconds", "Seconds of a request.", ("route",), buckets=SECONDS, registry=to
        )
        self.first = Histogram(
            "kilotune_first_token_seconds", "Seconds to an answer's first token.", buckets=SECONDS, registry=to
        )
        self.queue = Histogram(
            "kilotune_queue_seconds", "Seconds until the engine began with an answer.", buckets=SECONDS, registry=to
        )
        self.between = Histogram(
            "kilotune_token_seconds", "Seconds between two tokens of an answer.", buckets=SECONDS, registry=to
        )
        self.prompt = Counter("kilotune_prompt_tokens", "Tokens of prompts, by tenant.", ("tenant",), registry=to)
        self.completion = Counter(
            "kilotune_completion_tokens", "Tokens of answers, by tenant.", ("tenant",), registry=to
        )
        self.cached = Counter("kilotune_cached_tokens", "Of the prompts, tokens that were in the cache.", registry=to)

    def learns(self, training: Training) -> None:
        """Count what training and learning from feedback do, too."""
        self.registry.register(_FeedbackNumbers(training.personal.counts))
        self.registry.register(_TrainingNumbers(training))

    def label(self, tenant: str | None) -> str:
        """A tenant's label: its own for the first ones, and no more labels however many come."""
        if tenant is None:
            return ""
        if tenant not in self._named:
            if len(self._named) >= self._most or tenant == OTHER:  # who is called so counts among the others
                return OTHER
            self._named.add(tenant)
        return tenant

    def of_adapter(self, tenant: str, name: str | None) -> tuple[str, str]:
        """The labels of a tenant's adapter, or of the base for it.

        There are no more of them than named adapters, and for each label of tenants one for the base and one for the
        adapters that are not named.
        """
        label = self.label(tenant)
        if name is None:
            return label, self._base
        name = without_user(name)
        if label == OTHER or name in (OTHER, self._base):
            return label, OTHER
        if (tenant, name) not in self._adapters:
            if len(self._adapters) >= self._most_adapters:
                return label, OTHER
            self._adapters.add((tenant, name))
        return label, name

    def recent(self, tenant: str) -> Recent:
        """A tenant's last minutes."""
        found = self._recent.pop(tenant, None) or Recent()
        self._recent[tenant] = found
        while len(self._recent) > TENANTS:
            self._recent.popitem(last=False)
        return found

    def text(self, tenant: str | None = None) -> bytes:
        """In Prometheus' text format; of one tenant its own series alone, none where it counts among the others."""
        if tenant == OTHER:  # all that has this label is of several
            return b""
        return generate_latest(self.registry if tenant is None else _OfOne(self.registry, tenant))
