"""Sessions of streams that the package does not know: from the devices over the recording to a model of one's own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import plugin_packages
import pytest
from harness import Running, check_summary, recording_grows, run, ticks_of, verify
from places import TESTS

from stream_mmrnn.core import topics
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.training import recipe as recipes
from tools.virtual_devices import mjpeg_camera

pytestmark = pytest.mark.process

SENDER = TESTS / "helpers" / "lsl_peer.py"
SECONDS = 60
TEXTS = ("text", "ana", "ben")


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in found:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in found]


def say(port: int, until: float, words: list[str], labels: bool) -> None:
    """Type words to a port, and with `labels` what they are: the label changes with the words."""
    with socket.create_connection(("127.0.0.1", port), 10) as out:
        k = 0
        while time.monotonic() < until:
            word = words[k // 8 % len(words)]
            if labels and k % 8 == 0:
                out.sendall(f"/label {word}\n".encode())
            out.sendall(f"{word}\n".encode())
            k += 1
            time.sleep(0.25)


def settings_file(folder: Path, cameras: list[str], sensors: list[str], ports: list[int]) -> Path:
    rows = [
        *(f'[streams.camera_{side}]\nsource = "camera:{url}"\n' for side, url in zip("ab", cameras, strict=True)),
        *(f'[streams.wrist_{side}]\nsource = "lsl:{name}"\n' for side, name in zip("ab", sensors, strict=True)),
        *(
            f'[streams.{name}]\nsource = "tcp:{port}"\nperson = "{name if name != "text" else "self"}"\n'
            for name, port in zip(TEXTS, ports, strict=True)
        ),
        '[streams.room]\nsource = "thermometer:demo"\nencoders = ["mean_slope", "signal"]\n',
    ]
    path = folder / "session.toml"
    path.write_text("\n".join(rows) + "\n[dashboard]\nenabled = false\n")
    return path


@pytest.mark.slow
@pytest.mark.devices
@pytest.mark.timeout(600)
def test_two_cameras_two_sensors_three_texts_and_a_plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded, verified, replayed from raw, trained on, and run live with the model that came of it."""
    pytest.importorskip("pylsl", reason="needs Lab Streaming Layer: pip install 'stream-mmrnn[lsl]'")
    site = plugin_packages.install_thermometer(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH", "")))))
    path = tmp_path / "a.mcap"
    sensors = [f"imu-{side}-{uuid.uuid4().hex[:8]}" for side in "ab"]
    ports = free_ports(3)
    with ExitStack() as stack:
        cameras = [stack.enter_context(mjpeg_camera(rate_hz=10.0)) for _ in range(2)]
        for name in sensors:
            stack.enter_context(closing(Sender(name)))
        file = settings_file(tmp_path, [c.url for c in cameras], sensors, ports)
        live = stack.enter_context(closing(Running(path, "--config", file, verb=("record",))))
        live.wait_for(lambda: recording_grows(path, 50_000), 40)
        until = time.monotonic() + SECONDS
        words = [["busy", "calm"], ["yes", "no"], ["left", "right"]]
        typing = [
            threading.Thread(target=say, args=(port, until, w, i == 0))
            for i, (port, w) in enumerate(zip(ports, words, strict=True))
        ]
        for t in typing:
            t.start()
        for t in typing:
            t.join()
        code, summary, _ = live.end()
        assert code == 0
        names = ["camera_a", "camera_b", "wrist_a", "wrist_b", *TEXTS, "room", "room.signal"]
        assert sorted(summary["streams"]) == sorted(names)
        assert summary["seconds"] >= SECONDS
        assert all(row["produced"] > 50 for row in summary["streams"].values()), summary["streams"]
        channels = info_of(path)["channels"]
        raw = [topics.raw(n) for n in ("camera_a", "camera_b", *TEXTS, "room")]
        assert {*raw, *(topics.FEATURE + n for n in names)} <= set(channels)
        assert channels[topics.LABEL]["messages"] > 10
        assert channels["feature/room"]["origin"].startswith("mean_slope@")
        assert channels["raw/room"]["messages"] == channels["feature/room"]["messages"]

        # a model of all of it
        out = tmp_path / "mine"
        code, trained, err = run("train", "--data", path, "--out", out, "--name", "mine", "--quick", timeout=280)
        assert code == 0, err
        assert trained["test"]["label"]
        assert set(recipes.load(out / "recipe.toml").modalities) == set(names)

        # and live with it, from the same devices
        second = tmp_path / "b.mcap"
        session = Running("--config", file, "--model", out / "step.onnx", "--record", second)
        stack.enter_context(closing(session))
        session.wait_for(lambda: recording_grows(second, 50_000), 60)
        say(ports[0], time.monotonic() + 5, ["busy", "calm"], labels=False)
        code, summary, _ = session.end()
    assert code == 0
    check_summary(summary)
    assert summary["predictions"] > 100
    verify(second, summary["predictions"])
    present = {name for tick in ticks_of(second) for name, here in tick.present.items() if here}
    assert present >= {"camera_a", "camera_b", "wrist_a", "wrist_b", "text", "room", "room.signal"}
    code, raw_again, err = run("replay", second, "--from", "raw", timeout=120)
    assert (code, raw_again["predictions"]) == (0, summary["predictions"]), err
    assert raw_again["max_abs_difference"] <= 1e-4
    code, made, err = run("unpack", second, tmp_path / "out", timeout=120)
    assert code == 0, err
    assert {"camera_a.mp4", "camera_b.mp4", "features_room.signal.parquet", "raw_room.parquet", "text.csv"} <= set(
        made["files"]
    )
    head = Recording(second)
    assert json.loads(head.metadata["config"])["streams"]["room"]["encoders"] == ["mean_slope", "signal"]


def info_of(path: Path) -> dict[str, Any]:
    code, found, err = run("info", path)
    assert code == 0, err
    return found


class Sender:
    """A sensor of three channels at 50 Hz on Lab Streaming Layer, in a process of its own."""

    def __init__(self, name: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SENDER), "send", name, "IMU", "float32", "3", "50", "1000000"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def test_a_stream_from_the_command_line(tmp_path: Path, model: Path) -> None:
    """`--stream` adds to the usual ones; what the model does not take is recorded all the same."""
    path = tmp_path / "a.mcap"
    code, summary, err = run(
        *("live", "--source", "synthetic", "--stream", "second:vision=synthetic", "--stream", "b:text=synthetic"),
        *("--duration", 3, "--model", model, "--record", path),
    )
    assert code == 0, err
    check_summary(summary)
    assert set(summary["streams"]) >= {"vision", "audio", "text", "second", "b"}
    assert summary["streams"]["second"]["produced"] > 20
    verify(path, summary["predictions"])
    assert {"raw/second", "feature/second", "raw/b", "feature/b"} <= set(info_of(path)["channels"])
    code, raw, err = run("replay", path, "--from", "raw")
    assert (code, raw["predictions"]) == (0, summary["predictions"]), err


def test_a_stream_feeds_the_modality_that_it_names(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text(
        '[streams.webcam]\nkind = "vision"\nsource = "synthetic"\nfeeds = "vision"\n[dashboard]\nenabled = false\n'
    )
    path = tmp_path / "a.mcap"
    code, summary, err = run(
        *("live", "--config", file, "--audio", "synthetic", "--duration", 3, "--model", model, "--record", path),
    )
    assert code == 0, err
    check_summary(summary)
    assert set(summary["streams"]) == {"webcam", "audio"}
    assert sum(t.present["vision"] for t in ticks_of(path)) > 40
    verify(path, summary["predictions"])
    code, raw, err = run("replay", path, "--from", "raw")
    assert (code, raw["identical"]) == (0, True), (err, raw)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--stream", "a"], "--stream 'a': expected NAME=SOURCE or NAME:KIND=SOURCE"),
        (["--stream", "a=synthetic"], "`streams.a.kind` is missing"),
        (["--stream", "a:smell=synthetic"], "`streams.a.kind` has a wrong value"),
        (["--stream", "a=barometer:1"], "'barometer:1' is no source of a"),
        (["--stream", "engine=lsl:x"], "`streams.engine`: a process of the session has this name"),
        (["--stream", "audio=microphone", "--audio", "synthetic", "--stream", "x y=lsl:z"], "`streams.x y`"),
    ],
)
def test_wrong_streams_are_one_sentence(args: list[str], words: str) -> None:
    code, _, err = run("live", *args, "--duration", 1)
    assert code == 2
    assert words in " ".join(err.split())


def test_a_stream_that_feeds_what_the_model_does_not_take_is_refused(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text('[streams.webcam]\nkind = "vision"\nsource = "synthetic"\nfeeds = "vison"\n')
    code, _, err = run("live", "--config", file, "--model", model, "--duration", 1)
    assert code == 2
    assert "`streams.webcam.feeds` is 'vison', and the model takes vision, audio, text" in " ".join(err.split())
