"""The predictions of a media file as a table: CSV, JSON lines or Parquet."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from stream_mmrnn.core.errors import FileError
from stream_mmrnn.offline.convert.writers import Csv, Parquet
from stream_mmrnn.offline.predictor import Predictor
from stream_mmrnn.viewers.columns import columns

Form = Literal["csv", "jsonl", "parquet"]


def predict_file(
    predictor: Predictor,
    path: Path,
    out: Path,
    form: Form,
    progress: Callable[[float], None] = lambda _: None,
    alive: Callable[[], bool] = lambda: True,
) -> int | None:
    """Write one row for each tick of `path`: its end in seconds, then each number of each head.

    `progress` is called with the seconds that are done. Returns the number of rows; None if `alive` became false, and
    then nothing is written.

    Raises:
        FileError: `path` is no media file that the model can use, or `out` cannot be written.

    """
    heads = columns(predictor.spec.heads)
    names = ["seconds", *(c.label for c in heads)]
    try:
        with tempfile.TemporaryDirectory(prefix=".predict-", dir=out.parent) as folder:
            made = Path(folder) / out.name
            writer = _writer(form, made, names)
            try:
                for p in predictor.file(path, progress):
                    writer.add([predictor.at_s(p), *(float(p.heads[c.head][c.index]) for c in heads)])
                    if not alive():
                        return None
            finally:
                count: int = writer.close()["rows"]
            made.replace(out)
    except OSError as e:
        raise FileError(f"{out} cannot be written: {e.strerror}; choose another place") from e
    return count


def _writer(form: Form, path: Path, names: Sequence[str]) -> Any:
    if form == "csv":
        return Csv(path, names, list)
    if form == "jsonl":
        return _JsonLines(path, names)
    import pyarrow as pa

    kinds = [pa.float64(), *([pa.float32()] * (len(names) - 1))]
    return Parquet(path, pa.schema(list(zip(names, kinds, strict=True))), list)


class _JsonLines:
    """One object a line; null stands for a number that is not finite."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._file = path.open("x", encoding="utf-8")
        self._names, self._count = names, 0

    def add(self, row: Sequence[float]) -> None:
        values = [v if math.isfinite(v) else None for v in row]
        self._file.write(json.dumps(dict(zip(self._names, values, strict=True))) + "\n")
        self._count += 1

    def close(self) -> dict[str, Any]:
        self._file.close()
        return {"rows": self._count}
