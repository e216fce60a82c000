"""A session that was done in part says so, and ends with exit code 3: a file that was cut off, a disk that was full."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from harness import COMMAND, run

from stream_mmrnn.recording.report import verify

pytestmark = [pytest.mark.process, pytest.mark.slow]

NO_OTHERS = ("--audio", "none", "--text", "none", "--no-dashboard")


def cut_movie(path: Path) -> Path:
    """Two seconds of pictures, of which a third is missing."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("mjpeg", rate=20)
        video.width, video.height, video.pix_fmt = 64, 48, "yuvj420p"
        video.codec_context.time_base = Fraction(1, 20)
        noise = np.random.default_rng(0)
        for i in range(40):
            frame = av.VideoFrame.from_ndarray(noise.integers(0, 255, (48, 64, 3), np.uint8), format="rgb24")
            frame.pts = i
            out.mux(video.encode(frame.reformat(format="yuvj420p")))
        out.mux(video.encode(None))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    return path


def test_a_clip_that_was_cut_off(model: Path, tmp_path: Path) -> None:
    clip, out = cut_movie(tmp_path / "cut.avi"), tmp_path / "a.mcap"
    code, summary, err = run("live", "--vision", f"file:{clip}", *NO_OTHERS, "--duration", 20, "--record", out)
    assert code == 3, err
    assert len(summary["partial"]) == 1
    assert "vision was done in part: cut.avi ends early" in summary["partial"][0]
    assert summary["streams"]["vision"]["produced"] > 10
    assert verify(out)["whole"]
    code, document, err = run("predict", clip, "--out", tmp_path, "--model", model)
    assert (code, len(document["files"]), document["files"][0]["predictions"] > 0) == (3, 1, True), err
    assert "cut.avi ends early" in document["files"][0]["warnings"][0]
    assert "cut.avi ends early" in err


def test_a_clip_of_which_enough_was_asked_for_is_whole(tmp_path: Path) -> None:
    clip = cut_movie(tmp_path / "cut.avi")
    code, summary, err = run("live", "--vision", f"file:{clip}", *NO_OTHERS, "--duration", 0.5)
    assert (code, summary["partial"]) == (0, []), err


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_recording_that_lost_most_of_itself(tmp_path: Path) -> None:
    import resource

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_480, 20_480))

    command = [*COMMAND, "record", str(tmp_path / "a.mcap"), "--source", "synthetic", "--duration", "2", "--plain"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=limited, env=os.environ)
    assert done.returncode == 3, done.stdout + done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert "a.mcap lacks at least" in said
    assert "has no end, because of the disk (File too large); make room" in said
