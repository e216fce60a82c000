"""The output of `export --triton`, checked against Triton's own definitions and run as Triton runs it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from serving import alone, tick

from stream_mmrnn.core import config
from stream_mmrnn.core.errors import FileError, ModelError
from stream_mmrnn.core.settings import StateSettings
from stream_mmrnn.graph.runtime import Graph
from stream_mmrnn.offline.convert.triton import READY, START, text_of, write
from stream_mmrnn.predict.columns import MAX_AGE_S
from stream_mmrnn.predict.contract import contract_of

pytestmark = pytest.mark.process

ZOO = [*sorted(config.models_folder().glob("*/step*.onnx"))]
_ONNX = {"tensor(float)": "TYPE_FP32", "tensor(bool)": "TYPE_BOOL", "tensor(int64)": "TYPE_INT64"}


@pytest.fixture(scope="module")
def definitions() -> ModuleType:
    """Triton's protobuf definitions, without its client, which needs grpc."""
    found = importlib.util.find_spec("tritonclient")
    assert found is not None
    assert found.submodule_search_locations is not None
    path = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(definitions: ModuleType, folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), definitions.ModelConfig())


def session_of(folder: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("model", ZOO, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_input_and_output_is_there_once_as_the_graph_has_it(
    model: Path, definitions: ModuleType, tmp_path: Path
) -> None:
    said = write(model, tmp_path)
    folder = tmp_path / said["model"]
    asked, session = parsed(definitions, folder), session_of(folder)
    assert (asked.name, asked.backend) == (folder.name, "onnxruntime")
    sequences = asked.sequence_batching
    held = {s.input_name: s for s in sequences.state}
    given = {i.name: i for i in asked.input}
    controls = {c.name: c.control[0] for c in sequences.control_input}
    graph = {i.name: i for i in session.get_inputs()}
    assert len(asked.input) + len(sequences.state) + len(sequences.control_input) == len(graph)
    assert given.keys() | held.keys() | controls.keys() == graph.keys()
    kinds = definitions.DataType
    for name, of in {**given, **held}.items():
        assert kinds.Name(of.data_type) == _ONNX[graph[name].type]
        assert [None if d == -1 else d for d in of.dims] == [
            d if isinstance(d, int) else None for d in graph[name].shape[1:]
        ]
    for name, kind in ((READY, "CONTROL_SEQUENCE_READY"), (START, "CONTROL_SEQUENCE_START")):
        of = controls[name]
        assert definitions.ModelSequenceBatching.Control.Kind.Name(of.kind) == kind
        assert list(of.bool_false_true) == [False, True]
        assert graph[name].type == "tensor(bool)"
        assert graph[name].shape[1:] == [1]
    outputs = {o.name: o for o in session.get_outputs()}
    assert {o.name for o in asked.output} | {s.output_name for s in sequences.state} == outputs.keys()
    for of in asked.output:
        assert list(of.dims) == outputs[of.name].shape[1:]
    for of in sequences.state:
        assert outputs[of.output_name].shape[1:] == graph[of.input_name].shape[1:]
        [begin] = of.initial_state
        assert (begin.zero_data, list(begin.dims), begin.data_type) == (True, list(of.dims), of.data_type)
    assert sequences.WhichOneof("strategy_choice") == "oldest"
    assert sequences.oldest.max_candidate_sequences == 1024
    assert sequences.max_sequence_idle_microseconds == StateSettings().idle_s * 1e6


def test_steps_as_triton_runs_them_equal_the_engine(toy: Path, definitions: ModuleType, tmp_path: Path) -> None:
    """Sequences in batches of those that are ready, states carried by their names, controls as columns."""
    folder = tmp_path / write(toy, tmp_path)["model"]
    asked, session = parsed(definitions, folder), session_of(folder)
    contract = contract_of(Graph(toy, "cpu"))
    sequences = {name: [tick(name, i, n) for i in range(12)] for n, name in enumerate("abc")}
    held: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    got: dict[str, list[bytes]] = {name: [] for name in sequences}
    for i in range(12):
        ready = [name for n, name in enumerate(sequences) if (i + n) % 3 or i % 2]
        ticks = [sequences[name][len(got[name])] for name in ready]
        feeds: dict[str, np.ndarray[Any, Any]] = {
            contract.wiring.inputs[m.name]: np.stack([t.features[m.name] for t in ticks])
            for m in contract.spec.modalities
        }
        ages = [[MAX_AGE_S if a < 0 else min(a / 1e9, MAX_AGE_S) for a in t.age_ns.values()] for t in ticks]
        feeds[contract.wiring.present] = np.float32([list(t.present.values()) for t in ticks])
        feeds[contract.wiring.age] = np.float32(ages)
        feeds[READY] = np.ones((len(ready), 1), np.bool_)
        feeds[START] = np.array([[name not in held] for name in ready])
        for state in asked.sequence_batching.state:
            empty = np.zeros(list(state.dims), np.float32)
            feeds[state.input_name] = np.stack([held.get(name, {}).get(state.input_name, empty) for name in ready])
        said = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
        for row, name in enumerate(ready):
            held[name] = {s.input_name: said[s.output_name][row] for s in asked.sequence_batching.state}
            got[name].append(said[contract.wiring.heads["next"]][row].tobytes())
    for name, ticks in sequences.items():
        assert len(got[name]) >= 6
        assert got[name] == alone(toy, ticks[: len(got[name])])


def test_the_verb_needs_no_torch_and_never_overwrites(tmp_path: Path) -> None:
    words = [sys.executable, "-X", "importtime", "-m", "stream_mmrnn", "export", "digits", "--triton", str(tmp_path)]
    said = subprocess.run([*words, "--sessions", "9", "--json"], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert not any(line.endswith("| torch") for line in said.stderr.splitlines())
    document = json.loads(said.stdout.splitlines()[-1])
    assert document["triton"]["sessions"] == 9
    for file in document["triton"]["files"]:
        assert Path(file).is_file()
    again = subprocess.run(words, capture_output=True, text=True)
    assert again.returncode == 2
    assert "is there already" in again.stderr


def test_what_triton_cannot_serve_is_an_error(toy: Path, tmp_path: Path) -> None:
    silero = config.models_folder() / "encoders" / "silero_vad.onnx"
    with pytest.raises(ModelError, match=r"constant in every run|is not the first|resets a session"):
        write(silero, tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        write(toy, blocked)
    with pytest.raises(ModelError, match=r"none\.onnx"):
        write(tmp_path / "none.onnx", tmp_path)


def test_text_is_escaped(definitions: ModuleType) -> None:
    for name in ('a"b', "back\\slash", "ä", "line"):
        assert text_format.Parse(text_of({"name": name}), definitions.ModelConfig()).name == name
