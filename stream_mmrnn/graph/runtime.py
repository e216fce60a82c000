"""Load an ONNX file, choose CUDA or the CPU, bind inputs, outputs and state at fixed addresses.

The only file that uses onnxruntime: the engine's graphs and the encoders' graphs both run through it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import re
import sys
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from stream_mmrnn.core.errors import ModelError, ProviderError
from stream_mmrnn.core.printable import one_line
from stream_mmrnn.graph import model_file as onnx_bytes

Provider = Literal["auto", "cpu", "cuda"]
Array = npt.NDArray[Any]

_NUMPY: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bool)": np.dtype(np.bool_),
    **{f"tensor({sign}int{bits})": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
_MAX_FILE_BYTES = 2**31 - 1
_CUDA = "CUDAExecutionProvider"

ort.set_default_logger_severity(4)  # errors are raised; a bad file must not fill the log


def reason(error: Exception) -> str:
    """What onnxruntime says of an error, as one line without its error code; a file can make it long."""
    return one_line(re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)))


def version() -> str:
    """The version of onnxruntime."""
    return str(ort.__version__)


def cuda_built() -> bool:
    """Whether this onnxruntime was built with CUDA; that does not mean that a GPU can be used."""
    return _CUDA in ort.get_available_providers()


def gpu_in_sight() -> bool:
    """Whether the machine shows an NVIDIA GPU."""
    return sys.platform != "linux" or Path("/dev/nvidiactl").exists()


def resolve(provider: Provider) -> Literal["cpu", "cuda"]:
    """The provider that `provider` stands for on this machine.

    Raises:
        ProviderError: `cuda` was asked for and cannot be.

    """
    built = cuda_built()
    if provider == "cuda" and not (built and gpu_in_sight()):
        reason = "this machine shows no NVIDIA GPU" if built else "this onnxruntime has no CUDA"
        raise ProviderError(f"provider `cuda` was asked for and {reason}; use `cpu` or `auto`")
    return "cuda" if provider != "cpu" and built and gpu_in_sight() else "cpu"


def _read(path: Path) -> bytes:
    """A model file's bytes; raises ModelError. A pipe or device is refused: reading it might never end."""
    try:
        if path.exists() and not path.is_file():
            raise ModelError(f"the model {path} is no file; give the path of an ONNX file")
        if (size := path.stat().st_size) > _MAX_FILE_BYTES:
            raise ModelError(f"the model {path} has {size} bytes; expected at most {_MAX_FILE_BYTES}, ONNX's own limit")
        return path.read_bytes()
    except OSError as e:
        raise ModelError(f"the model {path} cannot be read: {e.strerror}; give the path of an ONNX file") from e
    except ValueError as e:
        raise ModelError(f"the model {str(path)!r} cannot be read: {e}; give the path of an ONNX file") from e


class TensorSpec:
    """Name, type and shape of an input or output; None is an axis of any size."""

    def __init__(self, node: Any) -> None:
        self.name: str = node.name
        self.dtype: np.dtype[Any] = _NUMPY.get(node.type, np.dtype(object))
        """`object` if numpy has no such type (bfloat16, string)."""
        self.type: str = node.type
        self.shape: tuple[int | None, ...] = tuple(n if isinstance(n, int) else None for n in node.shape)


class Graph:
    """An ONNX file in memory, ready to be bound."""

    def __init__(
        self, path: Path, provider: Provider = "cpu", *, data: bytes | None = None, cuda_graph: bool = False
    ) -> None:
        """Load `path` on one thread, without spinning.

        `data` stands for the file's content (an edited one); `cuda_graph` lets a `DeviceBinding` capture its runs.

        Raises:
            ModelError: the file is missing or is no ONNX graph.
            ProviderError: `cuda` was asked for and is not active.

        """
        data = _read(path) if data is None else data
        try:
            onnx_bytes.check(data)
        except ModelError as e:
            raise ModelError(f"{path} is not an ONNX graph that this program runs: {e}") from e
        self.path = path
        self.data = data
        self.sha256 = hashlib.sha256(data).hexdigest()
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        options.log_severity_level = 4
        wanted: list[Any] = ["CPUExecutionProvider"]
        if resolve(provider) == "cuda":
            ort.preload_dlls()
            # TF32 is onnxruntime's default and rounds factors to 10 bits: too coarse for what the CPU computes
            options_of_cuda = {"enable_cuda_graph": "1" if cuda_graph else "0", "use_tf32": "0"}
            wanted.insert(0, (_CUDA, options_of_cuda))
        try:
            # onnxruntime prints its fallback on standard output; without CUDA there is no fallback
            self.session = ort.InferenceSession(data, options, providers=wanted, enable_fallback=len(wanted) - 1)
            self.inputs = {n.name: TensorSpec(n) for n in self.session.get_inputs()}
            self.outputs = {n.name: TensorSpec(n) for n in self.session.get_outputs()}
            self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
        except Exception as e:  # onnxruntime raises a dozen types of its own
            raise ModelError(f"{path} is not an ONNX graph that onnxruntime can load: {reason(e)}") from e
        self.provider: Literal["cpu", "cuda"] = "cuda" if self.session.get_providers()[0] == _CUDA else "cpu"
        if provider == "cuda" and self.provider != "cuda":
            raise ProviderError(
                "provider `cuda` was asked for and is not active; run with `cpu`, or mend the CUDA setup"
            )

    def zeros(self, name: str, shape: tuple[int, ...]) -> Array:
        """An array for an input or output, of its type."""
        return np.zeros(shape, (self.inputs.get(name) or self.outputs[name]).dtype)

    def bind(
        self,
        inputs: Mapping[str, tuple[int, ...]],
        outputs: Mapping[str, tuple[int, ...]],
        state: Mapping[str, tuple[str, tuple[int, ...]]],
    ) -> Binding:
        """Fix shapes, on the CPU; `state` maps an input to (the output that follows it, its shape)."""
        return Binding(
            self,
            {name: self.zeros(name, shape) for name, shape in inputs.items()},
            {name: self.zeros(name, shape) for name, shape in outputs.items()},
            {name: (after, self.zeros(name, shape)) for name, (after, shape) in state.items()},
        )


