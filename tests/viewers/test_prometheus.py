"""The metrics of a real session, read by prometheus-client's parser, promtool and Prometheus."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from importlib import resources
from typing import Any

import msgspec
import pytest
from harness import Running
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT
from prometheus_client.parser import text_string_to_metric_families

from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.types import Envelope, Stamps
from stream_mmrnn.viewers.prometheus import FAMILIES, Metrics, table

DASHBOARD = json.loads(resources.files("stream_mmrnn.viewers.dashboard").joinpath("grafana.json").read_text())
QUERIES = sorted({t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"]})
_S = 1_000_000_000

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(text: bytes) -> Samples:
    """By name and labels, as another program parses them."""
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text.decode())
        for s in family.samples
    }


def get(address: str, path: str) -> bytes:
    with urllib.request.urlopen(address + path, timeout=10) as answer:
        content: bytes = answer.read()
        return content


# ---- without a session --------------------------------------------------------------------------------------------


def envelope(topic: str, payload: Any, at_ns: int, session: str = "s", event_ns: int | None = None) -> Envelope:
    return Envelope(topic, session, 0, at_ns if event_ns is None else event_ns, at_ns, at_ns, payload, "", at_ns)


def status(node: str, at_ns: int, state: Any = "ready", **more: Any) -> Envelope:
    return envelope(topics.STATUS + node, wire.pack(wire.StatusMessage(node, state, 1, **more)), at_ns, topics.EVERYONE)


def prediction(tick: int, total_ns: int) -> Envelope:
    at_ns = tick * 40_000_000
    closed = Stamps(at_ns, at_ns, at_ns, at_ns, "clock")
    message = wire.PredictionMessage(tick, at_ns, {"a": [0.5]}, {}, {}, closed, at_ns, at_ns + total_ns, "m")
    return envelope(topics.PREDICTION, wire.pack(message), at_ns + total_ns, event_ns=at_ns)


def test_counts_become_counters_and_time_becomes_seconds() -> None:
    metrics = Metrics()
    metrics.observe(
        status("camera", _S, "open", modality="vision", counts={"published": 7, "stale": 2, "stale_ms": 1500})
    )
    aligned = {"streams": {"vision": {"used": 5, "late": 2}}}
    metrics.observe(status("engine", _S, counts={"ticks": 5, "predictions": 5, "sessions": 1}, detail=aligned))
    metrics.observe(envelope(topics.feature("vision"), b"", _S))
    for tick in (1, 2, 2):  # the last one is republished after a crash
        metrics.observe(prediction(tick, 20_000_000))
    samples = read(metrics.text(2 * _S))
    vision = ("stream", "vision")
    p = "stream_mmrnn_"
    assert samples[p + "features_published_total", (vision,)] == 7
    assert samples[p + "features_delivered_total", (vision,)] == 5
    assert samples[p + "features_dropped_total", (("reason", "late"), vision)] == 2
    assert samples[p + "features_dropped_total", (("reason", "lost"), vision)] == 0
    assert samples[p + "stream_stale_seconds_total", (vision,)] == 1.5
    assert samples[p + "stream_age_seconds", (vision,)] == 1.0
    assert samples[p + "prediction_stage_seconds_count", (("stage", "total"),)] == 2
    assert math.isclose(samples[p + "prediction_stage_seconds_sum", (("stage", "total"),)], 0.04)
    assert samples[p + "prediction_stage_seconds_bucket", (("le", "0.02"), ("stage", "step"))] == 2
    assert samples[p + "prediction_stage_seconds_bucket", (("le", "0.01"), ("stage", "step"))] == 0


def test_a_process_is_up_until_it_is_silent_or_dead() -> None:
    metrics, up = Metrics(), ("stream_mmrnn_process_up", (("node", "engine"),))
    assert metrics.why_not_ready(_S) == "the clock is silent"
    metrics.observe(envelope(topics.CLOCK, b"", _S))
    metrics.observe(status("engine", _S, counts={"ticks": 3}))
    assert (read(metrics.text(2 * _S))[up], metrics.why_not_ready(2 * _S)) == (1, "")
    assert read(metrics.text(9 * _S))[up] == 0
    metrics.observe(envelope(topics.CLOCK, b"", 9 * _S))
    assert metrics.why_not_ready(9 * _S) == "the engine is silent"
    metrics.observe(status("engine", 9 * _S, "restarting"))
    samples = read(metrics.text(9 * _S))
    assert metrics.why_not_ready(9 * _S) == "the engine is restarting"
    assert samples[up] == 0
    assert samples["stream_mmrnn_process_restarts_total", (("node", "engine"),)] == 1
    assert samples["stream_mmrnn_process_state", (("node", "engine"), ("state", "restarting"))] == 1
    # the counts of a dead process stay
    assert samples["stream_mmrnn_engine_ticks_total", ()] == 3
    metrics.observe(status("engine", 10 * _S))
    assert (read(metrics.text(10 * _S))[up], metrics.why_not_ready(10 * _S)) == (1, "")


_counts = st.dictionaries(
    st.sampled_from(["published", "captured", "stale_ms", "ticks", "refused", "x"]), st.integers()
)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.dictionaries(st.sampled_from(["streams", "vision", "used", "denied", "late"]), inner, max_size=3),
)
_statuses = st.fixed_dictionaries(
    {
        "node": st.text(max_size=5),
        "state": st.sampled_from(["ready", "open", "failed", "no such"]),
        "modality": st.sampled_from(["", "vision", "text", 'nix"}\n']),
        "counts": _counts,
        "detail": st.dictionaries(st.sampled_from(["streams", "denied"]), _json),
    }
)


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["engine", "camera", "broker", "dashboard", "recorder", 'a"b', "é", "x" * 90, ""]),
            st.binary(max_size=30) | _statuses.map(msgspec.json.encode),
        ),
        max_size=8,
    )
)
def test_any_status_gives_valid_text(statuses: list[tuple[str, bytes]]) -> None:
    metrics = Metrics()
    for name, payload in statuses:
        metrics.observe(envelope(topics.STATUS + name, payload, _S))
        metrics.observe(envelope(topics.PREDICTION, payload, _S))
    for (name, labels), value in read(metrics.text(_S)).items():
        assert name.startswith("stream_mmrnn_")
        assert value >= 0
        assert {k for k, _ in labels} <= {"node", "state", "stream", "reason", "stage", "le"}


def test_names_are_bounded() -> None:
    metrics = Metrics()
    for i in range(1000):
        metrics.observe(status(f"node{i}", _S))
    samples = read(metrics.text(_S))
    assert sum(name == "stream_mmrnn_process_up" for name, _ in samples) == 64
    assert samples["stream_mmrnn_unreadable_messages_total", ()] == 1000 - 64


def test_names_follow_prometheus_rules() -> None:
    for family in FAMILIES.values():
        assert (family.kind == "counter") == family.name.endswith("_total")
        assert not re.search(r"_(ms|ns|milliseconds|mb|percent)(_|$)", family.name)
        assert "session" not in family.labels
        assert family.help.endswith(".")


def test_the_documentation_has_the_same_table() -> None:
    assert table() in (ROOT / "docs" / "observe.md").read_text()


# ---- a real session -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of a session that runs for all tests."""
    folder = tmp_path_factory.mktemp("metrics")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    live = Running("--source", "synthetic", "--record", folder / "talk.mcap", "--port", port)
    address = f"http://127.0.0.1:{port}"

    def predicts() -> bool:
        try:
            return read(get(address, "/metrics")).get(("stream_mmrnn_engine_predictions_total", ()), 0) > 0
        except OSError:
            return False

    with closing(live):
        live.wait_for(predicts, 60)
        yield address
        code, summary, _ = live.end(signal.SIGINT)
        assert code == 0
        assert summary["balanced"]


