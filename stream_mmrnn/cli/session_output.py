"""What `live` and `record` print while a session runs, and its summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from stream_mmrnn.cli.terminal import Console, print_document, say_on
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.printable import shown
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.stream_table import stream_table

if TYPE_CHECKING:
    from rich.live import Live

_SCREEN_NS = 120_000_000
_LINE_NS = 1_000_000_000
_NOTES = 16
"""How many of the newest notes the full view may show."""


class SessionOutput:
    """What is printed while a session runs: a full view, one line per second, JSON lines, or only the summary."""

    def __init__(self, settings: Settings, as_json: bool, plain: bool) -> None:
        from rich.live import Live

        from stream_mmrnn.core.log import JsonLines, at_least
        from stream_mmrnn.viewers.dashboard.state import LiveState

        self._as_json = as_json
        self._console = Console(stderr=as_json, highlight=False)
        self.lines = JsonLines(settings.log.level) if settings.log.format == "json" else None
        self.quiet = as_json or self.lines is not None
        """Whether the messages themselves are not shown."""
        self.screen: Live | None = None
        if self._console.is_terminal and not plain and not self.quiet:
            self.screen = Live(console=self._console, refresh_per_second=8, transient=True)
        self.say: Callable[[str], None] = self.lines or at_least(settings.log.level, self._note)
        self.state = LiveState(table=stream_table(settings))
        self._notes: list[str] = []
        self._addresses: dict[str, str] = {}
        self._began_ns = now_ns()
        self._drawn_ns = 0

    def _note(self, text: str) -> None:
        self._notes.append(text)
        del self._notes[:-_NOTES]
        if self.screen is None:
            say_on(self._console)(text)

    def refresh(self, addresses: Mapping[str, str]) -> None:
        """Called often: print new addresses (by process) at once, and the state when it is time to."""
        for name in addresses.keys() - self._addresses.keys():
            self._show_address(name, shown(addresses[name], 64))
        at_ns = now_ns()
        if self.quiet or at_ns - self._drawn_ns <= (_LINE_NS if self.screen is None else _SCREEN_NS):
            return
        self._drawn_ns = at_ns
        seconds, state = (at_ns - self._began_ns) / 1e9, self.state.snapshot(at_ns)
        if self.screen is None:
            self._console.print(_line(seconds, state), soft_wrap=True, markup=False)
            return
        from stream_mmrnn.viewers.terminal_view import render

        headline = f"{seconds:6.1f} s   {'  '.join(self._addresses.values())}"
        self.screen.update(render(state, self._console.width, headline, self._notes, self._console.height))

    def _show_address(self, name: str, address: str) -> None:
        from stream_mmrnn.core.log import Note

        self._addresses[name] = address
        if self.lines is not None:
            self.lines(Note(f"{name}: {address}", name, "address", address=address))
        elif self.screen is None:
            self._console.print(f"{name}: {address}")

    def restore(self) -> None:
        """Leave the terminal usable when the program ends at once."""
        if self.screen is not None:
            self._console.show_cursor()

    def show_summary(self, summary: dict[str, Any]) -> None:
        from stream_mmrnn.core.log import Note
        from stream_mmrnn.viewers.terminal_view import summary_table

        if self._as_json:
            print_document(summary)
        elif self.lines is None:
            self._console.print(summary_table(summary))
        else:
            level = "error" if summary["failed"] else "warning" if summary["partial"] else "info"
            text = f"the session {summary['session']!r} is over"
            self.lines(Note(text, "supervisor", "summary", level, **summary))


def _line(seconds: float, state: dict[str, Any]) -> str:
    """The state in one line, for output that is no terminal."""
    heads = "  ".join(
        f"{name} [{' '.join('–' if v is None else f'{v:.2f}' for v in head['values'])}]"
        for name, head in state["heads"].items()
    )
    rates = " ".join(
        f"{s['modality']} {s['rate_hz']:.0f}Hz" for n, s in state["streams"].items() if n.startswith("feature/")
    )
    return f"{seconds:6.1f} s  {rates}  {heads}".rstrip()
