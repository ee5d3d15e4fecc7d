"""Files and fine-tuning jobs as OpenAI's API has them: bodies of requests, objects of answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, final

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from ...fleet.store.documents import Document
from ..learning.graders import Graded, Grader
from ..learning.jobs import Asked
from ..learning.users import PERSONAL
from .bodies import Body
from .options import Option

__all__ = [
    "GraderBody",
    "JobBody",
    "RunBody",
    "checkpoint_object",
    "event_object",
    "file_object",
    "graded_object",
    "job_object",
    "page",
]

Auto = Literal["auto"]
Epochs = Auto | Annotated[int, Field(ge=1, le=50)]
Batch = Auto | Annotated[int, Field(ge=1, le=256)]
Multiplier = Auto | Annotated[float, Field(gt=0, le=1000)] | Annotated[int, Field(ge=1, le=1000)]
Compute = Auto | Annotated[float, Field(gt=0, le=8)] | Annotated[int, Field(ge=1, le=8)]
Interval = Auto | Annotated[int, Field(ge=1, le=100_000)]
Samples = Auto | Annotated[int, Field(ge=1, le=16)]
Beta = Auto | Annotated[float, Field(gt=0, le=2)] | Annotated[int, Field(ge=1, le=2)]
GRADER_ERRORS = (
    "formula_parse_error",
    "sample_parse_error",
    "truncated_observation_error",
    "unresponsive_reward_error",
    "invalid_variable_error",
    "other_error",
    "python_grader_server_error",
    "python_grader_runtime_error",
    "model_grader_server_error",
    "model_grader_refusal_error",
    "model_grader_parse_error",
)
METHODS = ("supervised", "dpo", "reinforcement")
HYPER = {
    "supervised": {"n_epochs": "epochs", "batch_size": "batch_size", "learning_rate_multiplier": "rate_multiplier"},
    "dpo": {"beta": "beta"},
    "reinforcement": {name: name for name in ("compute_multiplier", "eval_interval", "eval_samples")},
}  # OpenAI's names, and a job's own
SHOWN_AS = {"paused": "queued", "held": "queued"}  # words that OpenAI's clients do not know


def _whole(given: dict[str, Any]) -> dict[str, Any]:
    """Objects of any kind: their names and texts are characters, as those of fields are."""
    try:
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("surrogate", "holds half of a surrogate pair, which is no character") from None
    return given


Free = Annotated[dict[str, Any], AfterValidator(_whole)]


class Hyper(Body):
    """What every method has."""

    n_epochs: Epochs = "auto"
    batch_size: Batch = "auto"
    learning_rate_multiplier: Multiplier = "auto"


@final
class DpoHyper(Hyper):
    """DPO's."""

    beta: Beta = "auto"


@final
class SupervisedBody(Body):
    """``method.supervised``."""

    hyperparameters: Hyper | None = None


@final
class DpoBody(Body):
    """``method.dpo``."""

    hyperparameters: DpoHyper | None = None


@final
class ReinforcementHyper(Hyper):
    """Reinforcement's."""

    compute_multiplier: Compute = Field("auto", description="Of the 8 answers to each prompt of a step.")
    eval_interval: Interval = Field("auto", description="Steps between looks at the validation file; auto: an epoch.")
    eval_samples: Samples = Field("auto", description="Answers to each of its prompts then; auto: 1.")
    neutral: ClassVar[Mapping[str, Option]] = {"reasoning_effort": Option("reasoning_effort", Literal["default"])}


@final
class ReinforcementBody(Body):
    """``method.reinforcement``."""

    grader: Free = Field(description="Of type string_check, text_similarity or multi.")
    hyperparameters: ReinforcementHyper | None = None


@final
class MethodBody(Body):
    """``method``."""

    type: str = Field(max_length=100)
    supervised: SupervisedBody | None = None
    dpo: DpoBody | None = None
    reinforcement: ReinforcementBody | None = None

    @model_validator(mode="after")
    def _served(self) -> MethodBody:
        if self.type not in METHODS:
            told = f"{self.type!r} is not served; taken are {', '.join(map(repr, METHODS))}"
            raise PydanticCustomError("not_served", "{told}", {"option": "type", "told": told})
        for other in METHODS:
            if other != self.type and getattr(self, other) is not None:
                raise PydanticCustomError("lacking", "not with this type", {"option": other})
        if self.type == "reinforcement" and self.reinforcement is None:
            raise PydanticCustomError("lacking", "is missing; it has the grader", {"option": "reinforcement"})
        return self

    @property
    def own(self) -> Any:
        """What this type has."""
        return getattr(self, self.type)