@pytest.mark.process
def test_a_session_has_every_metric(address: str) -> None:
    assert get(address, "/healthz") == b"ok\n"
    assert get(address, "/readyz") == b"ready\n"
    text = get(address, "/metrics").decode()
    for family in FAMILIES.values():
        assert f"# HELP {family.full_name} {family.help}\n" in text
        assert f"# TYPE {family.full_name} {family.kind}\n" in text
    samples = read(text.encode())
    without = {name for name in FAMILIES if not any(n.startswith("stream_mmrnn_" + name) for n, _ in samples)}
    assert without == {"bus_denied_connections_total"}  # only with keys
    assert {dict(labels)["node"] for name, labels in samples if name == "stream_mmrnn_process_up"} >= {
        *("camera", "microphone", "text", "clock", "engine", "journal", "recorder", "dashboard")
    }


@pytest.mark.process
def test_counters_only_grow(address: str) -> None:
    first = read(get(address, "/metrics"))
    time.sleep(1.2)
    then = read(get(address, "/metrics"))
    counters = {f.full_name for f in FAMILIES.values() if f.kind == "counter"}
    for key, value in first.items():
        if key[0] in counters or key[0].endswith(("_bucket", "_count")):
            assert then[key] >= value, key
    key = ("stream_mmrnn_prediction_stage_seconds_count", (("stage", "total"),))
    assert then[key] > first[key]


