"""Labels and predictions of a recording in the formats of labels, and of recordings as one Parquet table.

In a format of labels, what a head decided is a tier `predicted.HEAD`, of the ticks for which it decided so. The
table has a row for each prediction. Knows nothing about how a format is written (`formats`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.core.extras import need
from stream_mmrnn.core.types import HeadSpec
from stream_mmrnn.graph.runtime import Provider
from stream_mmrnn.offline.convert.unpack import inspect
from stream_mmrnn.offline.convert.writers import Parquet
from stream_mmrnn.offline.diff import tracks
from stream_mmrnn.offline.diff.compare import decisions, stretches
from stream_mmrnn.offline.diff.tracks import PredictionTrack
from stream_mmrnn.offline.labels import formats
from stream_mmrnn.offline.labels.attach import spans_of
from stream_mmrnn.offline.labels.entries import Clock, Entry, plain
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.training.tasks.recordings import TypedEvents
from stream_mmrnn.viewers.columns import Column, columns

TABLE = ".parquet"
RECORDED = "recorded"
"""Instead of a model: the predictions in the recording."""

Alive = Callable[[], bool]


def check(paths: Sequence[Path], to: Path, force: bool) -> None:
    """Check before anything is computed that `to` can be written; raises UsageError or FileError."""
    if to.suffix.lower() == TABLE:
        need("Parquet", "export", "pyarrow")
    else:
        formats.check(to)
        if len(paths) > 1:
            raise UsageError(f"{to} is of one recording, and {len(paths)} are named; a {TABLE} file takes several")
    if to.exists() and not (force and to.is_file()):
        raise FileError(f"{to} is there already; choose another name, or use --force for a file")
    if not to.parent.is_dir():
        raise FileError(f"{to} cannot be written: there is no folder {to.parent}; make it first")


def to_labels(
    paths: Sequence[Path],
    to: Path,
    model: str = "",
    *,
    chosen: Collection[str] = (),
    clock: Clock = "session",
    provider: Provider = "cpu",
    force: bool = False,
    alive: Alive = lambda: True,
) -> dict[str, Any]:
    """Write one recording's labels, and with `model` its predictions (`RECORDED`: those in it), in a format of labels.

    `chosen`: the tiers to write; without any, all.

    Raises:
        UsageError: there is no such format, model or tier, or several recordings are named.
        FileError: there is nothing to write, it cannot be written, or the format cannot hold it.

    """
    check(paths, to, force)
    (path,) = paths
    seen, recording = inspect(path), Recording(path)
    offset_ns = seen.zero_ns
    if clock == "wall":
        offset_ns = int(recording.metadata["started_ns"]) - recording.started_unix_ns
    tiers = {tier: spans_of(changes, seen.end_ns) for tier, changes in TypedEvents.of(recording).tiers.items()}
    if model:
        tiers |= decided(_track(path, model, provider, alive))
    tiers = {tier: found for tier, found in tiers.items() if found}
    if unknown := [tier for tier in chosen if tier not in tiers]:
        raise UsageError(f"{path} has no tier {unknown[0]!r}; it has {', '.join(map(repr, tiers)) or 'none'}")
    entries = [
        Entry(f"a label of {path.name}", tier, max(begin, seen.zero_ns) - offset_ns, end - offset_ns, plain(name))
        for tier, found in tiers.items()
        if not chosen or tier in chosen
        for begin, end, name in found
        if end > seen.zero_ns and plain(name)
    ]
    if not entries:
        raise FileError(
            f"{path} holds no labels{' or decisions' if model else ''} to write; give it some with stream-mmrnn label "
            "--from"
        )
    formats.write(to, entries, path.stem, seen.end_ns - offset_ns, force)
    counts = {tier: sum(e.tier == tier for e in entries) for tier in dict.fromkeys(e.tier for e in entries)}
    return {"recordings": [str(path)], "written": str(to), "tiers": counts, "rows": 0, "damage": seen.damage}


def _track(path: Path, model: str, provider: Provider, alive: Alive) -> PredictionTrack:
    return tracks.recorded(path) if model == RECORDED else tracks.predicted(path, model, provider, alive=alive)


def _specs(track: PredictionTrack) -> tuple[HeadSpec, ...]:
    """The heads in order; with numbers instead of labels where they are not known."""
    return tuple(track.specs.get(name) or HeadSpec(name, "", x.shape[1]) for name, x in track.heads.items())


def _decided_at(spec: HeadSpec, values: Any) -> dict[str, list[str]]:
    """By tier what a head decides at each tick: a label, or "" for none."""
    found = decisions(spec, values)
    if found is None:
        return {}
    names = [spec.labels[i] if i < len(spec.labels) else str(i) for i in range(spec.size)]
    if spec.kind == "classification" and spec.size > 1:
        return {f"predicted.{spec.name}": [names[i] if i >= 0 else "" for i in found.reshape(-1).tolist()]}
    found = found.reshape(len(values), -1)
    if spec.size == 1:
        name = spec.labels[0] if spec.labels else spec.name
        return {f"predicted.{spec.name}": [name if yes > 0 else "" for yes in found[:, 0].tolist()]}
    return {
        f"predicted.{spec.name}.{name}": [name if yes > 0 else "" for yes in found[:, i].tolist()]
        for i, name in enumerate(names)
    }


def decided(track: PredictionTrack) -> dict[str, list[tuple[int, int, str]]]:
    """By tier when which decision held: begin, end and label. A tick is from the end of the one before."""
    tick_ns = int(np.median(np.diff(track.event_ns))) if len(track.event_ns) > 1 else 0
    begin_ns = track.event_ns - tick_ns
    tiers: dict[str, list[tuple[int, int, str]]] = {}
    for spec in _specs(track):
        for tier, names in _decided_at(spec, track.heads[spec.name]).items():
            spans = tiers.setdefault(tier, [])
            array = np.array(names, object)
            for name in dict.fromkeys(filter(None, names)):
                for first, last in stretches(np.asarray(array == name, np.bool_)):
                    spans.append((int(begin_ns[first]), int(track.event_ns[last]), name))
            spans.sort()
    return tiers


def to_table(
    paths: Sequence[Path],
    to: Path,
    model: str = RECORDED,
    *,
    provider: Provider = "cpu",
    force: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    alive: Alive = lambda: True,
) -> dict[str, Any]:
    """Write one row for each prediction of some recordings: its time, the labels at that time, and each number.

    Columns: `recording`, `tick`, `event_ns`, `unix_ns`, `seconds`, `true.TIER` for each tier of labels,
    `predicted.HEAD` for each decision, and `HEAD.LABEL` for each number. Without a label or a decision there is null.

    Raises:
        UsageError: there is no such model, or pyarrow is missing.
        FileError: a recording has no predictions, or other heads than the first; the table cannot be written.

    """
    check(paths, to, force)
    made, damage = [], ""
    for path in paths:
        progress(path.name)
        track = _track(path, model, provider, alive)
        made.append((path, track, TypedEvents.of(Recording(path))))
        damage = damage or track.damage
    heads = _specs(made[0][1])
    for path, track, _ in made[1:]:
        if [(h.name, h.size) for h in _specs(track)] != [(h.name, h.size) for h in heads]:
            raise FileError(f"the predictions of {path} have other heads than those of {paths[0]}; name one --model")
    tiers = list(dict.fromkeys(tier for _, _, events in made for tier, changes in events.tiers.items() if changes))
    choices = list(dict.fromkeys(c for h in heads for c in _decided_at(h, np.zeros((1, h.size), np.float32))))
    numbers = columns(heads)
    try:
        with tempfile.TemporaryDirectory(prefix=".label-", dir=to.parent) as folder:
            file = Path(folder) / "table.parquet"
            writer = Parquet(file, _schema(tiers, choices, numbers), list)
            try:
                for path, track, events in made:
                    for row in _rows(path, track, events, tiers, choices, numbers):
                        writer.add(row)
            finally:
                count = writer.close()["rows"]
            file.replace(to)
    except OSError as e:
        raise FileError(f"{to} cannot be written: {e.strerror}; choose another place") from e
    labels = {tier: sum(len(events.tiers.get(tier, ())) for _, _, events in made) for tier in tiers}
    recordings = [str(path) for path in paths]
    return {"recordings": recordings, "written": str(to), "tiers": labels, "rows": count, "damage": damage}


def _schema(tiers: Sequence[str], choices: Sequence[str], numbers: Sequence[Column]) -> Any:
    import pyarrow as pa

    texts = [*(f"true.{tier}" for tier in tiers), *choices]
    return pa.schema(
        [
            ("recording", pa.string()),
            *((name, pa.int64()) for name in ("tick", "event_ns", "unix_ns")),
            ("seconds", pa.float64()),
            *((name, pa.string()) for name in texts),
            *((c.label, pa.float32()) for c in numbers),
        ]
    )


def _rows(
    path: Path,
    track: PredictionTrack,
    events: TypedEvents,
    tiers: Sequence[str],
    choices: Sequence[str],
    numbers: Sequence[Column],
) -> Any:
    recording = Recording(path)
    wall_ns = recording.started_unix_ns - int(recording.metadata["started_ns"])
    zero_ns = inspect(path).zero_ns
    said: Mapping[str, list[str]] = {
        tier: names for h in _specs(track) for tier, names in _decided_at(h, track.heads[h.name]).items()
    }
    nothing = [""] * len(track.ticks)
    texts = [events.labels_at(track.event_ns, tier) for tier in tiers] + [said.get(c, nothing) for c in choices]
    values = [track.heads[c.head][:, c.index].tolist() for c in numbers]
    when = zip(track.ticks.tolist(), track.event_ns.tolist(), strict=True)
    for i, (tick, event_ns) in enumerate(when):
        yield [
            path.name,
            tick,
            event_ns,
            event_ns + wall_ns,
            (event_ns - zero_ns) / 1e9,
            *(column[i] or None for column in texts),
            *(column[i] for column in values),
        ]
