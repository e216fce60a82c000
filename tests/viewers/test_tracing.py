"""Traces of real sessions, received over OTLP/HTTP and decoded with OpenTelemetry's own types."""

from __future__ import annotations

import gzip
import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from harness import run

from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.latency import STAGES
from stream_mmrnn.core.settings import TraceSettings
from stream_mmrnn.core.types import Envelope, Stamps

pytest.importorskip("opentelemetry.sdk", reason="needs the extra `otel`")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra `otel`")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from stream_mmrnn.viewers.tracing import Tracer

pytestmark = pytest.mark.process


class Receiver:
    """A collector on loopback; `spans` are those that it received."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        self.code = 200
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                request = ExportTraceServiceRequest.FromString(body)
                if receiver.code == 200:
                    for resource in request.resource_spans:
                        for attribute in resource.resource.attributes:
                            if attribute.key == "service.name":
                                receiver.services.add(attribute.value.string_value)
                        for scope in resource.scope_spans:
                            receiver.spans.extend(scope.spans)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(receiver.code)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}/v1/traces"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


def prediction(tick: int, session: str = "s") -> Envelope:
    """Its stages take 1, 2, 3, ... ms."""
    end_ns = tick * 40_000_000
    at = [end_ns + round(n * (n + 1) / 2 * 1e6) for n in range(1, 8)]
    closed = Stamps(at[0], at[1], at[2], at[3], "feature/vision")
    message = wire.PredictionMessage(tick, end_ns, {"a": [0.5]}, {"vision": True}, {}, closed, at[4], at[5], "m")
    return Envelope(topics.PREDICTION, session, 0, end_ns, end_ns, at[6], wire.pack(message), "", at[6])


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: a.value for a in span.attributes}


def test_the_stages_of_a_prediction_are_consecutive_child_spans(receiver: Receiver) -> None:
    offset_ns = 1_700_000_000_000_000_000
    tracer = Tracer(TraceSettings(ratio=1.0, endpoint=receiver.endpoint), offset_ns)
    for tick in (1, 2, 2):  # the last one is republished
        tracer.observe(prediction(tick))
    tracer.observe(Envelope(topics.PREDICTION, "s", 0, 0, 0, 0, b"nix", "", 0))
    tracer.close()
    assert receiver.services == {"stream-mmrnn"}
    assert (tracer.traces, tracer.exported, tracer.failed, tracer.malformed) == (2, 16, 0, 1)
    roots = [s for s in receiver.spans if s.name == "prediction"]
    assert len(roots) == 2
    for root in roots:
        tick = attributes(root)["stream_mmrnn.tick"].int_value
        below = [s for s in receiver.spans if s.parent_span_id == root.span_id]
        assert [s.name for s in below] == list(STAGES[:-1])
        assert {s.trace_id for s in below} == {root.trace_id}
        assert below[0].start_time_unix_nano == root.start_time_unix_nano == offset_ns + tick * 40_000_000
        for before, after in itertools.pairwise(below):
            assert before.end_time_unix_nano == after.start_time_unix_nano
        assert below[-1].end_time_unix_nano == root.end_time_unix_nano
        took = [s.end_time_unix_nano - s.start_time_unix_nano for s in below]
        assert took == [n * 1_000_000 for n in range(1, 8)]
        assert attributes(root)["stream_mmrnn.closed_by"].string_value == "feature/vision"


def test_a_share_of_the_predictions_is_traced_completely(receiver: Receiver) -> None:
    tracer = Tracer(TraceSettings(ratio=0.25, endpoint=receiver.endpoint), 0)
    for tick in range(1, 401):
        tracer.observe(prediction(tick))
    tracer.close()
    assert 40 < tracer.traces < 180
    traces: dict[bytes, int] = {}
    for span in receiver.spans:
        traces[span.trace_id] = traces.get(span.trace_id, 0) + 1
    assert len(traces) == tracer.traces
    assert set(traces.values()) == {len(STAGES)}


def test_spans_that_the_collector_refuses_are_counted(receiver: Receiver) -> None:
    receiver.code = 400
    tracer = Tracer(TraceSettings(ratio=1.0, endpoint=receiver.endpoint), 0)
    tracer.observe(prediction(1))
    tracer.close()
    assert (tracer.exported, tracer.failed) == (0, 8)


def test_every_prediction_of_a_real_session_is_traced(receiver: Receiver, tmp_path: Path) -> None:
    settings = tmp_path / "s.toml"
    settings.write_text(f"[trace]\nratio = 1.0\nendpoint = '{receiver.endpoint}'\n[dashboard]\nenabled = false\n")
    code, summary, err = run("live", "--source", "synthetic", "--duration", 3, "--config", settings)
    assert code == 0, err
    roots = [s for s in receiver.spans if s.name == "prediction"]
    assert len(roots) > 10
    assert len(receiver.spans) == len(roots) * len(STAGES)
    assert len({attributes(r)["stream_mmrnn.tick"].int_value for r in roots}) == len(roots)
    viewer = summary["viewers"]["tracer"]
    assert viewer["balanced"], viewer
    assert summary["balanced"]


def test_without_a_collector_a_session_continues_and_reports_it(tmp_path: Path) -> None:
    settings = tmp_path / "s.toml"
    endpoint = "http://127.0.0.1:9/v1/traces"
    settings.write_text(f"[trace]\nratio = 1.0\nendpoint = '{endpoint}'\n[dashboard]\nenabled = false\n")
    code, summary, err = run("live", "--source", "synthetic", "--duration", 6, "--config", settings)
    assert (code, summary["failed"], summary["restarts"]) == (0, "", {})
    assert summary["predictions"] > 10
    assert f"the collector at {endpoint} does not take spans" in err


def test_without_the_extra_the_error_names_it(tmp_path: Path) -> None:
    settings = tmp_path / "s.toml"
    settings.write_text("[trace]\nratio = 1.0\n")
    blocked = (
        "import importlib.util, sys; find = importlib.util.find_spec;"
        "importlib.util.find_spec = lambda n, *a: None if n.startswith('opentelemetry') else find(n, *a);"
        "from stream_mmrnn.cli.app import run; sys.argv = ['stream-mmrnn', *sys.argv[1:]]; run()"
    )
    options = ["live", "--source", "synthetic", "--config", str(settings)]
    done = subprocess.run([sys.executable, "-c", blocked, *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "pip install 'stream-mmrnn[otel]'" in done.stderr
