"""Import tables (CSV, Parquet) as recordings of signals: times, gaps, missing values, and what is refused."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner
from vega_files import vega_file

from stream_mmrnn.capture.encoders.signal import SignalEncoder
from stream_mmrnn.cli.app import app
from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.core.types import ModalitySpec
from stream_mmrnn.offline import replay
from stream_mmrnn.offline.convert import table, unpack
from stream_mmrnn.offline.convert.table_file import TableOptions, read
from stream_mmrnn.offline.predictor import Predictor
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.report import info, verify
from stream_mmrnn.recording.settings import streams_of

pa = pytest.importorskip("pyarrow", reason="pyarrow (extra export) is not installed")
pq = pytest.importorskip("pyarrow.parquet")

DAY_NS = 86_400_000_000_000
DAYS = "day,low,high,sky\n2024-01-01,1.5,4,dull\n2024-01-02,,5,fine\n2024-01-03,-2,3.25,dull\n2024-01-07,0,1,dull\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def at_ns(*when: int, **of: Any) -> int:
    moment = datetime(*when, tzinfo=of.get("tzinfo", UTC))  # type: ignore[misc, arg-type]
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000


def samples(path: Path, name: str = "signal") -> list[tuple[int, list[float]]]:
    return [(e.event_ns, e.payload.tolist()) for e in Recording(path).envelopes({f"feature/{name}"})]  # type: ignore[union-attr]


def error_of(path: Path, out: Path, options: TableOptions) -> str:
    """What an import says that is refused with exit code 2; "" if it is not."""
    try:
        table.convert(path, out, options)
    except UsageError as e:
        return str(e)
    return ""


def command(*args: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [*map(str, args)])
    return done.exit_code if done.exception is None or isinstance(done.exception, SystemExit) else 2, (
        done.output + str(done.exception or "")
    )


def test_rows_are_samples_and_gaps_stay_gaps(tmp_path: Path) -> None:
    out = tmp_path / "days.mcap"
    result = table.convert(write(tmp_path / "days.csv", DAYS), out, TableOptions(time="day"))
    # the row of 2 January misses a value: it is no sample, and nothing takes its place
    assert samples(out) == [
        (at_ns(2024, 1, 1), [1.5, 4.0]),
        (at_ns(2024, 1, 3), [-2.0, 3.25]),
        (at_ns(2024, 1, 7), [0.0, 1.0]),
    ]
    (stream,) = result["streams"]
    assert (stream["rows"], stream["samples"], stream["missing"]) == (4, 3, {"low": 1})
    assert (stream["step_s"], stream["gaps"], stream["longest_gap_s"]) == (86_400, 1, 4 * 86_400)
    assert "holds no numbers (for example 'dull')" in result["left_out"]["sky"]
    assert verify(out)["state"] == "whole"
    assert json.loads(Recording(out).metadata["columns"]) == {"signal": ["low", "high"]}
    about = info(out)
    assert about["started_unix_ns"] == at_ns(2024, 1, 1)
    assert about["channels"]["feature/signal"]["rate_hz"] == pytest.approx(3 / (6 * 86_400), rel=0.01)


def test_streams_are_chosen_by_columns_or_by_a_column(tmp_path: Path) -> None:
    path, out = write(tmp_path / "days.csv", DAYS), tmp_path / "two.mcap"
    table.convert(path, out, TableOptions(time="day", streams={"warm": ("high",), "cold": ("low",)}))
    assert len(samples(out, "warm")) == 4
    assert len(samples(out, "cold")) == 3
    assert {name for name, row in streams_of(Recording(out).metadata).items() if row.source != "none"} == {
        "warm",
        "cold",
    }
    text = "who,day,price\nA,2024-01-01,1\nA,2024-01-02,2\nB-1,2024-01-01,7\n"
    table.convert(write(tmp_path / "long.csv", text), tmp_path / "by.mcap", TableOptions(time="day", by="who"))
    assert samples(tmp_path / "by.mcap", "B-1") == [(at_ns(2024, 1, 1), [7.0])]


@pytest.mark.parametrize(
    ("value", "options", "expected"),
    [
        ("2024-03-01T06:30:00Z", {}, at_ns(2024, 3, 1, 6, 30)),
        ("2024-03-01T06:30:00.000000001+01:00", {}, at_ns(2024, 3, 1, 5, 30) + 1),
        ("2024-03-01 06:30", {}, at_ns(2024, 3, 1, 6, 30)),
        ("2024-03-01 06:30", {"timezone": "Asia/Tokyo"}, at_ns(2024, 2, 29, 21, 30)),
        ("1.3.2024", {"time_format": "%d.%m.%Y"}, at_ns(2024, 3, 1)),
        ("1709274600", {"unit": "s"}, at_ns(2024, 3, 1, 6, 30)),
        ("1709274600.25", {"unit": "s"}, at_ns(2024, 3, 1, 6, 30) + 250_000_000),
        ("1709274600000000007", {"unit": "ns"}, at_ns(2024, 3, 1, 6, 30) + 7),
        ("19783", {"unit": "d"}, at_ns(2024, 3, 1)),
        ("2024-03-01", {"covers_ns": DAY_NS}, at_ns(2024, 3, 2)),
    ],
)
def test_times(tmp_path: Path, value: str, options: dict[str, Any], expected: int) -> None:
    path = write(tmp_path / "t.csv", f"at,x\n{value},1\n")
    (stream,) = read(path, TableOptions(time="at", **options)).streams
    assert stream.times_ns.tolist() == [expected]


def test_parquet_keeps_its_own_types_of_time(tmp_path: Path) -> None:
    moment = datetime(2024, 3, 1, 6, 30)
    columns = {
        "zoned": pa.array([moment], pa.timestamp("ms", "Europe/Berlin")),
        "naive": pa.array([moment], pa.timestamp("us")),
        "date": pa.array([moment.date()], pa.date32()),
        "text": pa.array(["2024-03-01T06:30"]).dictionary_encode(),
        "number": pa.array([1709274600], pa.uint32()),
        "year": pa.array([2024]),
        "x": pa.array([True]),
        "y": pa.array([np.float16(1.5)]),
        "z": pa.array([[1, 2]]),
    }
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table(columns), path)
    half_past_six = at_ns(2024, 3, 1, 6, 30)
    for name, expected in (("zoned", half_past_six), ("naive", half_past_six), ("date", at_ns(2024, 3, 1))):
        found = read(path, TableOptions(time=name))
        assert found.streams[0].times_ns.tolist() == [expected]
        assert found.streams[0].columns == ("number", "year", "x", "y")
    assert read(path, TableOptions(time="text", timezone="UTC")).streams[0].times_ns.tolist() == [half_past_six]
    assert read(path, TableOptions(time="number", unit="s")).streams[0].times_ns.tolist() == [half_past_six]
    assert read(path, TableOptions(time="year", time_format="%Y")).streams[0].times_ns.tolist() == [at_ns(2024, 1, 1)]
    for more in ({"unit": "s"}, {"time_format": "%Y"}):
        with pytest.raises(UsageError, match="holds times already; leave --unit and --time-format out"):
            read(path, TableOptions(time="naive", **more))


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("", {}, "is no CSV table that pyarrow can read: Empty CSV file"),
    ("at,x\n", {}, "has no rows"),
    ("at,x\n2024-01-01,1,2\n", {}, "is no CSV table"),
    ("at,x,x\n2024-01-01,1,2\n", {}, "has two columns 'x'"),
    ("when,x\n2024-01-01,1\n", {}, "has no column 'at'; it has 'when', 'x'"),
    ("at,x\n2024-01-01,1\n", {"streams": {"a": ("y",)}}, "has no column 'y'"),
    ("at,x\n2024-01-01,1\n", {"streams": {"a": ("at",)}}, "the column 'at' is the time"),
    ("at,x\n2024-01-01,1\n", {"streams": {"a b": ("x",)}}, "a stream is named 'a b'"),
    ("at,x\n2024-01-01,1\n", {"streams": {"a": ("x",)}, "by": "x"}, "use it without --stream"),
    ("at,x\n2024-01-01,fine\n", {"streams": {"a": ("x",)}}, "'x' holds no numbers (for example 'fine')"),
    ("at,x\n2024-01-01,fine\n", {}, "the table has no column of numbers: 'x' holds no numbers"),
    ("at,who,x\n2024-01-01,a/b,1\n", {"by": "who"}, "a value of 'who', which would be a stream, is named 'a/b'"),
    (
        "at,who,x\n2024-01-01,1,1\n2024-01-02,,2\n",
        {"by": "who"},
        "t.csv has no value in row 2, column 'who'; expected the name of a stream in each row",
    ),
    ("at,x\n2024-01-01,inf\n", {}, "holds inf in row 1, column 'x'"),
    ("at,x\n2024-01-01,1\n2024-01-02,1e13\n", {}, "holds 1e+13 in row 2, column 'x'"),
    ("at,x\n2024-01-01,\n", {"streams": {"a": ("x",)}}, "the column 'x' is empty"),
    ("at,x,y\n2024-01-01,,1\n2024-01-02,1,\n", {}, "has no row without a missing value"),
    ("at,x\n2024-01-02,1\n2024-01-01,2\n", {}, "row 2 is at 2024-01-01T00:00:00Z, before row 1; sort the table"),
    ("at,x\n2024-01-02,1\n2024-01-02,2\n", {}, "two rows of one time, 2024-01-02T00:00:00Z: rows 1 and 2"),
    ("at,x\n2024-01-01,1\nsoon,2\n", {}, "'soon' in row 2, column 'at', is not an ISO time"),
    ("at,x\n2024-01-01T00:00Z,1\n2024-01-02T00:00,2\n", {}, "in row 2, column 'at', is not an ISO time such as"),
    ("at,x\n2024-01-01,1\n,2\n", {}, "'' in row 2, column 'at', is not an ISO time"),
    ("at,x\n17,1\n", {}, "holds numbers: say what they count from 1970 by --unit"),
    ("at,x\n17,1\n", {"unit": "fortnight"}, "--unit is 'fortnight'; use one of"),
    ("at,x\n1.5,1\n", {"unit": "ns"}, "is not a whole number"),
    ("at,x\n1709274600000,1\n", {"unit": "s"}, "'1709274600000' s in row 1 is no time from 1824 to 2116"),
    ("at,x\n1e30,1\n", {"unit": "s"}, "is no time from 1824 to 2116"),
    ("at,x\n2200-01-01,1\n", {}, "has times outside of the years 1824 to 2116"),
    ("at,x\n2024-01-01,1\n", {"timezone": "Mars/Base"}, "--timezone 'Mars/Base' is not known"),
    ("at,x\n2024-01-01T00:00Z,1\n", {"timezone": "Asia/Tokyo"}, "have a zone; leave --timezone out"),
    (
        "at,x\n2024-03-31 02:30,1\n",
        {"timezone": "Europe/Berlin"},
        "in timezone 'Europe/Berlin': 2024-03-31 02:30:00; give times in UTC, or with their zone",
    ),
    (
        "at,x\n2024-10-27 02:30,1\n",
        {"timezone": "Europe/Berlin"},
        "Timestamp is ambiguous in timezone 'Europe/Berlin': 2024-10-27 02:30:00; give times",
    ),
    ("at,x\n1,1\n", {"time_format": "%Y", "unit": "s"}, "--unit is for numbers and --time-format for text"),
    ("at,x\n1.1.2024,1\n", {"time_format": "%Y"}, "is not a time like '%Y', the --time-format"),
]


@pytest.mark.parametrize(("text", "options", "sentence"), WRONG)
def test_what_cannot_be_imported_is_one_sentence_and_writes_nothing(
    tmp_path: Path, text: str, options: dict[str, Any], sentence: str
) -> None:
    path, out = write(tmp_path / "t.csv", text), tmp_path / "t.mcap"
    with pytest.raises(UsageError) as caught:
        table.convert(path, out, TableOptions(time="at", **options))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert not out.exists()


@pytest.mark.slow
def test_a_huge_gap_is_named_and_must_be_allowed(tmp_path: Path) -> None:
    rows = [f"2024-01-01T00:00:{i:02d},{i}" for i in range(10)] + ["2104-01-01T00:00:00,1"]
    path, out = write(tmp_path / "t.csv", "at,x\n" + "\n".join(rows)), tmp_path / "t.mcap"
    with pytest.raises(FileError, match=r"a gap of 29219 d after 2024-01-01T00:00:09Z, more than 10,000 times"):
        table.convert(path, out, TableOptions(time="at"))
    assert not out.exists()
    with pytest.raises(FileError, match="more than 1 d; if its times are right, allow it with --max-gap"):
        table.convert(path, out, TableOptions(time="at", max_gap_ns=DAY_NS))
    table.convert(path, out, TableOptions(time="at", max_gap_ns=100 * 366 * DAY_NS))
    # the ticks of a gap that is too long for this tick are left out; the row after it is used
    model = toy_model.make(tmp_path / "toy.onnx", (ModalitySpec("signal", 1, SignalEncoder.origin),))
    result = replay.replay(out, model=str(model))
    assert result["streams"]["signal"] == {"received": 11, "delivered": 11, "dropped": {}, "late_joined": 0}
    assert result["predictions"] < 40_000


def test_times_before_1970_are_shifted_by_whole_weeks(tmp_path: Path) -> None:
    path, out = write(tmp_path / "t.csv", "year,x\n1900,1\n1901,2\n"), tmp_path / "t.mcap"
    result = table.convert(path, out, TableOptions(time="year", time_format="%Y"))
    shift_ns = result["shift_s"] * 10**9
    assert shift_ns > 0
    assert shift_ns % (7 * DAY_NS) == 0
    assert [at for at, _ in samples(out)] == [at_ns(1900, 1, 1) + shift_ns, at_ns(1901, 1, 1) + shift_ns]
    assert verify(out)["state"] == "whole"


def replayed(folder: Path, rows: str, unit: str, tick_ns: int) -> tuple[Path, dict[str, Any], list[Any]]:
    """A toy model of this tick, and what a replay of an imported table with it gives."""
    out = folder / "t.mcap"
    table.convert(write(folder / "t.csv", f"at,x\n{rows}"), out, TableOptions(time="at", unit=unit))
    specs = (ModalitySpec("signal", 1, SignalEncoder.origin),)
    model = toy_model.make(folder / "toy.onnx", specs, tick_ns=tick_ns)
    made: list[Any] = []
    result = replay.replay(out, model=str(model), on_prediction=made.append)
    return model, result, made


@pytest.mark.parametrize("tick_ns", [40_000_000, 60_000_000_000, 3600_000_000_000, DAY_NS, 30 * DAY_NS])
def test_each_row_is_one_tick_of_any_length(tmp_path: Path, tick_ns: int) -> None:
    """Rows at the ends of ticks, with a gap: each is in a tick of its own, and a push of them gives the same bits."""
    first = 10**18 // tick_ns + 1
    ticks = [first + i for i in range(40) if not 10 <= i < 15]
    rows = "\n".join(f"{k * tick_ns},{i}" for i, k in enumerate(ticks))
    model, result, made = replayed(tmp_path, rows, "ns", tick_ns)
    assert result["streams"]["signal"]["delivered"] == 35
    made = made[:40]  # the clock runs half a second longer
    assert [p.tick.index for p in made] == [first + i for i in range(40)]
    assert [p.tick.index for p in made if p.tick.present["signal"]] == ticks
    assert [p.tick.features["signal"][0] for p in made if p.tick.present["signal"]] == list(range(35))
    ages = {p.tick.index: p.tick.age_ns["signal"] for p in made}
    assert ages[first + 14] == 5 * tick_ns

    predictor = Predictor(str(model), zero_ns=(first - 1) * tick_ns)
    pushed = [p for i, k in enumerate(ticks) for p in predictor.push("signal", [i], at_s=predictor.at_s(k * tick_ns))]
    assert [p.tick.index for p in pushed] == [p.tick.index for p in made]
    assert [p.heads["next"].tobytes() for p in pushed] == [p.heads["next"].tobytes() for p in made]


@pytest.mark.slow
def test_a_long_tick_takes_many_samples(tmp_path: Path) -> None:
    rows = "\n".join(f"{i},{i % 7}" for i in range(1, 86_401))
    _, result, made = replayed(tmp_path, rows, "s", DAY_NS)
    assert result["streams"]["signal"]["dropped"] == {}
    (prediction,) = made
    assert prediction.tick.features["signal"][0] == pytest.approx(np.mean([i % 7 for i in range(1, 86_401)]), rel=1e-3)


def test_an_imported_table_unpacks(tmp_path: Path) -> None:
    out = tmp_path / "days.mcap"
    table.convert(write(tmp_path / "days.csv", DAYS), out, TableOptions(time="day"))
    unpack.unpack(out, tmp_path / "files", ["parquet"])
    rows = pq.read_table(tmp_path / "files" / "features_signal.parquet")
    assert rows.column("unix_ns").to_pylist() == [at for at, _ in samples(out)]
    assert rows.column("values").to_pylist() == [values for _, values in samples(out)]


@pytest.mark.slow
def test_options_that_do_not_fit_the_file(tmp_path: Path) -> None:
    path, out = write(tmp_path / "days.csv", DAYS), tmp_path / "days.mcap"
    for args, sentence in (
        ((path, out), "name the column with the times of days.csv by --time COLUMN"),
        ((path, out, "--time", "day", "--as", "a=signal"), "--as is for XDF files"),
        ((tmp_path / "x.xdf", out, "--time", "day"), "--time is for tables (.csv, .parquet), and x.xdf is none"),
        ((path, out, "--time", "day", "--stream", "low"), "--stream needs NAME=COLUMN,COLUMN, not 'low'"),
        ((path, out, "--time", "day", "--stream", "a=low", "--stream", "a=high"), "--stream names 'a' twice"),
        ((path, out, "--time", "day", "--max-gap", "soon"), "--max-gap is 'soon': expected a duration"),
        ((path, out, "--time", "day", "--session", "a b"), "--session is 'a b'"),
        ((path, out, "--time", "day", "--session", ""), "--session is ''"),
        ((tmp_path / "none.csv", out, "--time", "day"), "none.csv cannot be read: No such file or directory"),
    ):
        code, printed = command("import", *args)
        assert (code, sentence in printed) == (2, True), printed
        assert not out.exists()
    code, printed = command("import", path, out, "--time", "day", "--covers", "1d")
    assert code == 0, printed
    assert "3 samples of low, high, one every 1 d; gaps: 1, the longest 4 d; 1 rows miss a value" in printed
    assert samples(out)[0][0] == at_ns(2024, 1, 2)
    code, printed = command("import", path, out, "--time", "day")
    assert code == 2  # it exists already


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=400),
        st.text(max_size=200).map(lambda text: b"at,x\n" + text.encode()),
        st.lists(st.tuples(st.text("0123456789-:TZ.+e ", max_size=12), st.text("0123456789.,einfa-", max_size=8))).map(
            lambda rows: b"at,x\n" + "".join(f"{a},{b}\n" for a, b in rows).encode()
        ),
    ),
    st.sampled_from([".csv", ".parquet"]),
    st.sampled_from(["", "s", "ns", "d"]),
)
def test_any_bytes_are_a_table_or_one_sentence(tmp_path: Path, data: bytes, suffix: str, unit: str) -> None:
    path, out = tmp_path / f"t{suffix}", tmp_path / "t.mcap"
    path.write_bytes(data)
    refused = error_of(path, out, TableOptions(time="at", unit=unit))
    assert "\n" not in refused
    assert out.exists() == (not refused)
    if not refused:
        assert verify(out)["state"] == "whole"
        out.unlink()


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_parquet_file_is_a_table_or_one_sentence(tmp_path: Path, data: st.DataObject) -> None:
    path, out = tmp_path / "t.parquet", tmp_path / "t.mcap"
    times = pa.array(range(1, 50), pa.timestamp("s"))
    pq.write_table(pa.table({"at": times, "x": pa.array(np.arange(49.0))}), path)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
    refused = error_of(path, out, TableOptions(time="at"))
    assert out.exists() == (not refused)  # some damage is in bytes that nothing reads
    out.unlink(missing_ok=True)


def test_real_weather(tmp_path: Path) -> None:
    options = TableOptions(time="date", time_format="%Y/%m/%d", covers_ns=DAY_NS)
    result = table.convert(vega_file("seattle-weather.csv"), tmp_path / "w.mcap", options)
    (stream,) = result["streams"]
    assert (stream["samples"], stream["gaps"], stream["step_s"]) == (1461, 0, 86_400)
    assert samples(tmp_path / "w.mcap")[0] == (
        at_ns(2012, 1, 2),
        pytest.approx([0.0, 12.8, 5.0, 4.7]),
    )