@functools.lru_cache(maxsize=16)
def shared(path: Path) -> Graph:
    """The graph of a file, loaded once in this process, on the CPU: each user binds tensors of its own."""
    return Graph(path)


class Binding:
    """A graph on the CPU with its tensors at fixed addresses: write `inputs`, `run()`, read `outputs`.

    A state tensor is input and output at one address (measured bit-equal to two buffers in turn). The arrays share
    memory with onnxruntime; they must be contiguous and may be views, so several bindings can share one buffer.
    """

    def __init__(
        self,
        graph: Graph,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
        state: Mapping[str, tuple[str, Array]],
    ) -> None:
        self.inputs, self.outputs = dict(inputs), dict(outputs)
        self.state = {name: array for name, (_, array) in state.items()}
        self._io = graph.session.io_binding()  # kept alive: dropping it while bound values live aborts
        self._values: list[Any] = []
        for name, array in self.inputs.items():
            self._io.bind_ortvalue_input(name, self._value(array))
        for name, array in self.outputs.items():
            self._io.bind_ortvalue_output(name, self._value(array))
        for name, (following, array) in state.items():
            value = self._value(array)
            self._io.bind_ortvalue_input(name, value)
            self._io.bind_ortvalue_output(following, value)
        self._session = graph.session
        # the same call without the checks that onnxruntime's Python makes for another provider before each run
        inner, binding = getattr(graph.session, "_sess", None), getattr(self._io, "_iobinding", None)
        self.run: Callable[[], None] = self.documented_run
        """One run of the graph; state moves one step on."""
        if inner is not None and binding is not None:
            self.run = partial(inner.run_with_iobinding, binding, None)

    def _value(self, array: Array) -> Any:
        assert array.flags.c_contiguous
        value = ort.OrtValue.ortvalue_from_numpy(array, "cpu", 0)
        self._values.append(value)
        return value

    def documented_run(self) -> None:
        """`run` as onnxruntime documents it."""
        self._session.run_with_iobinding(self._io)


class DeviceTensor:
    """A tensor that stays where the graph runs; read and written as a whole."""

    def __init__(self, graph: Graph, name: str, shape: tuple[int, ...]) -> None:
        self.value = ort.OrtValue.ortvalue_from_numpy(graph.zeros(name, shape), graph.provider, 0)

    def read(self) -> Array:
        array: Array = np.array(self.value.numpy())
        return array

    def write(self, array: Array) -> None:
        self.value.update_inplace(array)


def _pinned(array: Array) -> tuple[Any, Array] | None:
    """Page-locked memory of the same shape and type, as a value and as an array; None if not available."""
    try:
        kind = ort.OrtDeviceMemoryType.HOST_ACCESSIBLE
        infos = [d.memory_info(kind) for d in ort.get_ep_devices() if d.ep_name == _CUDA]
        if infos and infos[0] is not None:
            value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype.type, memory_info=infos[0])
            return value, value.numpy()
    except Exception:  # noqa: S110  # onnxruntime raises a dozen types of its own; `_locked` is the fallback
        pass
    locked = _locked(array)
    return None if locked is None else (ort.OrtValue.ortvalue_from_numpy(locked, "cpu", 0), locked)


