"""A microphone and a camera without hardware, for tests and for people who have none at hand.

The microphone is a private PulseAudio server whose speaker is wired to its microphone; the camera is an
MJPEG server on loopback. Neither needs a kernel module or rights. Knows nothing about the package: it only
looks like devices. Run `python tools/virtual_devices.py --help`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_NEEDED = "pulseaudio pulseaudio-utils libasound2-plugins libportaudio2"


def missing_programs() -> list[str]:
    """What a virtual microphone needs and this machine lacks; empty when all is there."""
    return [name for name in ("pulseaudio", "paplay", "pactl") if shutil.which(name) is None]


def _end(process: subprocess.Popen[bytes] | None) -> None:
    if process is None:
        return
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class VirtualMicrophone:
    """A running one: `env` is what a process needs in its environment to hear it, `device` what to open."""

    device = "pulse"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.env = {
            "XDG_RUNTIME_DIR": str(folder),
            "PULSE_RUNTIME_PATH": str(folder / "pulse"),
            "PULSE_SERVER": f"unix:{folder}/native",
            "PULSE_STATE_PATH": str(folder / "state"),
        }
        self._server: subprocess.Popen[bytes] | None = None
        self._listener: subprocess.Popen[bytes] | None = None
        self._player: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server; also after `stop`, which is how a microphone is plugged in again."""
        script = self._folder / "default.pa"
        script.write_text(
            f"load-module module-native-protocol-unix auth-anonymous=1 socket={self._folder}/native\n"
            "load-module module-null-sink sink_name=vmic rate=48000 channels=1\n"
            "load-module module-remap-source master=vmic.monitor source_name=virtmic\n"
            "set-default-sink vmic\nset-default-source virtmic\n"
        )
        (self._folder / "pulse").mkdir(mode=0o700, exist_ok=True)
        self._server = subprocess.Popen(
            [
                "pulseaudio",
                "-n",
                "-F",
                str(script),
                "--daemonize=no",
                "--exit-idle-time=-1",
                "--use-pid-file=no",
            ],
            env={**os.environ, **self.env},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            asked = subprocess.run(
                ["pactl", "get-default-source"],
                env={**os.environ, **self.env},
                capture_output=True,
                check=False,
            )
            if asked.stdout.strip() == b"virtmic":
                self._listen()
                return
            time.sleep(0.05)
        self.stop()
        raise RuntimeError("the virtual microphone does not start within 10 s: try `pulseaudio -n` by hand")

    def _listen(self) -> None:
        """Keep one listener in a hurry: left alone, the null sink makes sound two seconds at a time, and a
        microphone that is opened then hears nothing for as long and is told a wrong delay.
        """
        self._listener = subprocess.Popen(
            ["parec", "--latency-msec=10", "--rate=8000", "--channels=1", "--format=s16le", "--raw"],
            env={**os.environ, **self.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        pipe = self._listener.stdout
        assert pipe is not None
        heard = threading.Event()

        def drain() -> None:
            blocks = 0
            while pipe.read(160):
                blocks += 1
                if blocks == 50:  # well into the steady flow
                    heard.set()
            pipe.close()

        threading.Thread(target=drain, daemon=True).start()
        heard.wait(8)

    def stop(self) -> None:
        """Pull the plug."""
        for process in (self._player, self._listener, self._server):
            _end(process)
        self._player = self._listener = self._server = None

    def play(self, path: Path, *, wait: bool = True) -> None:
        """Play a WAV file into the microphone, in place of what is still being played."""
        _end(self._player)
        command = ["paplay", "--latency-msec=20", str(path)]
        self._player = subprocess.Popen(command, env={**os.environ, **self.env}, stderr=subprocess.DEVNULL)
        if wait:
            self._player.wait()


@contextlib.contextmanager
def virtual_microphone(wav: Path | None = None) -> Iterator[VirtualMicrophone]:
    """A microphone that hears what is played into it; `wav` is played over and over until the end."""
    if missing_programs():
        raise RuntimeError(f"a virtual microphone needs {', '.join(missing_programs())}: install {_NEEDED}")
    stopped = threading.Event()

    def loop(microphone: VirtualMicrophone, path: Path) -> None:
        while not stopped.is_set():
            microphone.play(path)
            stopped.wait(0.2)  # a file that cannot be played must not make this a busy loop

    # a short path: the name of a socket has 107 characters
    with tempfile.TemporaryDirectory(prefix="vmic-") as folder:
        microphone = VirtualMicrophone(Path(folder))
        microphone.start()
        looper = None
        if wav is not None:
            looper = threading.Thread(target=loop, args=(microphone, wav), daemon=True)
            looper.start()
        try:
            yield microphone
        finally:
            stopped.set()
            microphone.stop()
            if looper is not None:
                looper.join(5)


Frames = Callable[[], Iterator[bytes]]
"""Makes an endless stream of JPEG pictures anew for every viewer."""


def clip_frames(path: Path) -> Frames:
    """The pictures of a clip, over and over."""
    import cv2

    def frames() -> Iterator[bytes]:
        while True:
            clip = cv2.VideoCapture(str(path))
            if not clip.isOpened():
                raise RuntimeError(f"the clip {path} cannot be read: give a video file")
            while True:
                good, frame = clip.read()
                if not good:
                    break
                yield cv2.imencode(".jpg", frame)[1].tobytes()
            clip.release()

    return frames


def numbered_frames(width: int = 320, height: int = 240) -> Frames:
    """Pictures that carry their number as 16 black and white bars, highest bit left: see `read_number`."""
    import cv2
    import numpy as np

    def frames() -> Iterator[bytes]:
        for number in itertools.count():
            bars = np.array([(number >> (15 - bit)) & 1 for bit in range(16)], np.uint8) * 255
            picture = np.repeat(bars, width // 16)[None, :, None].repeat(height, 0).repeat(3, 2)
            yield cv2.imencode(".jpg", np.ascontiguousarray(picture))[1].tobytes()

    return frames


def read_number(picture: Any) -> int:
    """The number in a picture of `numbered_frames`."""
    height, width = picture.shape[:2]
    return sum(1 << (15 - bit) for bit in range(16) if int(picture[height // 2, width * (2 * bit + 1) // 32, 0]) > 127)


class MjpegCamera:
    """A camera on loopback: `url` opens it; `stop` unplugs it, `start` plugs it in again on the same port."""

    def __init__(self, frames: Frames, rate_hz: float, port: int = 0) -> None:
        self._frames, self._rate_hz, self._port = frames, rate_hz, port
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self.sent: list[int] = []
        """CLOCK_MONOTONIC of each picture sent, in nanoseconds; all viewers together."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/camera.mjpg"

    def start(self) -> None:
        camera, stopped = self, threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                due = time.monotonic()
                # a viewer that leaves, or a plug that is pulled
                with contextlib.suppress(OSError, ValueError):
                    for jpeg in camera._frames():
                        if stopped.wait(max(0.0, due - time.monotonic())):
                            return
                        due += 1 / camera._rate_hz
                        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                        camera.sent.append(time.monotonic_ns())
                        self.wfile.write(head.encode() + jpeg + b"\r\n")

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        self._stopped = stopped
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if self._server is not None and self._thread is not None:
            self._stopped.set()
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = self._thread = None


@contextlib.contextmanager
def mjpeg_camera(clip: Path | Frames | None = None, rate_hz: float = 25.0, port: int = 0) -> Iterator[MjpegCamera]:
    """A camera that shows a clip, or what a generator makes, or numbered pictures, at `rate_hz`."""
    frames = clip_frames(clip) if isinstance(clip, Path) else clip or numbered_frames()
    camera = MjpegCamera(frames, rate_hz, port)
    camera.start()
    try:
        yield camera
    finally:
        camera.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description="A microphone and a camera without hardware, until Ctrl-C.")
    parser.add_argument("--wav", type=Path, help="a virtual microphone that hears this WAV file over and over")
    parser.add_argument("--clip", type=Path, help="a camera that shows this video file; without it, numbered pictures")
    parser.add_argument("--camera", action="store_true", help="a camera, also without --clip")
    parser.add_argument("--rate", type=float, default=25.0, help="pictures a second (25)")
    parser.add_argument("--port", type=int, default=0, help="the camera's port on 127.0.0.1 (any free one)")
    asked = parser.parse_args()
    if not (asked.wav or asked.clip or asked.camera):
        parser.error("nothing to do: give --wav, --clip or --camera")
    for path in (asked.wav, asked.clip):
        if path is not None and not path.is_file():
            parser.error(f"there is no file {path}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either way the servers go with us
    with contextlib.ExitStack() as stack:
        try:
            if asked.wav:
                microphone = stack.enter_context(virtual_microphone(asked.wav))
                print("set these, then use the source microphone:pulse")
                for name, value in microphone.env.items():
                    print(f"export {name}={value}")
            if asked.clip or asked.camera:
                camera = stack.enter_context(mjpeg_camera(asked.clip, asked.rate, asked.port))
                print(f"use the source camera:{camera.url}")
        except (RuntimeError, OSError) as e:
            print(e, file=sys.stderr)
            return 1
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
