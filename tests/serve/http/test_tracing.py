"""Spans of OpenTelemetry: one for each request, within the caller's, with what the log has; none by default."""

from __future__ import annotations

import time
from pathlib import Path

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.serve.http.test_http_errors import GOOD
from tests.support.http_support import serving

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_span_for_each_request(tmp_path: Path) -> None:
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    trace.set_tracer_provider(provider)
    (tmp_path / "off").mkdir()
    with serving(tmp_path / "off") as running, running.client(running.keys["ann"]) as client:
        client.post("/v1/completions", json=GOOD)
    assert kept.get_finished_spans() == ()
    with serving(tmp_path, telemetry=True) as running, running.client(running.keys["ann"]) as client:
        client.post("/v1/completions", json={**GOOD, "stream": True}, headers={"traceparent": PARENT})
        client.post("/v1/completions", json={**GOOD, "model": "nothing"})
        while len(kept.get_finished_spans()) < 2:  # they end once the answer is out
            time.sleep(0.005)
    first, second = kept.get_finished_spans()
    assert first.name == "POST /v1/completions"
    assert first.parent is not None
    assert format(first.parent.span_id, "016x") == PARENT.split("-")[2]
    told = dict(first.attributes or {})
    assert (told["http.response.status_code"], told["kilotune.namespace"], told["kilotune.model"]) == (
        200,
        "ann",
        "poems",
    )
    assert told["kilotune.completion_tokens"] == 2
    assert dict(second.attributes or {})["kilotune.error"] == "model_not_found"
    assert "the cat" not in str([span.attributes for span in kept.get_finished_spans()])
