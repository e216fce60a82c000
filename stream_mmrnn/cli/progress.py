"""The progress of a training on a terminal: step, loss and time left from the first step on. Knows nothing of torch."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stream_mmrnn.cli.terminal import Console

_WHOLE = 1.0


class TrainingBar:
    """A bar over all epochs, drawn from the events of `training.verbs.train`; without a terminal one line an epoch."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TimeRemainingColumn(compact=True),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("reading the data", total=None, left="")

    def __enter__(self) -> TrainingBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def observe(self, what: dict[str, Any]) -> None:
        """Draw an event."""
        if what["event"] == "step":
            of = f" of {what['of']}" if what["of"] else ""
            text = f"epoch {what['epoch'] + 1} of {what['epochs']}, step {what['step']}{of}, loss {what['loss']:.3f}"
            # the share of an epoch of unknown length is not known: then the bar moves with the epochs
            self._bar.update(self._task, description=text, completed=what["share"], total=_WHOLE, left="at most")
        elif what["event"] == "epoch":
            losses = f"loss {what['train_loss']:.4f}, validation {what['validation_loss']:.4f}"
            best = " (best)" if what["best"] == what["epoch"] else ""
            self._console.print(f"epoch {what['epoch']:3d}  {losses}{best}  {what['seconds']:.1f} s")
        elif what["event"] == "report":
            self._bar.update(self._task, description="calibrated; testing and exporting", total=None, left="")