_SELECTOR = re.compile(r"(stream_mmrnn_\w+)(?:\{([^}]*)\})?(\[)?")
_MATCHER = re.compile(r'(\w+)(=|!=)"([^"]*)"')


@pytest.mark.process
@pytest.mark.parametrize("query", QUERIES)
def test_every_query_of_the_dashboard_uses_existing_metrics(query: str, address: str) -> None:
    samples = read(get(address, "/metrics"))
    labels_of: dict[str, list[dict[str, str]]] = {}
    for name, labels in samples:
        labels_of.setdefault(name, []).append(dict(labels))
    kinds = {f.full_name: f.kind for f in FAMILIES.values()}
    selectors = list(_SELECTOR.finditer(query))
    assert selectors
    for found in selectors:
        name, matchers, ranged = found.groups()
        assert name in labels_of, query
        base = name.removesuffix("_bucket")
        assert bool(ranged) == (kinds[base] != "gauge"), f"{query}: rate() is for counters, and counters need it"
        for label, how, value in _MATCHER.findall(matchers or ""):
            here = {labels.get(label) for labels in labels_of[name]}
            assert value in here, f"{query}: no {name} has {label} {value}"
            assert how == "=" or len(here) > 1
        for group in re.findall(r"by \(([^)]*)\)", query):
            for label in group.split(", "):
                assert any(label in labels for labels in labels_of[name]), f"{query}: {name} has no {label}"
        assert ("histogram_quantile" in query) == name.endswith("_bucket")


@pytest.mark.process
def test_promtool_finds_no_problem(address: str) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("this machine has no promtool (Debian: prometheus)")
    text = get(address, "/metrics")
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.fixture(scope="module")
def prometheus(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Prometheus on loopback that scrapes the session every second."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("this machine has no prometheus (Debian: prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    target = address.removeprefix("http://")
    (folder / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s, scrape_timeout: 1s}\n"
        f"scrape_configs: [{{job_name: stream-mmrnn, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    options = ["--config.file", "prometheus.yml", "--storage.tsdb.path", "data"]
    process = subprocess.Popen(
        [program, *options, "--web.listen-address", f"127.0.0.1:{port}"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def ask(prometheus: str, query: str) -> list[dict[str, Any]]:
    parameters = urllib.parse.urlencode({"query": query.replace("$__rate_interval", "20s")})
    answer = json.loads(get(prometheus, f"/api/v1/query?{parameters}"))
    assert answer["status"] == "success", answer
    rows: list[dict[str, Any]] = answer["data"]["result"]
    return rows


def wait_for(what: Any, seconds: float) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if got := what():
                return got
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"it did not happen in {seconds} s")


@pytest.mark.process
def test_prometheus_answers_every_query_of_the_dashboard(prometheus: str) -> None:
    scrapes = "count_over_time(stream_mmrnn_engine_ticks_total[1m]) > 4"
    wait_for(lambda: ask(prometheus, scrapes), 90)
    for query in QUERIES:
        rows = ask(prometheus, query)
        assert rows, query
        assert all(math.isfinite(float(row["value"][1])) for row in rows), (query, rows)
    (per_s,) = ask(prometheus, "sum(rate(stream_mmrnn_engine_predictions_total[20s]))")
    assert 0 < float(per_s["value"][1]) < 1000
    (up,) = ask(prometheus, "count(stream_mmrnn_process_up) - sum(stream_mmrnn_process_up)")
    assert float(up["value"][1]) == 0


@pytest.mark.slow
def test_the_dashboard_ships_with_the_package() -> None:
    assert len(QUERIES) >= 15
    assert {p["datasource"]["uid"] for p in DASHBOARD["panels"]} == {"${datasource}"}
    assert len({p["id"] for p in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
