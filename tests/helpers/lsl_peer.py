"""A program that speaks Lab Streaming Layer with pylsl alone, in a process of its own and on this machine only.

    lsl_peer.py send NAME TYPE FORMAT CHANNELS RATE_HZ COUNT [PREFIX]
    lsl_peer.py read NAME

The sender waits for a reader and prints a JSON line a sample: stamp, our monotonic time, values. The reader prints
`{"ready": ...}` once it is connected, then a line a sample, until the stream is gone.
"""

from __future__ import annotations

import json
import sys
import time

import pylsl
import pylsl.util

from stream_mmrnn.capture.lsl_runtime import _THIS_MACHINE

pylsl.set_config_content(_THIS_MACHINE)


def say(line: object) -> None:
    print(json.dumps(line), flush=True)


def send(name: str, kind: str, form: str, channels: int, rate_hz: float, count: int, prefix: str = "") -> None:
    info = pylsl.StreamInfo(name, kind, channels, rate_hz, form, f"test.{name}")
    info.set_channel_labels([f"c{i}" for i in range(channels)])
    outlet = pylsl.StreamOutlet(info, 1)
    if not outlet.wait_for_consumers(30):
        return
    for k in range(count):
        if form == "string":
            values: list[object] = [f"{prefix}{k}"]
        elif form == "int16":
            values = [(k * 100) % 20_000] * channels
        else:
            values = [k + i / 8 for i in range(channels)]
        stamp = pylsl.local_clock()
        outlet.push_sample(values, stamp)
        say([stamp, time.monotonic_ns(), values])
        time.sleep(1 / (rate_hz or 50))
    outlet.wait_for_consumers(0)
    time.sleep(0.3)


def read(name: str) -> None:
    found = pylsl.resolve_byprop("name", name, 1, 30)
    inlet = pylsl.StreamInlet(found[0], recover=False)
    full = inlet.info(10)
    inlet.open_stream(10)
    say({"ready": full.get_channel_labels(), "rate_hz": full.nominal_srate(), "xml": full.as_xml()})
    try:
        while True:
            values, stamp = inlet.pull_sample(0.2)
            if values is not None:
                say([stamp, values])
    except pylsl.util.LostError:
        return


if __name__ == "__main__":
    if sys.argv[1] == "send":
        name, kind, form, channels, rate_hz, count, *prefix = sys.argv[2:]
        send(name, kind, form, int(channels), float(rate_hz), int(count), *prefix)
    else:
        read(sys.argv[2])