@final
class JobBody(Body):
    """``POST /v1/fine_tuning/jobs``."""

    model: str = Field(min_length=1, max_length=400)
    training_file: str = Field(min_length=1, max_length=200)
    validation_file: str | None = Field(None, min_length=1, max_length=200)
    suffix: str | None = Field(None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._ -]+$")
    seed: int | None = Field(None, ge=0, lt=2**31)
    method: MethodBody | None = None
    hyperparameters: Hyper | None = Field(None, description="The old place of a supervised method's.")
    integrations: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="Not served.")
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], AfterValidator(_whole)] | None = Field(
        None, max_length=16
    )

    @model_validator(mode="after")
    def _has_effect(self) -> JobBody:
        asked = self.asked
        for option in ("eval_interval", "eval_samples"):
            if self.validation_file is None and getattr(asked, option) is not None:
                raise PydanticCustomError("lacking", "no effect without validation_file", {"option": option})
        return self

    @model_validator(mode="after")
    def _one_place(self) -> JobBody:
        if self.hyperparameters is not None and self.method is not None:
            raise PydanticCustomError("lacking", "the old place; say it in method", {"option": "hyperparameters"})
        return self

    @property
    def asked(self) -> Asked:
        """As jobs take it."""
        kind = "supervised" if self.method is None else self.method.type
        own = None if self.method is None else self.method.own
        hyper: Any = self.hyperparameters if self.method is None else getattr(own, "hyperparameters", None)

        def told(name: str) -> Any:
            value = getattr(hyper, name, "auto")  # of another method, or where nothing is said
            return None if value == "auto" else value

        return Asked(
            model=self.model,
            method=kind,
            training_file=self.training_file,
            validation_file=self.validation_file,
            epochs=told("n_epochs"),
            batch_size=told("batch_size"),
            rate_multiplier=told("learning_rate_multiplier"),
            beta=told("beta"),
            grader=getattr(own, "grader", None),
            compute_multiplier=told("compute_multiplier"),
            eval_interval=told("eval_interval"),
            eval_samples=told("eval_samples"),
            seed=self.seed,
            suffix=self.suffix,
            metadata=self.metadata,
        )


@final
class RunBody(Body):
    """``POST /v1/fine_tuning/alpha/graders/run``."""

    grader: Free = Field(description="Of type string_check, text_similarity or multi.")
    model_sample: str = Field(description="What a model said.")
    item: Free | None = Field(None, description="The row, whose fields templates have as item.")


@final
class GraderBody(Body):
    """``POST /v1/fine_tuning/alpha/graders/validate``."""

    grader: Free = Field(description="Of type string_check, text_similarity or multi.")


def graded_object(grader: Grader, graded: Graded, seconds: float) -> dict[str, Any]:
    """OpenAI's GraderRunResponse; seconds: that it took."""
    errors: dict[str, Any] = dict.fromkeys(GRADER_ERRORS, False)
    if graded.fault is not None:
        errors[graded.fault] = True
    parts = {name: score for name, score in graded.scores.items() if name}  # the formula's has none
    return {
        "reward": graded.reward,
        "metadata": {
            "name": grader.name,
            "type": grader.kind,
            "errors": errors,
            "execution_time": seconds,
            "scores": parts,
            "sampled_model_name": None,
            "token_usage": None,
        },
        "sub_rewards": parts if grader.kind == "multi" else {},
        "model_grader_token_usage_per_model": {},
    }


def file_object(one: Document) -> dict[str, Any]:
    """OpenAI's FileObject."""
    return {
        "id": one.name,
        "object": "file",
        "bytes": one.size,
        "created_at": int(one.created),
        "expires_at": None if one.until is None else int(one.until),
        "filename": one.data["filename"],
        "purpose": one.data["purpose"],
        "status": "processed",
        "status_details": None,
    }


def job_object(job: Document, namespace: str) -> dict[str, Any]:
    """OpenAI's FineTuningJob."""
    asked, made = job.data, job.data["made"] or {}
    hyper = {name: made.get(name, asked.get(own) or "auto") for name, own in HYPER["supervised"].items()}
    more = {name: made.get(name, asked.get(own) or "auto") for name, own in HYPER.get(asked["method"], {}).items()}
    method: dict[str, Any] = {"hyperparameters": {**hyper, **more}}
    if asked.get("grader") is not None:
        method["grader"] = asked["grader"]
    model = PERSONAL if asked["model"].startswith(f"{PERSONAL}:") else asked["model"]  # colleagues see it, too
    return {
        "id": job.name,
        "object": "fine_tuning.job",
        "created_at": int(job.created),
        "finished_at": None if asked["finished"] is None else int(asked["finished"]),
        "model": model,
        "fine_tuned_model": asked.get("fine_tuned_model"),
        "organization_id": namespace,
        "status": SHOWN_AS.get(job.state, _status(job)),
        "hyperparameters": hyper,
        "method": {"type": asked["method"], asked["method"]: method},
        "training_file": asked["training_file"],
        "validation_file": asked["validation_file"],
        "result_files": asked["results"],
        "trained_tokens": asked["tokens"] if job.state == "succeeded" else None,
        "error": asked["error"],
        "seed": asked["seed"],
        "estimated_finish": None,
        "integrations": [],
        "metadata": asked["metadata"],
        "user_provided_suffix": asked["suffix"],
    }


def _status(job: Document) -> str:
    return "validating_files" if job.state == "running" and job.data["made"] is None else job.state


def event_object(one: Document) -> dict[str, Any]:
    """OpenAI's FineTuningJobEvent."""
    told = one.data
    return {
        "id": one.name,
        "object": "fine_tuning.job.event",
        "created_at": int(one.created),
        "level": told["level"],
        "message": told["message"],
        "type": told["type"],
        "data": told["data"],
    }


def checkpoint_object(one: Document) -> dict[str, Any]:
    """OpenAI's FineTuningJobCheckpoint."""
    return {
        "id": one.name,
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(one.created),
        "fine_tuned_model_checkpoint": one.data["model"],
        "fine_tuning_job_id": one.parent,
        "metrics": {"step": one.data["step"], **one.data["metrics"]},
        "step_number": one.data["step"],
    }


def page(data: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A list; data: one more than wanted, where there are more."""
    shown = list(data[:limit])
    ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
    return {"object": "list", "data": shown, "has_more": len(data) > limit, **ends}
