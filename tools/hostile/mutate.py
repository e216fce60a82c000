"""Make bad bytes of good ones: flips, cuts, splices, protobuf and JSON with one thing wrong.

Seeded. Knows nothing about who reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from stream_mmrnn.core.errors import ModelError
from stream_mmrnn.graph import model_file as onnx_bytes

NASTY_NUMBERS = (0, 1, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**61, 2**62, 2**63 - 1, -(2**63), 2**63, 2**64, 10**40)
NASTY_JSON = (
    *(str(n) for n in NASTY_NUMBERS),
    "9" * 5000,
    "1e999",
    "-1e999",
    "1e-999",
    "NaN",
    "Infinity",
    "null",
    "true",
    "[]",
    "{}",
    '""',
    '"\\ud800"',
    '"\\udc00\\ud800"',
    '"\\u0000"',
    '"\x1b[2J\\u001b[31m[/red][link=x]"',
    '"[/bold]"',
    '"../../etc/passwd"',
    '"' + "x" * 70_000 + '"',
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 50_000 + "1" + "}" * 50_000,
    '{"a":1,"a":2}',
    "\ufeff{}",
)
NASTY_NAMES = (
    "", ".", "..", "../x", "a/b", "a\\b", "/etc/passwd", "a\n", "a\r\n", "a\0b", "a b", "-a", ".a", "_a", "a" * 65, "é",
    "a\u202e", "C:", "C:\\x", "~", "$HOME", "a%2f..", "a;rm", "\ud800",
)  # fmt: skip
"""None of them may be a session's name."""


def flipped(data: bytes, rng: Random, most: int = 16) -> bytes:
    """Some bits, bytes, cuts, doublings and insertions, 1 to `most`."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, most))):
        if not out:
            return bytes(rng.randbytes(rng.randrange(8)))
        at, kind = rng.randrange(len(out)), rng.randrange(7)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif kind == 2:
            del out[at : at + rng.randrange(1, 64)]
        elif kind == 3:
            out[at:at] = rng.randbytes(rng.randrange(1, 32))
        elif kind == 4:
            begin = rng.randrange(len(out))
            out[at:at] = out[begin : begin + rng.randrange(1, 256)]
        elif kind == 5:
            size = rng.choice((2, 4, 8))
            out[at : at + size] = (rng.choice(NASTY_NUMBERS) % 256**size).to_bytes(size, rng.choice(("little", "big")))
        else:
            del out[at:]
    return bytes(out)


def spliced(one: bytes, other: bytes, rng: Random) -> bytes:
    """The beginning of one and the end of the other."""
    return one[: rng.randrange(len(one) + 1)] + other[rng.randrange(len(other) + 1) :]


def protobuf(data: bytes, rng: Random, depth: int = 0) -> bytes:
    """One field somewhere within changed, dropped, doubled or moved; the lengths around it stay right."""
    try:
        parts = [
            (number, bytes(whole), bytes(content)) for number, whole, content in onnx_bytes.fields(memoryview(data))
        ]
    except ModelError:
        return flipped(data, rng, 2)
    if not parts:
        return flipped(data, rng, 2)
    i = rng.randrange(len(parts))
    number, whole, content = parts[i]
    wholes = [p[1] for p in parts]
    kind = rng.randrange(10)
    if content and kind < 7 and depth < 8:
        wholes[i] = onnx_bytes.message(number, protobuf(content, rng, depth + 1))
    elif kind == 7:
        del wholes[i]
    elif kind == 8:
        wholes.insert(rng.randrange(len(wholes)), whole)
    elif content:
        wholes[i] = onnx_bytes.message(number, flipped(content, rng, 2))
    else:
        wholes[i] = onnx_bytes.integer(number, rng.choice(NASTY_NUMBERS) % 2**64)
    return b"".join(wholes)


def json(text: bytes, rng: Random) -> bytes:
    """A value, a key or a few bytes of a JSON text changed."""
    if rng.randrange(3) == 0:
        return flipped(text, rng, 4)
    marks = [i for i, c in enumerate(text) if c in b":,[{"]
    if not marks:
        return rng.choice(NASTY_JSON).encode("utf-8", "surrogatepass")
    at = rng.choice(marks) + 1
    end = at
    while end < len(text) and text[end] not in b",]}:":
        end += 1
    return text[:at] + rng.choice(NASTY_JSON).encode("utf-8", "surrogatepass") + text[end:]


def cut_anywhere(parts: Sequence[bytes], rng: Random) -> list[bytes]:
    """The same bytes in other portions, as a stream gives them."""
    data, out = b"".join(parts), []
    while data:
        n = rng.choice((1, 2, 7, 64, 1024, 65536))
        out.append(data[:n])
        data = data[n:]
    return out
