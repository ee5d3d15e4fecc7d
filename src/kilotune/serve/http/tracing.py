"""A span of OpenTelemetry for each request, where that is wanted; OpenTelemetry's own variables say where to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opentelemetry import propagate, trace

from ...errors import MissingExtraError
from ..learning.users import without_user

__all__ = ["begin", "end", "tracer"]

PREFIX = "kilotune."
FAILED = 500  # statuses from here on are the service's own failing


def tracer(wanted: bool) -> trace.Tracer | None:
    """What makes spans. Where the program that runs the service has set up OpenTelemetry, that is used.

    Raises:
        MissingExtraError: wanted, and nothing is set up or installed that could send them.

    """
    if not wanted:
        return None
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise MissingExtraError("opentelemetry-exporter-otlp-proto-http", "otel", "serve.telemetry") from error
        made = TracerProvider(resource=Resource.create({"service.name": "kilotune"}))
        made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        trace.set_tracer_provider(made)
    return trace.get_tracer("kilotune.serve")


def begin(tracer: trace.Tracer, method: str, path: str, headers: Mapping[str, str]) -> trace.Span:
    """The span of a request, within the caller's own where its headers say so."""
    known = {"http.request.method": method, "url.path": without_user(path)}
    return tracer.start_span(method, propagate.extract(headers), trace.SpanKind.SERVER, known)


def end(span: trace.Span, method: str, route: str, status: int, fields: Mapping[str, Any]) -> None:
    """Write what came of it, and end the span."""
    span.update_name(f"{method} {route}")
    span.set_attributes({"http.route": route, "http.response.status_code": status})
    told = {name: without_user(value) if isinstance(value, str) else value for name, value in fields.items()}
    span.set_attributes({PREFIX + name: value for name, value in told.items() if value is not None})
    if status >= FAILED:
        span.set_status(trace.StatusCode.ERROR)
    span.end()
