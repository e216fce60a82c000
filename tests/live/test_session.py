"""Real processes: live sessions, their recordings, deaths and ends. The model is the small one of toy_model, at the
sizes of the real encoders, so that these tests stand whatever the zoo holds.
"""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from harness import COMMAND, Running, check_summary, descendants, in_terminal, recording_grows, run, ticks_of, verify
from rich.console import Console

from stream_mmrnn.capture import encoders
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.viewers.terminal_view import summary_table

pytestmark = pytest.mark.process


def test_live_equals_replay(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    live = ["live", "--source", "synthetic", "--duration", "3", "--model", model]
    code, summary, err = run(*live, "--record", path)
    assert code == 0, err
    check_summary(summary)
    assert summary["ticks"] == summary["predictions"] >= 70
    assert summary["recording"]["path"] == str(path)
    assert summary["recording"]["lost"] == 0
    page = summary["viewers"]["dashboard"]
    assert page["balanced"]
    assert page["delivered"] > 0
    assert summary["denied"] == {}
    assert summary["recording"]["lost"] == summary["recording"]["dropped"] == 0
    code, result, err = run("verify", path)
    assert (code, result["predictions"], result["adds_up"]) == (0, summary["predictions"], True), err
    assert all(s["delivered"] > 0 for s in summary["streams"].values())
    # the model takes nothing of a second person, so that none is made for it
    assert tuple(summary["streams"]) == ("vision", "audio", "text")
    verify(path, summary["predictions"])

    code, raw, _ = run("replay", path, "--from", "raw")
    assert code == 0
    assert raw["predictions"] == summary["predictions"]
    assert raw["max_abs_difference"] <= 1e-4
    assert raw["missing"] == raw["extra"] == 0

    code, paced, _ = run("replay", path, "--speed", "4")
    assert code == 0
    assert paced["identical"]
    assert paced["seconds"] >= 0.6

    code, info, _ = run("info", path)
    assert code == 0
    assert info["whole"]
    assert info["ended"] == "clean"
    assert info["channels"]["prediction"]["messages"] == summary["predictions"]
    for modality in ("vision", "audio", "text"):
        assert info["channels"][f"feature/{modality}"]["origin"] == encoders.create_encoder(modality).origin

    # the same path again: what was there is kept
    code, again, err = run(*live[:-4], "--duration", "1", "--model", model, "--record", path)
    assert code == 0
    assert "was there already" in err
    verify(tmp_path / "a.old1.mcap", summary["predictions"])
    verify(path, again["predictions"])


@pytest.fixture
def two_busy_processes() -> Iterator[None]:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    yield
    for p in busy:
        p.kill()
        p.wait()


@pytest.mark.usefixtures("two_busy_processes")
def test_live_equals_replay_under_load(model: Path, tmp_path: Path) -> None:
    for i in range(2):
        path = tmp_path / f"{i}.mcap"
        code, summary, err = run("live", "--source", "synthetic", "--duration", "2", "--model", model, "--record", path)
        assert code == 0, err
        check_summary(summary)
        verify(path, summary["predictions"])


def test_drop_outs_and_freezes_are_masks(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "settings.toml"
    config.write_text("[synthetic]\njitter_ms = 15\ndrop = 0.2\nfreeze_every_s = 1.0\nfreeze_s = 0.5\nseed = 3\n")
    path = tmp_path / "a.mcap"
    code, summary, err = run(
        "live", "--config", config, "--source", "synthetic", "--duration", "3", "--model", model, "--record", path
    )
    assert code == 0, err
    check_summary(summary)
    verify(path, summary["predictions"])
    ticks = ticks_of(path)
    assert any(not t.present["vision"] for t in ticks)
    assert any(t.present["vision"] for t in ticks)
    # every tick is there, whatever is missing
    assert [t.tick for t in ticks] == list(range(ticks[0].tick, ticks[0].tick + len(ticks)))


proc_only = pytest.mark.skipif(not Path("/proc/self/comm").exists(), reason="needs /proc")


def session(model: Path, path: Path, *more: object) -> Running:
    return Running("--source", "synthetic", "--model", model, "--record", path, *more)


@proc_only
def test_a_killed_camera_worker_is_a_mask_and_comes_back(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    with closing(session(model, path)) as live:
        live.wait_for(lambda: recording_grows(path, 100_000))
        [first] = live.wait_for(lambda: live.children("camera"))
        os.kill(first, signal.SIGKILL)
        live.wait_for(lambda: any("camera: was killed by SIGKILL" in line for line in live.lines))
        size = path.stat().st_size
        live.wait_for(lambda: [p for p in live.children("camera") if p != first])
        live.wait_for(lambda: recording_grows(path, size + 250_000))
        code, summary, _ = live.end()
    assert code == 0
    assert summary["restarts"] == {"camera": ["was killed by SIGKILL"]}
    check_summary(summary)
    verify(path, summary["predictions"])
    present = [t.present["vision"] for t in ticks_of(path)]
    first_gap = next(i for i in range(1, len(present)) if present[i - 1] and not any(present[i : i + 3]))
    back = next(i for i in range(first_gap, len(present)) if all(present[i : i + 3]))
    assert back - first_gap <= 50, "the camera was away for more than 2 s"


@proc_only
@pytest.mark.parametrize("victim", ["clock", "text"])
def test_other_deaths_do_not_end_the_session(model: Path, tmp_path: Path, victim: str) -> None:
    path = tmp_path / "a.mcap"
    with closing(session(model, path)) as live:
        live.wait_for(lambda: recording_grows(path, 60_000))
        [pid] = live.wait_for(lambda: live.children(victim))
        os.kill(pid, signal.SIGKILL)
        live.wait_for(lambda: [p for p in live.children(victim) if p != pid])
        size = path.stat().st_size
        live.wait_for(lambda: recording_grows(path, size + 100_000))
        code, summary, _ = live.end()
    assert code == 0
    assert victim in summary["restarts"]
    verify(path, summary["predictions"])


@proc_only
def test_the_page_comes_back_where_it_was(model: Path, tmp_path: Path) -> None:
    from urllib.request import urlopen

    with closing(session(model, tmp_path / "a.mcap")) as live:
        line = live.wait_for(lambda: next((x for x in live.lines if x.startswith("dashboard: ")), ""))
        address = line.removeprefix("dashboard: ").strip()

        def page() -> bool:
            try:
                with urlopen(address, timeout=2) as answer:
                    return b"stream-mmrnn" in answer.read()
            except OSError:
                return False

        live.wait_for(page)
        [pid] = live.wait_for(lambda: live.children("dashboard"))
        os.kill(pid, signal.SIGKILL)
        live.wait_for(lambda: [p for p in live.children("dashboard") if p != pid])
        live.wait_for(page)
        code, summary, _ = live.end()
    assert code == 0
    assert summary["restarts"] == {"dashboard": ["was killed by SIGKILL"]}


def kill_engine(live: Running, path: Path) -> None:
    [pid] = live.wait_for(lambda: live.children("engine"))
    os.kill(pid, signal.SIGKILL)
    live.wait_for(lambda: [p for p in live.children("engine") if p != pid])
    size = path.stat().st_size
    live.wait_for(lambda: recording_grows(path, size + 150_000))


@proc_only
def test_a_killed_engine_goes_on_where_it_was(model: Path, tmp_path: Path) -> None:
    path, config = tmp_path / "a.mcap", tmp_path / "settings.toml"
    config.write_text("[state]\nsnapshot_every = 10\n")
    with closing(session(model, path, "--config", config)) as live:
        live.wait_for(lambda: recording_grows(path, 60_000))
        kill_engine(live, path)
        kill_engine(live, path)
        code, summary, _ = live.end()
    assert code == 0
    assert summary["restarts"] == {"engine": ["was killed by SIGKILL"] * 2}
    check_summary(summary)
    assert summary["recording"]["lost"] == 0
    ticks = [t.tick for t in ticks_of(path)]
    assert ticks == list(range(ticks[0], ticks[0] + len(ticks)))
    assert len(ticks) == summary["ticks"] == summary["predictions"]
    # as if nothing had been
    verify(path, summary["predictions"])


@proc_only
def test_a_killed_engine_without_snapshots_begins_anew_and_says_so(model: Path, tmp_path: Path) -> None:
    path, config = tmp_path / "a.mcap", tmp_path / "settings.toml"
    config.write_text("[state]\nsnapshot_every = 0\n")
    with closing(session(model, path, "--config", config)) as live:
        live.wait_for(lambda: recording_grows(path, 60_000))
        assert not live.children("journal")
        kill_engine(live, path)
        code, summary, _ = live.end()
    assert code == 0
    assert summary["restarts"] == {"engine": ["was killed by SIGKILL"]}
    assert any("begins anew: state.snapshot_every is 0" in line for line in live.lines)
    ticks = [t.tick for t in ticks_of(path)]
    assert ticks == sorted(set(ticks))
    assert len(ticks) < ticks[-1] - ticks[0] + 1, "a gap, and what was said before it is not said again"


@proc_only
def test_a_journal_that_dies_with_the_engine_is_a_new_beginning(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    with closing(session(model, path)) as live:
        live.wait_for(lambda: recording_grows(path, 60_000))
        [journal], [engine] = live.wait_for(lambda: live.children("journal")), live.children("engine")
        for pid in (journal, engine):
            os.kill(pid, signal.SIGKILL)
        live.wait_for(lambda: any("the session begins anew" in line for line in live.lines))
        live.wait_for(lambda: [p for p in live.children("journal") if p != journal])
        size = path.stat().st_size
        live.wait_for(lambda: recording_grows(path, size + 250_000))
        # from here on it can go on again
        before = len(live.lines)
        kill_engine(live, path)
        code, summary, _ = live.end()
    assert code == 0
    assert not [line for line in live.lines[before:] if "begins anew" in line]
    assert summary["restarts"].keys() == {"engine", "journal"}


@proc_only
def test_a_killed_recorder_loses_nothing_that_was_written(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    with closing(session(model, path)) as live:
        live.wait_for(lambda: recording_grows(path, 60_000))
        [pid] = live.wait_for(lambda: live.children("recorder"))
        os.kill(pid, signal.SIGKILL)
        second = tmp_path / "a.part2.mcap"
        live.wait_for(lambda: recording_grows(second, 60_000))
        code, _, _ = live.end()
    assert code == 0
    code, first, err = run("replay", path, "--verify")
    assert code == 3
    assert first["identical"] is False or first["damage"]
    assert "cut off" in err
    assert first["different"] == 0
    code, info, _ = run("info", second)
    assert (code, info["ended"]) == (0, "clean")
    code, result, err = run("verify", path)
    assert (code, result["state"], [p["part"] for p in result["parts"]]) == (3, "cut off", [2])
    assert "was cut off at byte" in err
    joined = tmp_path / "joined.mcap"
    code, done, err = run("repair", path, joined)
    assert code == 0, err
    there = [(e.topic, e.seq) for e in Recording(joined).envelopes()]
    assert there == [(e.topic, e.seq) for p in (path, second) for e in Recording(p).envelopes()]
    assert done["result"]["predictions"] > 0


@proc_only
def test_the_last_predictions_of_a_slow_engine_are_recorded(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    with closing(session(model, path)) as live:
        live.wait_for(lambda: recording_grows(path, 60_000))
        [engine] = live.children("engine")
        os.kill(engine, signal.SIGSTOP)
        later = threading.Timer(0.9, os.kill, (engine, signal.SIGCONT))
        later.start()
        code, summary, _ = live.end()
        later.join()
    assert code == 0
    verify(path, summary["predictions"])


@proc_only
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_two_seconds_with_the_file_finished(model: Path, tmp_path: Path, number: int) -> None:
    path = tmp_path / "a.mcap"
    with closing(session(model, path)) as live:
        live.wait_for(lambda: recording_grows(path, 100_000))
        everyone = descendants(live.process.pid)
        assert len(everyone) >= 8
        code, summary, seconds = live.end(number)
    assert code == 0
    assert seconds < 4, "2 s are promised; the rest is for a busy test machine"
    verify(path, summary["predictions"])
    time.sleep(0.2)
    assert not [p for p in everyone if Path(f"/proc/{p}").exists() and "Z" not in Path(f"/proc/{p}/stat").read_text()]


@proc_only
def test_a_closed_terminal_ends_it_in_order(model: Path, tmp_path: Path, short_path: Path) -> None:
    """The kernel sends SIGHUP to all its processes at once, and nobody can be written to any more."""
    path = tmp_path / "a.mcap"
    args = [*COMMAND, "live", "--source", "synthetic", "--model", str(model), "--record", str(path)]
    process, terminal = in_terminal(args, {**os.environ, "TMPDIR": str(short_path)})
    while not recording_grows(path, 60_000):
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 65536)
    os.close(terminal)
    try:
        assert process.wait(60) == 0
    finally:
        process.kill()
    recording = Recording(path)
    list(recording.envelopes())
    assert (bool(recording.end), recording.damage) == (True, "")
    assert [p.name for p in short_path.iterdir() if p.name != ".ses" and "-run-" not in p.name] == []


@proc_only
def test_no_process_outlives_a_killed_supervisor(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    with closing(session(model, path)) as live:
        live.wait_for(lambda: recording_grows(path, 60_000))
        everyone = descendants(live.process.pid)
        live.process.kill()
        live.process.wait()
        live.wait_for(lambda: not [p for p in everyone if Path(f"/proc/{p}").exists()], 10)
    code, _, err = run("info", path)
    assert code in (0, 3), err


@proc_only
def test_what_a_killed_session_left_is_removed_by_the_next(model: Path, short_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(short_path)}

    def left() -> list[str]:
        return [p.name for p in short_path.iterdir() if p.name != ".ses" and "-run-" not in p.name]

    with closing(Running("-s", "synthetic", "--model", model, "--no-dashboard", env=environment)) as live:
        live.wait_for(lambda: live.children("engine"))
        live.process.kill()
        live.process.wait()
    assert len(left()) >= 2
    with closing(Running("-s", "synthetic", "--model", model, "-d", "0.5", "--no-dashboard", env=environment)) as live:
        code, _ = live.finish()
    assert code == 0
    assert left() == []


def test_typed_lines_are_text_events(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    read, write = os.pipe()
    args = ("--vision", "none", "--audio", "synthetic", "--text", "stdin", "--model", model, "--record", path)
    with closing(Running(*args, stdin=read)) as live:
        os.close(read)
        live.wait_for(lambda: recording_grows(path, 30_000))
        for word in ("hello", "stream", "\n", "wörld", "\xff"):
            os.write(write, word.encode("latin-1" if word == "\xff" else "utf-8") + b"\n")
            time.sleep(0.1)
        time.sleep(0.3)
        os.close(write)
        code, summary, _ = live.end()
    assert code == 0
    check_summary(summary)
    words = [bytes(e.payload).decode() for e in Recording(path).envelopes({"raw/text"})]
    assert words == ["hello", "stream", "wörld"]
    assert summary["streams"]["text"]["delivered"] == 3
    assert any(t.present["text"] for t in ticks_of(path))
    verify(path, summary["predictions"])


def test_a_model_of_other_features_says_why_it_is_not_fed() -> None:
    code, summary, err = run("live", "-s", "synthetic", "--model", "digits", "--duration", "2")
    assert code == 0, err
    for name, numbers in (("vision", "1280 numbers, the model takes 784"), ("audio", "81 numbers, the model takes 80")):
        assert summary["streams"][name]["dropped"].keys() == {"quarantined"}
        assert numbers in summary["streams"][name]["reason"]
        assert f"{name} is quarantined" in err
    assert summary["balanced"]


def test_a_missing_device_is_not_the_end(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    code, summary, err = run(
        "live", "--vision", "camera:/dev/video77", "--audio", "synthetic", "--text", "none", "--duration", "2",
        "--model", model, "--record", path,
    )  # fmt: skip
    assert code == 0, err
    assert "/dev/video77" in err
    assert summary["streams"]["vision"]["produced"] == 0
    assert summary["streams"]["audio"]["delivered"] > 50
    assert not any(t.present["vision"] for t in ticks_of(path))
    # the aligner does not wait for it: but for the first moments ticks close with the sound
    closed = [t.closed.by for t in ticks_of(path)][10:]
    assert closed.count("feature/audio") > 0.7 * len(closed)  # on a busy machine some wait for the clock
    verify(path, summary["predictions"])


def test_record_without_an_engine(tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    code, summary, err = run("record", path, "--source", "synthetic", "--duration", "1.5")
    assert code == 0, err
    assert summary["recording"]["messages"] > 100
    assert (summary["ticks"], summary["predictions"]) == (None, None)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(summary_table(summary))
    assert "prediction" not in console.export_text()
    code, info, _ = run("info", path)
    assert code == 0
    assert "prediction" not in info["channels"]
    code, replayed, _ = run("replay", path)
    assert code == 0
    assert replayed["predictions"] > 30
    code, _, err = run("replay", path, "--verify")
    assert code == 2
    assert "no predictions to compare with" in err


def test_features_only(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "settings.toml"
    path = tmp_path / "a.mcap"
    config.write_text(
        f"[record]\nraw = false\npath = '{path}'\n[sources]\nvision='none'\naudio='synthetic'\ntext='none'\n"
    )
    code, summary, err = run("live", "-c", config, "--duration", "1.5", "--model", model)
    assert code == 0, err
    code, info, _ = run("info", path)
    assert info["raw"] is False
    shown = subprocess.run([*COMMAND, "info", str(path)], capture_output=True, text=True, timeout=60).stdout
    assert "features only (record.raw = false)" in shown
    assert not [c for c in info["channels"] if c.startswith("raw/")]
    verify(path, summary["predictions"])
    code, _, err = run("replay", path, "--from", "raw")
    assert code == 2
    assert "without raw streams" in err


@pytest.mark.shared_data
@pytest.mark.parametrize(
    "name",
    ["dialogue.wav", "speech.mp4", "bbaf2n.mpg", "brbk7n.mpg", "lbax4n.mpg", "lbbc2a.mpg", "lwbsza.mpg", "sbwe5n.mpg"],
)
def test_every_clip(model: Path, tmp_path: Path, clips: Path, name: str) -> None:
    path = tmp_path / "a.mcap"
    code, summary, err = run(
        "live", "--source", f"file:{clips / name}", "--duration", "4", "--model", model, "--record", path
    )
    assert code == 0, err
    check_summary(summary)
    assert ("vision" in summary["streams"]) is not name.endswith(".wav")
    verify(path, summary["predictions"])
    code, raw, _ = run("replay", path, "--from", "raw")
    assert code == 0
    assert raw["predictions"] == summary["predictions"]
    assert raw["max_abs_difference"] <= 1e-4
    assert raw["missing"] == 0


def test_the_session_ends_with_its_file(model: Path, tmp_path: Path) -> None:
    import wave

    clip = tmp_path / "tone.wav"
    with wave.open(str(clip), "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(16000)
        f.writeframes(bytes(2 * 16000))
    code, summary, err = run("live", "--source", f"file:{clip}", "--model", model)
    assert code == 0, err
    assert summary["streams"]["audio"]["state"] == "ended"
    assert summary["streams"]["audio"]["produced"] == 50
    assert 0.9 < summary["seconds"] < 5


@proc_only
@pytest.mark.parametrize(("victim", "goes_on"), [("text", True), ("clock", False), ("broker", False)])
def test_who_dies_too_often_is_given_up(model: Path, tmp_path: Path, victim: str, goes_on: bool) -> None:
    path, config = tmp_path / "a.mcap", tmp_path / "settings.toml"
    config.write_text("[supervisor]\nmax_restarts = 1\nbackoff_s = 0.05\n")
    with closing(session(model, path, "--config", config)) as live:
        live.wait_for(lambda: recording_grows(path, 60_000))
        before = len(list(Recording(path).envelopes()))
        [first] = live.wait_for(lambda: live.children(victim))
        os.kill(first, signal.SIGKILL)
        [second] = live.wait_for(lambda: [p for p in live.children(victim) if p != first])
        os.kill(second, signal.SIGKILL)
        said = live.wait_for(lambda: next((x for x in live.lines if "and was given up" in x), ""))
        assert f"{victim}{'' if not goes_on else ':'} was killed by SIGKILL, for 2 times in 60 s" in said
        if goes_on:
            size = path.stat().st_size
            live.wait_for(lambda: recording_grows(path, size + 60_000))
            code, summary, _ = live.end()
        else:
            code, summary = live.finish()
    assert code == (0 if goes_on else 1)
    assert summary["given_up"].keys() == {victim}
    assert bool(summary["failed"]) is not goes_on
    recording = Recording(path)
    assert len(list(recording.envelopes())) >= before > 0
    assert recording.damage == ""
    assert recording.end["ended"] == ("the recorder was ended before the session" if victim == "broker" else "clean")


def test_a_stream_that_freezes_is_stale_and_counted(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "settings.toml"
    config.write_text("[synthetic]\nfreeze_every_s = 1.0\nfreeze_s = 0.5\n")
    code, summary, err = run("live", "--config", config, "--source", "synthetic", "--duration", "3.2", "--model", model)
    assert code == 0, err
    for name in ("vision", "audio"):
        stale = summary["streams"][name]["stale"]
        assert stale["count"] >= 2
        assert stale["seconds"] >= 2 * 0.3
    assert summary["streams"]["text"]["stale"] == {"count": 0, "seconds": 0.0}


@proc_only
@pytest.mark.parametrize("verb", ["live", "record"])
@pytest.mark.parametrize("to_group", [False, True])
def test_a_signal_at_start_up_leaves_nothing(
    model: Path, tmp_path: Path, short_path: Path, verb: str, to_group: bool
) -> None:
    """At moments that one start-up takes; tools/faults/stop.py does it at many more."""
    for number, seconds in ((signal.SIGTERM, 0.1), (signal.SIGINT, 0.4), (signal.SIGTERM, 0.8)):
        path, temporary = tmp_path / f"{seconds}.mcap", short_path / f"{seconds}"
        temporary.mkdir()
        args = ("live", "--model", model, "--record", path) if verb == "live" else ("record", path)
        process = subprocess.Popen(
            [*COMMAND, *map(str, args), "--source", "synthetic", "--json"],
            env={**os.environ, "TMPDIR": str(temporary)},
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        # SIGTERM is the program's from its first line on
        caught = f"/proc/{process.pid}/status"
        while not int(next(x for x in Path(caught).read_text().splitlines() if "SigCgt" in x).split()[1], 16) & 1 << 14:
            time.sleep(0.002)
        time.sleep(seconds)
        (os.killpg if to_group else os.kill)(process.pid, number)
        assert process.wait(30) == 0
        # onnxruntime leaves a file of its own there
        assert [p.name for p in temporary.iterdir() if p.name != ".ses"] == []
        if path.exists():
            recording = Recording(path)
            list(recording.envelopes())
            assert recording.end
            assert recording.damage == ""
