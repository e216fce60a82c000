"""A matrix as 8-bit integers with a scale per column, such that its integer products are exact on every CPU.

x86 CPUs without VNNI add two products of an unsigned and a signed byte in 16 bits and saturate: 255 x 127 twice
overflows. With weights up to 63 it does not (2 x 255 x 63 = 32,130 < 2^15), so weights have 7 bits. Sums that are
right, and the same on every CPU, are worth more than the eighth bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LARGEST = 63
"""Of a weight, either sign."""
STATE_SCALE = 1 / 127
"""Of the other side: numbers in [-1, 1] as unsigned bytes around `STATE_ZERO`."""
STATE_ZERO = 128


def integer_columns(
    array: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    """[K, N] -> int8 [K, N] in -63 ... 63, scales [N], zeros [N] (all 0): what MatMulIntegerToFloat takes."""
    scale = (np.maximum(np.abs(array).max(0), 1e-12) / LARGEST).astype(np.float32)
    held = np.clip(np.rint(array / scale), -LARGEST, LARGEST).astype(np.int8)
    return np.ascontiguousarray(held), scale, np.zeros(len(scale), np.int8)
