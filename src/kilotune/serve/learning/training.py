"""Files and jobs of a service that trains: what its routes work with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from ...config import AdapterConfig
from ...fleet.store import open_store
from ...fleet.store.documents import Documents
from ...train.data.rendering import ChatTemplate
from ..engine.interface import AdapterKey, Engine
from ..engine.lanes import Lanes
from ..engine.tenant_adapters import AdapterRegistry
from .feedback import Feedback, FeedbackLimits, Room
from .file_reader import FileReader
from .forgetting import Forgetting
from .gate import Bounds
from .jobs import JobLimits, Jobs
from .learner import Learner
from .personal import PersonalRunner
from .rollback import RollbackRule
from .runner import JobRunner
from .scope import Likeness, Scopes, general_questions, lessons_in
from .study import Pace
from .training_file import Example, read_example

__all__ = ["Training", "TrainingLimits"]

GRADERS = 2  # that are at work at a time for requests, of different namespaces


@final
@dataclass(frozen=True, kw_only=True)
class TrainingLimits:
    """What a namespace may have. file_bytes: of all its files. jobs, feedback, rollback: see there. at_once: jobs in
    training here. pace, bounds: how it is learned from feedback, and what may go live."""

    file_bytes: int = 2**30
    jobs: JobLimits = field(default_factory=JobLimits)
    feedback: FeedbackLimits = field(default_factory=FeedbackLimits)
    at_once: int = 32
    pace: Pace = field(default_factory=Pace)
    bounds: Bounds = field(default_factory=Bounds)
    rollback: RollbackRule = field(default_factory=RollbackRule)


@final
class Training:
    """Everything beside an engine that learns: made before its service, started and ended with it.

    Args:
        store: the URL of the store, in a database.
        learner: trains; over the twin of the engine's base.
        adapters: of the engine.
        engine: how long a row may be.
        base: what requests call the base.
        config: of the adapters of jobs that begin with the base.
        tokenizer: of the base.
        limits: of each namespace.
        personal: of the adapters that learn from feedback; None: as jobs' have.

    Raises:
        UnsupportedError: the store keeps no documents. ConfigError: the tokenizer has no chat template.

    """

    def __init__(
        self,
        store: str,
        learner: Learner,
        adapters: AdapterRegistry,
        engine: Engine,
        base: str,
        config: AdapterConfig,
        tokenizer: Any,
        limits: TrainingLimits | None = None,
        personal: AdapterConfig | None = None,
    ) -> None:
        self.limits = limits or TrainingLimits()
        self.learner = learner
        self.grading = Lanes("kilotune-graders", GRADERS, 1)
        self._store = open_store(store)
        self._documents, self._room = Documents(self._store), Room()
        chats = ChatTemplate(tokenizer)
        self._files = FileReader(tokenizer, engine.max_length)

        def make(given: Mapping[str, Any], form: str) -> Example:
            return read_example(given, form, chats, tokenizer, longest=engine.max_length)

        self._scopes = Scopes(Likeness(learner.embedding, tokenizer, general_questions()))
        own = self.limits
        self.personal = PersonalRunner(
            self._documents,
            learner,
            adapters,
            engine,
            personal or config,
            make,
            own.pace,
            own.bounds,
            own.rollback,
            scopes=self._scopes,
        )
        self._runner = JobRunner(
            self._documents, learner, adapters, base, config, self._files.read, self.limits.jobs, self.limits.at_once
        )

        self._adapters = adapters
        self.forgetting = Forgetting(self._documents, adapters, base, self._scopes)

    def answers(self, key: AdapterKey, user: str, asked: Sequence[str]) -> bool:
        """Whether a version of a user's own model learned of something near what is asked. Waits for the store.

        Args:
            key: the version; one that learned from no feedback answers everything.
            user: whose it is.
            asked: what they say in the conversation.

        Raises:
            AdapterError: there is no such version any more.

        """
        feedback = self.feedback(key.namespace)
        return self._scopes.near(key, asked, lambda: lessons_in(self._adapters, feedback, key, user))

    def start(self) -> None:
        """Begin to train."""
        self.learner.start()
        self._runner.start()
        self.personal.start()
        self.forgetting.start()

    def close(self) -> None:
        """End; jobs stay where they are, for the next start or another server."""
        self.grading.close()
        self.forgetting.stop()
        self.personal.stop()
        self._runner.stop()
        self._files.close()
        self.learner.stop()
        self._store.close()

    def jobs_open(self) -> Mapping[str, int]:
        """Jobs of all servers that are not done, by state, as of some seconds ago."""
        return self._runner.open

    def jobs_ended(self) -> Mapping[str, int]:
        """Jobs that were ended here, by state."""
        return self._runner.ended

    def check_model(self, namespace: str, model: str) -> None:
        """See :meth:`JobRunner.check_model`."""
        self._runner.check_model(namespace, model)

    def documents(self, namespace: str) -> Documents:
        """Those of a namespace."""
        return self._documents.within(namespace)

    def jobs(self, namespace: str) -> Jobs:
        """Those of a namespace."""
        return Jobs(self.documents(namespace), self.limits.jobs)

    def feedback(self, namespace: str) -> Feedback:
        """That of a namespace."""
        return Feedback(self.documents(namespace), self.limits.feedback, room=self._room)
