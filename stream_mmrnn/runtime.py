"""Load an ONNX file, choose CUDA or the CPU, bind inputs, outputs and state in place.

The only file that uses onnxruntime. Knows nothing about sessions, ticks or encoders: the engine's graph and the
encoders' graphs (silero VAD is a stateful one) come through here alike.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from stream_mmrnn.errors import ModelError, ProviderError

Provider = Literal["auto", "cpu", "cuda"]

_NUMPY: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(bool)": np.dtype(np.bool_),
    "tensor(uint8)": np.dtype(np.uint8),
}

ort.set_default_logger_severity(3)


def _gpu_in_sight() -> bool:
    return sys.platform != "linux" or Path("/dev/nvidiactl").exists()


class TensorSpec:
    """Name, type and shape of an input or output; None stands for an axis that the file leaves open."""

    def __init__(self, node: Any) -> None:
        self.name: str = node.name
        self.dtype: np.dtype[Any] = _NUMPY.get(node.type, np.dtype(object))
        self.type: str = node.type
        self.shape: tuple[int | None, ...] = tuple(n if isinstance(n, int) else None for n in node.shape)


class Graph:
    """An ONNX file in memory, ready to be bound."""

    def __init__(self, path: Path, provider: Provider = "cpu") -> None:
        """Load `path` on one thread, without spinning.

        Raises:
            ModelError: the file is missing or is no ONNX graph.
            ProviderError: `cuda` was asked for and is not active.

        """
        try:
            data = path.read_bytes()
        except OSError as e:
            raise ModelError(f"the model {path} cannot be read: {e.strerror}; give the path of an ONNX file") from e
        self.path = path
        self.sha256 = hashlib.sha256(data).hexdigest()
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        options.log_severity_level = 4
        wanted = ["CPUExecutionProvider"]
        cuda_built = "CUDAExecutionProvider" in ort.get_available_providers()
        if provider == "cuda" and not (cuda_built and _gpu_in_sight()):
            reason = "this machine shows no NVIDIA GPU" if cuda_built else "this onnxruntime has no CUDA"
            raise ProviderError(f"provider `cuda` was asked for and {reason}; use `cpu` or `auto`")
        if provider != "cpu" and cuda_built and _gpu_in_sight():
            ort.preload_dlls()
            wanted.insert(0, "CUDAExecutionProvider")
        try:
            self.session = ort.InferenceSession(data, options, providers=wanted)
        except Exception as e:  # onnxruntime raises a dozen types of its own
            raise ModelError(f"{path} is not an ONNX graph that onnxruntime can load: {str(e)[:200]}") from e
        self.provider: Literal["cpu", "cuda"] = (
            "cuda" if self.session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
        )
        if provider == "cuda" and self.provider != "cuda":
            raise ProviderError(
                "provider `cuda` was asked for and is not active; run with `cpu`, or mend the CUDA setup"
            )
        self.inputs = {n.name: TensorSpec(n) for n in self.session.get_inputs()}
        self.outputs = {n.name: TensorSpec(n) for n in self.session.get_outputs()}
        self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)

    def bind(
        self,
        inputs: Mapping[str, tuple[int, ...]],
        outputs: Mapping[str, tuple[int, ...]],
        state: Mapping[str, tuple[str, tuple[int, ...]]],
    ) -> Binding:
        """Fix shapes and addresses; `state` maps an input to (the output that follows it, its shape)."""
        return Binding(self, inputs, outputs, state)


class Binding:
    """One graph with its tensors at fixed addresses: write `inputs`, `run()`, read `outputs`.

    A state tensor is input and output at one address (measured bit-equal to two buffers in turn). On the CPU the
    arrays share memory with onnxruntime; on CUDA `inputs` are staged to the device by `run` and state stays there.
    """

    def __init__(
        self,
        graph: Graph,
        inputs: Mapping[str, tuple[int, ...]],
        outputs: Mapping[str, tuple[int, ...]],
        state: Mapping[str, tuple[str, tuple[int, ...]]],
    ) -> None:
        self._session = graph.session
        self._cuda = graph.provider == "cuda"
        self._io = graph.session.io_binding()  # kept alive: dropping it while bound values live aborts
        self._device = "cuda" if self._cuda else "cpu"
        self.inputs: dict[str, npt.NDArray[Any]] = {}
        self.outputs: dict[str, npt.NDArray[Any]] = {}
        self.state: dict[str, npt.NDArray[Any]] = {}
        """On the CPU the live state itself; on CUDA a staging copy: see `pull` and `push`."""
        self._values: dict[str, Any] = {}
        for name, shape in inputs.items():
            self.inputs[name] = self._input(graph, name, shape)
        for name, shape in outputs.items():
            array = np.zeros(shape, graph.outputs[name].dtype)
            value = ort.OrtValue.ortvalue_from_numpy(array, "cpu", 0)
            self._io.bind_ortvalue_output(name, value)
            self._values["out:" + name] = value
            self.outputs[name] = array
        for name, (following, shape) in state.items():
            self.state[name] = self._input(graph, name, shape)
            self._io.bind_ortvalue_output(following, self._values[name])

    def _input(self, graph: Graph, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = np.zeros(shape, graph.inputs[name].dtype)
        value = ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)
        self._io.bind_ortvalue_input(name, value)
        self._values[name] = value
        return array

    def run(self) -> None:
        """One run of the graph; state moves one step on."""
        if self._cuda:
            for name, array in self.inputs.items():
                self._values[name].update_inplace(array)
            self._session.run_with_iobinding(self._io)
            self._io.synchronize_outputs()
        else:
            self._session.run_with_iobinding(self._io)

    def pull(self) -> None:
        """Bring the state tensors from the device into `state`."""
        if self._cuda:
            for name, array in self.state.items():
                np.copyto(array, self._values[name].numpy())

    def push(self) -> None:
        """Bring `state` to the device."""
        if self._cuda:
            for name, array in self.state.items():
                self._values[name].update_inplace(array)
