"""Convert a ROS 2 bag to a recording.

Its messages are processed like live samples: by the time in their headers, in the order in which they were recorded.
Knows nothing about the layout of bags (`ros_bag`), of messages (`ros_messages`) or of recordings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stream_mmrnn.capture.pipeline import Outgoing
from stream_mmrnn.capture.resampler import BlockResampler
from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import FileError, UsageError, WireError
from stream_mmrnn.core.settings import StreamSettings
from stream_mmrnn.core.sound import mono
from stream_mmrnn.core.types import Sample
from stream_mmrnn.core.wire import encodable
from stream_mmrnn.offline.convert import ros_messages
from stream_mmrnn.offline.convert.imported import (
    FIRST_NS,
    Imported,
    SampledMessages,
    described,
    without_devices,
    write,
)
from stream_mmrnn.offline.convert.roles import is_role, kind_of, own_name, stream_of
from stream_mmrnn.offline.convert.ros_bag import Bag, Topic

ROLES = ("vision", "audio", "other_audio", "text", "other_text", "signal", topics.LABEL, "none")
_NAMED = ("vision", "audio", "text", "signal")
_USUAL = {"vision": ("vision",), "audio": ("audio", "other_audio"), "signal": ("signal",)}
"""By kind of stream, the roles that its topics get without being asked for; further ones are named by their topic."""
_BLOCK = topics.AUDIO_RATE_HZ // 50
_GAP_NS = 200_000_000
"""Sound that begins later than that after the sound before it does not follow it."""


def roles(found: Mapping[str, Topic], chosen: Mapping[str, str]) -> dict[str, str]:
    """The role of each topic with messages. `chosen`: those that the user assigned.

    Raises:
        UsageError: there is no such topic or role, it does not fit, or two topics have one role.

    """
    known = {name: topic for name, topic in found.items() if topic.count and topic.kind in ros_messages.KINDS}
    for name, role in chosen.items():
        if name not in known:
            can = ", ".join(known) or "none that can be imported"
            raise UsageError(f"the bag has no topic {name!r} that can be imported; it has {can}")
        if not is_role(role, ROLES, _NAMED):
            raise UsageError(f"{role!r} is not a role of a topic; use one of {', '.join(ROLES)}, or STREAM:KIND")
        is_kind = ros_messages.KINDS[known[name].kind]
        if kind_of(role) not in (is_kind, "none") and not (is_kind == "text" and role == topics.LABEL):
            raise UsageError(f"{name} is {known[name].kind}, which is {is_kind}, and {role} is not")
    role_of = dict(chosen)
    for number, (name, topic) in enumerate(known.items()):
        if name not in role_of:
            kind, taken = ros_messages.KINDS[topic.kind], {role.partition(":")[0] for role in role_of.values()}
            free = [role for role in _USUAL.get(kind, ()) if role not in taken]
            # strings may be anything: words that were said, states of a machine
            role_of[name] = "none" if kind == "text" else free[0] if free else own_name(name, number, taken, kind)
    for role, count in Counter(role_of.values()).items():
        if count > 1 and role not in ("none", topics.LABEL):
            both = ", ".join(name for name, of in role_of.items() if of == role)
            raise UsageError(
                f"several topics are the {role}: {both}; choose another with --as TOPIC=none or STREAM:KIND"
            )
    return role_of


def convert(
    path: Path,
    out: Path,
    session: str = "imported",
    chosen: Mapping[str, str] | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> dict[str, Any]:
    """Convert a bag to a recording; `progress` is called with the share that is done.

    Raises:
        FileError: `path` is no bag, or `out` exists already or cannot be written.
        UsageError: the role of a topic is impossible, or the extra `ros` is missing.

    """
    bag = Bag(path)
    found = bag.inspect()
    if topics.CLOCK in found or topics.PREDICTION in found:
        raise UsageError(f"{path} is a recording of this program already; replay it: stream-mmrnn replay {path.name}")
    role_of = roles(found, chosen or {})
    left_out = {name: _why(topic) for name, topic in found.items() if name not in role_of}
    forms: dict[str, ros_messages.Sound] = {}
    for name, role in role_of.items():
        if role != "none" and ros_messages.KINDS[found[name].kind] == "audio":
            form = ros_messages.sound_format(found[name].first, _info_of(name, found))
            if isinstance(form, str):
                role_of[name], left_out[name] = "none", form
            else:
                forms[name] = form
    used = {name: role for name, role in role_of.items() if role != "none"}
    if not used:
        raise FileError(f"{path} holds no messages that can be imported" + (f" ({bag.damage})" if bag.damage else ""))
    shift_ns = max(FIRST_NS - min(found[name].begin_ns for name in used), 0)
    span_ns = (
        min(found[name].begin_ns for name in used) + shift_ns,
        max(found[name].end_ns for name in used) + shift_ns,
    )
    refused = Counter[str]()
    streams = [
        Imported(stream_of(role), f"ros:{name}", _samples(path, found[name], forms.get(name), shift_ns, refused))
        for name, role in used.items()
        if role != topics.LABEL
    ]
    labels = [name for name, role in used.items() if role == topics.LABEL]
    source = SampledMessages(session, span_ns, streams, _labels(path, labels, shift_ns))
    settings = without_devices(
        session,
        {of.row.name: StreamSettings(of.origin, of.row.kind) for of in streams if ":" in used[of.origin[4:]]},
    )
    about = {"imported_from": encodable(path.name), "imported_shift_ns": str(shift_ns)}
    counts = write(out, settings, source, span_ns, about, -shift_ns, progress)
    return {
        **described(out, path, settings, span_ns),
        "messages": counts,
        "undecodable": source.undecodable + sum(refused.values()),
        "refused": dict(refused),
        "gaps": [{"after_s": after_ns / 1e9, "seconds": gap_ns / 1e9} for after_ns, gap_ns in source.gaps],
        "streams": [
            {
                "name": name,
                "type": topic.kind,
                "role": role_of.get(name, "none"),
                "samples": topic.count,
                "restamped": topic.restamped,
                "why": left_out.get(name, ""),
            }
            for name, topic in found.items()
        ],
        "damage": bag.damage,
    }


def _why(topic: Topic) -> str:
    if topic.unreadable:
        return f"its messages cannot be decoded ({topic.unreadable})"
    return f"{topic.kind or 'this'} is no stream of a session"


def _info_of(name: str, found: Mapping[str, Topic]) -> Any:
    """The AudioInfo of a topic: the one in its namespace, or the only one of the bag."""
    infos = [topic for topic in found.values() if topic.kind == ros_messages.AUDIO_INFO and topic.count]
    near = [topic for topic in infos if topic.name.rpartition("/")[0] == name.rpartition("/")[0]]
    return (near or infos)[0].first if len(near or infos) == 1 else None


def _samples(
    path: Path, topic: Topic, form: ros_messages.Sound | None, shift_ns: int, refused: Counter[str]
) -> Iterator[Sample]:
    """`refused`: counts messages that are no sample, by reason."""
    if form is not None:
        yield from _sound(path, topic, form, shift_ns, refused)
        return
    read = ros_messages.READ[ros_messages.KINDS[topic.kind]]
    for message in Bag(path).messages([topic.name]):
        try:
            data = read(message.data, topic.kind)
        except (WireError, ArithmeticError, AttributeError, TypeError, ValueError) as e:
            # another package may have a message of the same name with other fields
            refused[f"{topic.name}: {e}"] += 1
            continue
        if len(data):
            yield Sample(message.stamp_ns + shift_ns, message.log_ns + shift_ns, data)


def _sound(
    path: Path, topic: Topic, form: ros_messages.Sound, shift_ns: int, refused: Counter[str]
) -> Iterator[Sample]:
    resampler, end_ns = BlockResampler(form.rate_hz, 1, _BLOCK), 0
    for message in Bag(path).messages([topic.name]):
        try:
            values = mono(ros_messages.sound(message.data, form))
        except (UsageError, AttributeError, TypeError, ValueError) as e:
            refused[f"{topic.name}: {e}"] += 1
            continue
        # a message comes when its sound is complete. Its time trembles, and samples do not: it counts after gaps alone
        long_ns = round(len(values) / form.rate_hz * 1e9)
        if abs(message.stamp_ns - (end_ns + long_ns)) > _GAP_NS:
            resampler, end_ns = BlockResampler(form.rate_hz, 1, _BLOCK), message.stamp_ns - long_ns
        end_ns += long_ns
        for block, at_ns in resampler.feed(np.ascontiguousarray(values), end_ns):
            yield Sample(at_ns + shift_ns, max(at_ns, message.log_ns) + shift_ns, block)


def _labels(path: Path, names: list[str], shift_ns: int) -> Iterator[Outgoing]:
    for message in Bag(path).messages(names) if names else ():
        if name := ros_messages.text(message.data, ""):
            at_ns = message.log_ns + shift_ns
            yield Outgoing(topics.LABEL, Sample(at_ns, at_ns, name), f"ros:{message.topic}")
