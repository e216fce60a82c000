"""The verb `page`: the live page without a session, from which sessions are started and recordings are opened."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stream_mmrnn.cli.terminal import ConfigFile, Console, Json, print_document
from stream_mmrnn.core import config, processes
from stream_mmrnn.core.errors import StreamError
from stream_mmrnn.core.printable import shown
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.signals import StopFlag
from stream_mmrnn.core.streams import is_sensor

if TYPE_CHECKING:
    from stream_mmrnn.live.child import ChildSession
    from stream_mmrnn.viewers.dashboard.controls import Choice
    from stream_mmrnn.viewers.dashboard.hub import Hub

_USUAL: dict[str, tuple[tuple[str, str], ...]] = {
    "vision": (("none", "no camera"), ("synthetic", "a simulated person")),
    "audio": (("microphone", "the default microphone"), ("none", "no microphone"), ("synthetic", "a simulated person")),
    "text": (("page", "typed on this page"), ("none", "no text"), ("synthetic", "a simulated person")),
}
"""What may be chosen on every machine, beside its devices and what the settings name."""
_KEPT = 8
"""Ended sessions that the page still names."""


def page(
    config_file: ConfigFile = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="The page's port; 0 takes any free one.")] = None,
    as_json: Json = False,
) -> None:
    """Serve the live page without a session: start and stop sessions, record, open recordings on it."""
    from stream_mmrnn.bus import keys
    from stream_mmrnn.core.clock import now_ns
    from stream_mmrnn.offline.replay_child import ReplayView
    from stream_mmrnn.viewers.dashboard.controls import Controls
    from stream_mmrnn.viewers.dashboard.hub import Hub
    from stream_mmrnn.viewers.dashboard.server import Dashboard
    from stream_mmrnn.viewers.dashboard.state import LiveState

    console = Console(stderr=True, highlight=False)
    alive = StopFlag.unwinding()
    settings = config.load(config_file, {"dashboard.port": port})
    about, token, made = settings.dashboard, "", False
    if about.token_file:
        token, made = keys.token(Path(about.token_file))
    launcher = Launcher(config_file, settings)
    controls = Controls(
        settings.page,
        Path(settings.record.folder),
        launcher,
        lambda key, path: ReplayView(path, board.show, lambda: controls.state(key, None)),
    )
    board = Dashboard(
        about.host,
        about.port,
        token=token,
        posts=controls.posts,
        features=("controls",),
        views=lambda key, again: hub.view(key, again),
        cert=about.cert,
        key=about.key,
    )

    def changed() -> None:
        controls.refresh()
        launcher.poll()
        board.update({**LiveState().snapshot(now_ns()), **controls.state("", None)})

    hub = controls.hub = launcher.hub = Hub(
        board.show, controls.state, settings.text.max_line_bytes, changed, reopen=controls.reopen
    )
    with contextlib.ExitStack() as stack:
        stack.callback(board.close)
        stack.callback(launcher.close)
        stack.callback(hub.close)
        board.start()
        hub.start()
        launcher.look()
        console.print(f"dashboard: {board.address}", soft_wrap=True)
        if made:
            console.print(f"the page's token, shown this once: {token} (it is in {shown(about.token_file)})")
        while alive():
            time.sleep(0.1)
    if as_json:
        print_document({"page": board.address, "sessions": launcher.started()})


class Launcher:
    """Starts sessions as processes, from what the page offers and nothing else."""

    hub: Hub

    def __init__(self, config_file: Path | None, settings: Settings) -> None:
        self._config_file, self._settings = config_file, settings
        self._lock = threading.Lock()
        self._children: list[ChildSession] = []
        self._devices: dict[str, Any] = {"cameras": [], "microphones": [], "problem": ""}
        self._looking: threading.Thread | None = None

    def offers(self) -> dict[str, Any]:
        found = {"vision": self._devices["cameras"], "audio": self._devices["microphones"], "text": []}
        sources = {}
        for name, usual in _USUAL.items():
            values = dict(usual)
            row = self._settings.streams.get(name)
            configured = row.source if row is not None else getattr(self._settings.sources, name)
            # a session that is started here has no page of its own, whose browser could be the device
            if configured not in ("stdin", "none") and not is_sensor(configured, name):
                values = {configured: "as in the settings", **values}
            # a description of a device names it better than the settings do
            values |= {device["source"]: device["is"] for device in found[name]}
            sources[name] = [{"value": value, "is": what[:120]} for value, what in values.items()]
        own = self._settings.engine.model
        models = [{"value": name, "is": name} for name in dict.fromkeys([own, *config.zoo_names()])]
        looking = self._looking is not None and self._looking.is_alive()
        return {**sources, "models": models, "looking": looking, "problem": self._devices["problem"]}

    def started(self) -> list[dict[str, Any]]:
        keys = {entry.pid: entry for entry in self.hub.sessions}
        return [self._about(child, keys) for child in self._children]

    @staticmethod
    def _about(child: ChildSession, running: dict[int, Any]) -> dict[str, Any]:
        from stream_mmrnn.viewers.dashboard.hub import key_of

        entry = running.get(child.pid)
        child.was_seen = child.was_seen or entry is not None
        state = "running" if entry is not None else "ending" if child.was_seen else "starting"
        if child.ended:
            state = "failed" if child.why() else "ended"
        recording = (child.summary or {}).get("recording") or {}
        return {
            "number": child.pid,
            "name": child.name,
            "state": state,
            "why": child.why()[:400],
            "key": key_of(entry) if entry is not None and not child.ended else "",
            "file": Path(recording.get("path", "")).name,
        }

    def poll(self) -> None:
        """Forget what ended long ago, and release what it held."""
        with self._lock:
            ended = [child for child in self._children if child.ended]
            for child in ended[:-_KEPT]:
                child.close()
                self._children.remove(child)

    def start(self, choice: Choice) -> str:
        """Start a session; why not, as one sentence, or ""."""
        from stream_mmrnn.live.child import ChildSession
        from stream_mmrnn.live.requests import new_path

        offers = self.offers()
        for name in ("vision", "audio", "text"):
            value = getattr(choice, name)
            if value not in {offered["value"] for offered in offers[name]}:
                return f"{value[:80]!r} is no source of {name} that this page offers; look for devices again"
        model = choice.model or self._settings.engine.model
        if model not in {offered["value"] for offered in offers["models"]}:
            return f"there is no model {model[:80]!r} here; choose one of those that this page offers"
        with self._lock:
            here = [child for child in self._children if not child.ended]
            if any(child.name == choice.name for child in here):
                return f"a session {choice.name!r} is running; choose another name"
            if len(here) >= self._settings.page.sessions:
                return f"{len(here)} sessions are running, the most that page.sessions allows; stop one of them"
            overrides = {
                **{f"sources.{name}": getattr(choice, name) for name in ("vision", "audio", "text")},
                "engine.model": model,
                "session.name": choice.name,
                "dashboard.enabled": False,  # it is shown on this page
                "record.path": "",
            }
            try:
                if choice.record:
                    overrides["record.path"] = str(new_path(Path(self._settings.record.folder), choice.name))
                settings = config.load(self._config_file, overrides)
                if not processes.captured(settings):
                    return "nothing is chosen: choose a camera, a microphone or a text source"
                self._children.append(ChildSession(settings))
            except StreamError as e:
                return str(e)
            except OSError as e:
                return f"the session's process cannot be started: {e.strerror}"
        return ""

    def look(self) -> str:
        """Look for cameras and microphones, which takes seconds; why that is not begun, or ""."""
        with self._lock:
            if self._looking is not None and self._looking.is_alive():
                return "devices are being looked for already"
            self._looking = threading.Thread(target=self._look, name="devices", daemon=True)
            self._looking.start()
        return ""

    def _look(self) -> None:
        from stream_mmrnn.cli import device_preview

        with contextlib.suppress(StreamError):
            self._devices = device_preview.found()

    def close(self) -> None:
        """End every session in order, together."""
        with self._lock:
            for child in self._children:
                child.end()
            for child in self._children:
                child.close()
