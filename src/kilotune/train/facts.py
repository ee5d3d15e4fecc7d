"""The plan that is printed before a training starts."""

from __future__ import annotations

from .session import Session
from .trainer import steps_of_epoch, total_steps

__all__ = ["plan_lines"]


def plan_lines(session: Session) -> list[str]:
    """What is going to happen, a line each."""
    settings, prepared = session.settings, session.prepared
    rows = len(prepared.train)  # type: ignore[arg-type]
    trained = sum(p.numel() for p in session.model.parameters() if p.requires_grad)
    lines = [f"{settings.task}, {settings.adapter.method} on {settings.model.base}: {trained:,} numbers are trained"]
    steps = total_steps(settings, prepared)
    epoch = steps_of_epoch(settings, prepared)
    lines.append(f"{rows:,} rows, {prepared.tokens:,} tokens an epoch; {steps:,} steps, {epoch:,} an epoch")
    return [*lines, *session.notes]
