"""Odd inputs: files that others write, cut, empty or in rare forms, each through the real verb in a process of its own.

Scripts in `shared/faults` beside the checkout write the files, and its README says what is right for each; here stands
what of that is seen from outside: exit code, sentence, and how much was read.
"""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from tools.faults.commands import ROOT
from tools.faults.promise import Figure, Say

TITLE = "Odd inputs"
NOT_PROMISED = ("That a damaged file is read as its writer meant it: what is left out is named, and the rest is kept.",)

FOLDER = ROOT.parent / "shared" / "faults"
_SCRIPTS = ("make_media.py", "make_xdf.py", "make_models.py")


class Input(NamedTuple):
    """One input, and what is right for it."""

    name: str
    """The beginning of its folder's name."""
    code: int = 0
    says: str = ""
    """Part of what is printed, with letters of any case."""
    count: int = 0
    """Predictions of a clip, or samples of an XDF file: not fewer."""
    quick: bool = False


MEDIA = (
    Input("01", count=50), Input("02", 2, "no sound in it", quick=True), Input("03", count=50), Input("04", count=50),
    Input("05", count=50), Input("06", count=50), Input("07", 0, "no numbers", 50), Input("08", 0, "cancel", 50),
    Input("09", 2, "error: "), Input("10", count=50), Input("11", count=48), Input("12", count=60),
    Input("13", count=48), Input("14", count=48), Input("15", count=48), Input("16", count=48), Input("17", count=48),
    Input("18", 3, "ends early", 10, quick=True), Input("19", 2, "error: "), Input("20", 2, "error: "),
)  # fmt: skip
"""Clips of 2 s at 25 ticks a second; the last picture of a film is 50 ms before."""
XDF = (
    Input("40", count=202), Input("41", count=202), Input("42", 3, "sample 51", 201, quick=True),
    Input("43", count=202), Input("44", 3, "cut off at byte", 190), Input("45", 2, "error: "), Input("46", count=202),
    Input("47", 3, "damaged", 202), Input("48", 0, "number 5", 400), Input("49", 0, "gap of", 200),
)  # fmt: skip
MODELS = tuple(Input(name, 2, "error: ", quick=name == "36") for name in ("31", "33", "35", "36"))


class _Outcome(NamedTuple):
    code: int
    out: str
    err: str

    def read_count(self) -> int:
        """Of the JSON document: predictions or samples."""
        lines = self.out.splitlines()
        try:
            found = json.loads(lines[-1]) if lines else {}
        except ValueError:
            return 0
        return sum(f.get("predictions", 0) for f in found.get("files", ())) + sum(
            s.get("samples", 0) for s in found.get("streams", ())
        )


def _run(folder: Path, *args: object, limit: str = "", **env: str) -> _Outcome:
    """A verb with its JSON document; `limit`: options of the shell's ulimit."""
    line = shlex.join([sys.executable, "-m", "stream_mmrnn", *map(str, args), "--json"])
    search = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))).rstrip(os.pathsep)
    done = subprocess.run(
        ["sh", "-c", f"ulimit {limit} && exec {line}" if limit else f"exec {line}"],
        capture_output=True, cwd=folder, timeout=120, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": search, "TMPDIR": str(folder), **env},
    )  # fmt: skip
    return _Outcome(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def _files(folder: Path, quick: bool) -> Iterator[tuple[str, str, _Outcome]]:
    """(input, what is wrong with it or "", outcome)."""
    inputs = {path.name[:2]: next(path.iterdir()) for path in (folder / "inputs").iterdir() if path.is_dir()}
    out = folder / "out"
    out.mkdir()
    for given in (*MEDIA, *XDF, *MODELS):
        if quick and not given.quick:
            continue
        path = inputs[given.name]
        if given in XDF:
            done = _run(folder, "import", path, folder / f"{given.name}.mcap")
        elif given in MODELS:
            done = _run(folder, "predict", inputs["04"], "--model", path, "--out", out, "--force")
        else:
            done = _run(folder, "predict", path, "--out", out, "--force")
        wrong = ""
        if done.code != given.code:
            wrong = f"exit code {done.code}, not {given.code}"
        elif given.says.lower() not in (done.out + done.err).lower():
            wrong = f"does not say {given.says!r}"
        elif done.read_count() < given.count:
            wrong = f"{done.read_count()} read, not {given.count}"
        elif given.code == 2 and len(done.err.strip().splitlines()) != 1:
            wrong = "more than one line says why"
        yield path.parent.name, wrong, done


def _situations(folder: Path, quick: bool) -> Iterator[tuple[str, str, _Outcome]]:
    """The same of what is no file: a place that is none for a recording, outputs and limits."""
    fifo = folder / "fifo"
    os.mkfifo(fifo)
    done = _run(folder, "record", fifo, "--source", "synthetic", "--duration", 1)
    kept = stat.S_ISFIFO(fifo.lstat().st_mode) and not list(folder.glob("fifo?*"))
    yield "60 a recording onto a FIFO", "" if done.code == 2 and kept else f"exit code {done.code}, kept: {kept}", done
    if quick:
        return
    path = next((folder / "inputs").glob("10*/*"))
    for name, env in (
        ("output in latin-1", {"PYTHONIOENCODING": "latin-1"}),
        ("output in the C locale", {"LC_ALL": "C", "PYTHONUTF8": "0"}),
    ):
        done = _run(folder, "predict", path, "--out", folder / "out", "--force", **env)
        yield name, "" if done.code == 0 else f"exit code {done.code}", done
    live = ("live", "--source", "synthetic", "--duration", 3)
    for files in (32, 40):
        done = _run(folder, *live, limit=f"-n {files}")
        lines = done.err.strip().splitlines()
        wrong = "" if done.code and len(lines) == 1 else f"exit code {done.code}, {len(lines)} lines"
        yield f"{files} open files", wrong, done
    done = _run(folder, *live, "--record", folder / "small.mcap", limit="-f 20")
    yield "files of 10 kB", "" if done.code == 3 else f"exit code {done.code}, not 3", done


def run(quick: bool, say: Say) -> Iterator[Figure]:
    if not FOLDER.is_dir():
        say(f"skipped: the scripts that write the inputs are not there ({FOLDER.parent.name}/{FOLDER.name})")
        return
    tried = wrong = tracebacks = 0
    with TemporaryDirectory(prefix="stream-mmrnn-inputs-") as name:
        folder = Path(name)
        for script in _SCRIPTS:
            subprocess.run(
                [sys.executable, FOLDER / script, folder / "inputs"], check=True, capture_output=True, cwd=folder
            )
        for of in (_files, _situations):
            for what, fault, done in of(folder, quick):
                tried += 1
                traceback = "Traceback" in done.out + done.err
                wrong, tracebacks = wrong + bool(fault), tracebacks + traceback
                if fault or traceback:
                    say(f"{what}: {fault or 'a traceback'}; {done.err.strip()[-300:]}")
    yield Figure(
        "inputs_wrong_count", f"{tried} odd media, XDF and model files and situations, each through its verb: those "
        "with another exit code, sentence or count than is right", wrong, "", 0, "==",
    )  # fmt: skip
    yield Figure("inputs_tracebacks_count", "of them, those that print a traceback", tracebacks, "", 0, "==")