def _locked(array: Array) -> Array | None:
    """Pages of our own, locked by the CUDA runtime that the provider has loaded; None if that fails.

    A build whose CUDA is no plug-in lists no devices, so onnxruntime cannot allocate such memory.
    """
    try:
        cuda = ctypes.CDLL(f"libcudart.so.{str(getattr(ort, 'cuda_version', '')).split('.')[0]}")
    except OSError:
        return None
    pages = -(-max(array.nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = np.zeros(pages + mmap.PAGESIZE, np.uint8)  # no page is shared with memory that is not locked
    begin = -whole.ctypes.data % mmap.PAGESIZE
    address = ctypes.c_void_p(whole.ctypes.data + begin)
    if cuda.cudaHostRegister(address, ctypes.c_size_t(pages), 0) != 0:
        return None
    weakref.finalize(whole, cuda.cudaHostUnregister, address)
    return whole[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)


_ALIGNMENT_BYTES = 256
"""Alignment of the tensors in a block, as in CUDA's own allocations."""


class _TensorBlock:
    """Tensors beside each other, on the host and on the graph's device: one copy moves them all.

    A copy to or from a GPU takes about 12 us, however little there is to copy (measured on an H100).
    """

    def __init__(self, graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.provider = graph.provider
        like = {name: graph.zeros(name, shape) for name, shape in shapes.items()}
        self.offsets: dict[str, int] = {}
        size = 0
        for name, array in like.items():
            self.offsets[name] = size
            size += -(-max(array.nbytes, 1) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        whole: Array = np.zeros(max(size, 1), np.uint8)
        locked = _pinned(whole) if graph.provider == "cuda" else None
        self.pinned = locked is not None
        self._value, self.whole = locked or (ort.OrtValue.ortvalue_from_numpy(whole, "cpu", 0), whole)
        self.whole[...] = 0
        self.arrays: dict[str, Array] = {
            name: self.whole[at : at + like[name].nbytes].view(like[name].dtype).reshape(like[name].shape)
            for name, at in self.offsets.items()
        }
        for name, array in like.items():
            self.arrays[name][...] = array
        self._there = ort.OrtValue.ortvalue_from_numpy(self.whole, graph.provider, 0)

    def binding_of(self, name: str) -> dict[str, Any]:
        """The arguments that bind a tensor on the device."""
        array = self.arrays[name]
        return {
            "name": name,
            "device_type": self.provider,
            "device_id": 0,
            "element_type": array.dtype.type,
            "shape": array.shape,
            "buffer_ptr": self._there.data_ptr() + self.offsets[name],
        }

    def send(self) -> None:
        self._there.update_inplace(self.whole)

    def fetch(self) -> None:
        self._value.update_inplace(self._there)

    def fetch_copy(self) -> None:
        """The same through a new array each time: for builds that cannot copy into ours."""
        np.copyto(self.whole, self._there.numpy())


class DeviceBinding:
    """A graph with all tensors on its own device, bound once: write `inputs`, `run()`, read `outputs`.

    `inputs` and `outputs` are arrays of the host (page-locked ones where `pinned`), copied by `run`. With `graph_id` of
    1 and more the first run is captured as a CUDA graph and later ones replay it. Capturing runs the graph more than
    once (onnxruntime issue 32243), so the caller's first run must not use rows of a session.
    """

    def __init__(
        self,
        graph: Graph,
        inputs: Mapping[str, tuple[int, ...]],
        outputs: Mapping[str, tuple[int, ...]],
        held: Mapping[str, tuple[str, DeviceTensor]],
        graph_id: int = -1,
    ) -> None:
        """`held` maps an input to (the output written to the same memory, that memory)."""
        self._session = graph.session
        self._io = graph.session.io_binding()
        self._in, self._out = _TensorBlock(graph, inputs), _TensorBlock(graph, outputs)
        self.inputs, self.outputs = self._in.arrays, self._out.arrays
        self.pinned = self._in.pinned and self._out.pinned
        for name in inputs:
            self._io.bind_input(**self._in.binding_of(name))
        for name in outputs:
            self._io.bind_output(**self._out.binding_of(name))
        self._held = dict(held)
        for name, (following, tensor) in held.items():
            self._io.bind_ortvalue_input(name, tensor.value)
            self._io.bind_ortvalue_output(following, tensor.value)
        self._options = ort.RunOptions()
        if graph.provider == "cuda":
            self._options.add_run_config_entry("gpu_graph_id", str(graph_id))
        self._fetch = self._out.fetch if self._copies_directly() else self._out.fetch_copy

    def _copies_directly(self) -> bool:
        """Whether outputs can be copied into given host memory; else each fetch makes a new array."""
        try:
            self._out.fetch()
        except Exception:  # not every build of onnxruntime supports it
            return False
        return True

    def run(self) -> None:
        self._in.send()
        self._session.run_with_iobinding(self._io, self._options)
        self._io.synchronize_outputs()
        self._fetch()
