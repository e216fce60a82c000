"""Train the zoo's model `voice_activity` and write its step graph.

    python tools/train_voice_activity.py --data ../shared/data

Needs torch and onnx (the extra `train`). The task is voice activity projection (Ekstedt and Skantze 2022): will there
be speech 0 to 0.2, 0.2 to 0.6, 0.6 to 1.2 and 1.2 to 2 s from now. Where the streams come from is
voice_activity_data.py's; how the graph is served is the engine's.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
import voice_activity_data as data
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from stream_mmrnn.engine import METADATA_KEY, StepEngine, write_contract
from stream_mmrnn.sources import MODALITIES
from stream_mmrnn.types import HeadSpec, ModalitySpec

HIDDEN = 96
PROJECTED = {"vision": 32, "audio": 64, "text": 32}
SEED = 7
SECONDS = 60.0
BATCH = 16


class Net(nn.Module):
    """Projection per modality, masked; a GRU cell; the heads. A whole sequence, or one step of it."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.ModuleDict({m: nn.Linear(data.SIZES[m], n) for m, n in PROJECTED.items()})
        self.input = nn.Linear(sum(PROJECTED.values()) + 2 * len(MODALITIES), 3 * HIDDEN)
        self.hidden = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.heads = nn.Linear(HIDDEN, len(data.BINS_S) + 1)
        self.dropout = nn.Dropout(0.1)
        for m in MODALITIES:
            self.register_buffer(f"mean_{m}", torch.zeros(data.SIZES[m]))
            self.register_buffer(f"std_{m}", torch.ones(data.SIZES[m]))

    def fuse(self, features: dict[str, Any], present: Any, age: Any) -> Any:
        """What the cell's input gates see, for all ticks at once."""
        parts = []
        for i, m in enumerate(MODALITIES):
            x = (features[m] - getattr(self, f"mean_{m}")) / getattr(self, f"std_{m}")
            parts.append(self.dropout(torch.tanh(self.project[m](x))) * present[..., i : i + 1])
        return self.input(torch.cat([*parts, present, age / (1 + age)], -1))

    def cell(self, gates: Any, h: Any) -> Any:
        mine_rz, mine_n = self.hidden(h).split((2 * HIDDEN, HIDDEN), 1)
        rz, n = gates.split((2 * HIDDEN, HIDDEN), 1)
        r, z = torch.sigmoid(rz + mine_rz).chunk(2, 1)
        new = torch.tanh(n + r * mine_n)
        return new + z * (h - new)

    def forward(self, features: dict[str, Any], present: Any, age: Any) -> Any:
        """[B, T, ...] -> logits [B, T, 5]."""
        gates = self.fuse(features, present, age)
        h = gates.new_zeros(len(gates), HIDDEN)
        states = []
        for now in gates.unbind(1):  # not gates[:, t]: its gradient would fill a whole tensor at every step
            h = self.cell(now, h)
            states.append(h)
        return self.heads(self.dropout(torch.stack(states, 1)))


# --- batches


def drop_out(present: Any, age: Any, rng: Any) -> tuple[Any, Any]:
    """Whole modalities, or some seconds of one, go missing; their age grows as it would."""
    present, age = present.copy(), age.copy()
    for i, share in enumerate((0.3, 0.08, 0.35)):
        if rng.random() < share:
            present[:, i], age[:, i] = 0, 10.0
        elif rng.random() < 0.3:
            a = int(rng.integers(1, len(present)))
            b = min(a + int(rng.integers(25, 250)), len(present))
            present[a:b, i] = 0
            age[a:b, i] = np.minimum(age[a - 1, i] + data.TICK_NS / 1e9 * np.arange(1, b - a + 1), 10.0)
    return present, age


def batch(pool: list[data.Ticks], rng: Any = None) -> tuple[dict[str, Any], Any, Any, Any]:
    """Streams side by side; with `rng`, modalities drop out."""
    length = max(len(s.present) for s in pool)
    features = {m: np.zeros((len(pool), length, n), np.float32) for m, n in data.SIZES.items()}
    present = np.zeros((len(pool), length, 3), np.float32)
    age = np.full((len(pool), length, 3), 10.0, np.float32)
    target = np.full((len(pool), length, len(data.BINS_S) + 1), np.nan, np.float32)
    for k, s in enumerate(pool):
        p, a = drop_out(s.present, s.age, rng) if rng is not None else (s.present, s.age)
        n = len(p)
        present[k, :n], age[k, :n], target[k, :n] = p, a, s.target
        for i, m in enumerate(MODALITIES):
            if m in s.features:
                features[m][k, :n] = s.features[m] * p[:, i : i + 1]
    tensors = {m: torch.from_numpy(x) for m, x in features.items()}
    return tensors, torch.from_numpy(present), torch.from_numpy(age), torch.from_numpy(target)


def loss_of(logits: Any, target: Any) -> Any:
    known = ~torch.isnan(target)
    return nn.functional.binary_cross_entropy_with_logits(logits[known], target[known])


def standardise(net: Net, pool: list[data.Ticks]) -> None:
    """Mean and spread of each feature, from the first pool; text has no mean, its zeros are its middle."""
    for i, m in enumerate(MODALITIES):
        rows = np.concatenate([s.features[m][s.present[:, i] > 0] for s in pool if m in s.features])
        mean = np.zeros(data.SIZES[m]) if m == "text" else rows.mean(0)
        std = np.sqrt(((rows - mean) ** 2).mean(0))
        getattr(net, f"mean_{m}").copy_(torch.from_numpy(mean.astype(np.float32)))
        getattr(net, f"std_{m}").copy_(torch.from_numpy(np.maximum(std, 0.05).astype(np.float32)))


def new_streams(corpus: data.Corpus, encoders: data.Encoders, count: int, rng: Any) -> list[data.Ticks]:
    """Fresh voices, words, gains and noise, so that nothing can be learnt by heart."""
    streams = [data.chain(corpus, SECONDS, rng) for _ in range(max(count // 5, 1))]
    streams += [data.perform(corpus, rng) for _ in range(max(count // 6, 1))]
    streams += [data.compose(corpus, SECONDS, rng) for _ in range(count - len(streams))]
    return [data.encode(s, encoders) for s in streams]


def train(corpus: data.Corpus, encoders: data.Encoders, epochs: int, per_epoch: int) -> Net:
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    net = Net()
    pool = new_streams(corpus, encoders, 2 * BATCH, rng)
    standardise(net, pool)
    steps = 6
    slow = [p for m in MODALITIES for p in net.project[m].parameters()]
    others = [p for n, p in net.named_parameters() if not n.startswith("project")]
    optimiser = torch.optim.AdamW(
        [{"params": slow, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.01}], lr=3e-3
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=epochs * steps)
    start = time.monotonic()
    for epoch in range(epochs):
        losses = []
        for _ in range(steps):
            chosen = rng.choice(len(pool), BATCH, replace=False)
            features, present, age, target = batch([pool[i] for i in chosen], rng)
            loss = loss_of(net(features, present, age), target)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        pool = (pool + new_streams(corpus, encoders, per_epoch, rng))[-3 * BATCH :]
        if epoch % 5 == 4 or epoch == epochs - 1:
            print(f"epoch {epoch + 1}: loss {np.mean(losses):.4f}, {time.monotonic() - start:.0f} s", flush=True)
    return net.eval()


# --- the graph


def step_graph(net: Net, specs: list[ModalitySpec]) -> onnx.ModelProto:
    """One step for any number of rows, from the trained weights; Gemm, Sigmoid and Tanh, no recurrent operator.

    What is not a number, or belongs to a row that is not active or a modality that is not there, is chosen away
    (Where), not multiplied by 0: it can be anything.
    """
    w = {k: v.detach().double().numpy() for k, v in net.state_dict().items()}
    nodes: list[Any] = []
    constants: list[Any] = []

    def const(name: str, value: Any, kind: Any = np.float32) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(value, kind), name))
        return name

    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def gemm(x: str, name: str, weight: Any, bias: Any) -> str:
        return node("Gemm", [x, const(f"{name}.weight", weight.T), const(f"{name}.bias", bias)], name)

    const("zero", 0.0)
    const("half", 0.5)
    const("one", 1.0)
    axis = const("axis", [1], np.int64)
    const("initial", np.zeros((1, HIDDEN)))
    node("Greater", ["present", "half"], "is_present")
    parts = []
    for i, m in enumerate(MODALITIES):
        mean, std = w[f"mean_{m}"], w[f"std_{m}"]
        weight = w[f"project.{m}.weight"] / std  # (x - mean) / std is folded into the projection
        gemm(f"input.{m}", f"project.{m}", weight, w[f"project.{m}.bias"] - weight @ mean)
        node("Tanh", [f"project.{m}"], f"projected.{m}")
        node("IsNaN", [f"projected.{m}"], f"unusable.{m}")
        node("Not", [f"unusable.{m}"], f"usable.{m}")
        node("Gather", ["is_present", const(f"column.{m}", [i], np.int64)], f"is_present.{m}", axis=1)
        node("And", [f"usable.{m}", f"is_present.{m}"], f"use.{m}")
        parts.append(node("Where", [f"use.{m}", f"projected.{m}", "zero"], f"masked.{m}"))
    node("Max", ["age", "zero"], "age_not_negative")
    node("Add", ["age_not_negative", "one"], "age_1")
    # not its logarithm: onnxruntime's Log gives other last bits to a row at another place
    node("Div", ["age_not_negative", "age_1"], "age_bent")
    node("Cast", ["is_present"], "present_01", to=TensorProto.FLOAT)
    node("Concat", [*parts, "present_01", "age_bent"], "fused", axis=1)
    node("Unsqueeze", ["reset", axis], "reset_rows")
    node("Where", ["reset_rows", "initial", "state.gru"], "h")
    gemm("fused", "gates_input", w["input.weight"], w["input.bias"])
    gemm("h", "gates_hidden", w["hidden.weight"], w["hidden.bias"])
    sizes = const("gate_sizes", [2 * HIDDEN, HIDDEN], np.int64)
    for side in ("input", "hidden"):
        outputs = [f"{side}_rz", f"{side}_n"]
        nodes.append(helper.make_node("Split", [f"gates_{side}", sizes], outputs, name=f"split_{side}", axis=1))
    node("Add", ["input_rz", "hidden_rz"], "rz_sum")
    node("Sigmoid", ["rz_sum"], "rz")
    nodes.append(helper.make_node("Split", ["rz"], ["r", "z"], name="split_rz", axis=1, num_outputs=2))
    node("Mul", ["r", "hidden_n"], "n_hidden")
    node("Add", ["input_n", "n_hidden"], "n_sum")
    node("Tanh", ["n_sum"], "n")
    node("Sub", ["h", "n"], "h_minus_n")
    node("Mul", ["z", "h_minus_n"], "kept")
    node("Add", ["n", "kept"], "h_new")
    gemm("h_new", "logits", w["heads.weight"], w["heads.bias"])
    node("Sigmoid", ["logits"], "probabilities")
    bins = len(data.BINS_S)
    split = const("head_sizes", [bins, 1], np.int64)
    nodes.append(
        helper.make_node("Split", ["probabilities", split], ["head.vap", "head.speech"], name="split_heads", axis=1)
    )
    node("Unsqueeze", ["active", axis], "active_rows")
    node("Where", ["active_rows", "h_new", "state.gru"], "next.gru")

    def value(name: str, *shape: Any, kind: Any = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, ["batch", *shape])

    inputs = [value(f"input.{m}", n) for m, n in data.SIZES.items()]
    inputs += [value("present", 3), value("age", 3)]
    inputs += [value(n, kind=TensorProto.BOOL) for n in ("active", "reset")] + [value("state.gru", HIDDEN)]
    outputs = [value("head.vap", bins), value("head.speech", 1), value("next.gru", HIDDEN)]
    graph = helper.make_graph(nodes, "voice_activity", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    heads = [
        HeadSpec("vap", "activity_projection", bins, tuple(f"{a:g}-{b:g} s" for a, b in data.BINS_S), data.BINS_S),
        HeadSpec("speech", "classification", 1, ("speech",)),
    ]
    contract = write_contract("voice_activity", data.TICK_NS, specs, heads)
    helper.set_model_props(model, {METADATA_KEY: contract})
    onnx.checker.check_model(model, full_check=True)
    return model


def parity(net: Net, model: onnx.ModelProto, streams: list[data.Ticks]) -> float:
    """Largest difference between the sequence in torch and the graph, step by step."""
    features, present, age, _ = batch(streams, np.random.default_rng(SEED))
    features, present, age = {m: x[:, :400] for m, x in features.items()}, present[:, :400], age[:, :400]
    with torch.no_grad():
        expected = torch.sigmoid(net(features, present, age)).numpy()
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    count = len(streams)
    state = np.full((count, HIDDEN), np.nan, np.float32)  # the reset must not let it through
    worst = 0.0
    for t in range(present.shape[1]):
        feed = {f"input.{m}": x[:, t].numpy() for m, x in features.items()}
        feed |= {"present": present[:, t].numpy(), "age": age[:, t].numpy(), "state.gru": state}
        feed |= {"active": np.ones(count, np.bool_), "reset": np.full(count, t == 0)}
        vap, speech, state = session.run(["head.vap", "head.speech", "next.gru"], feed)
        worst = max(worst, float(np.abs(np.concatenate([vap, speech], 1) - expected[:, t]).max()))
    return worst


# --- how good


def auc(score: Any, label: Any) -> float:
    """Area under the ROC curve, ties counted half."""
    if label.all() or not label.any():
        return float("nan")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positive = label.sum()
    return float((ranks[label].sum() - positive * (positive + 1) / 2) / (positive * (len(label) - positive)))


def balanced(score: Any, label: Any) -> float:
    if label.all() or not label.any():
        return float("nan")
    said = score > 0.5
    return float((said[label].mean() + (~said[~label]).mean()) / 2)


def evaluate(net: Net, streams: list[data.Ticks], title: str, without: tuple[str, ...] = ()) -> None:
    """Per bin: share of speech, model, and the baseline that what is now will be."""
    scores, targets, nows = [], [], []
    for s in streams:
        features, present, age, target = batch([s])
        for i, m in enumerate(MODALITIES):
            if m in without:
                features[m][:] = 0
                present[..., i], age[..., i] = 0, 10.0
        with torch.no_grad():
            scores.append(torch.sigmoid(net(features, present, age))[0].numpy())
        targets.append(target[0].numpy())
        nows.append(s.features["audio"][:, 80])
    score, target, now = np.concatenate(scores), np.concatenate(targets), np.concatenate(nows)
    print(f"\n{title}{', without ' + ' and '.join(without) if without else ''} ({len(now) / 25:.0f} s)\n")
    print("| bin | speech | AUC | as now | balanced accuracy | as now | AUC while speech | AUC while silence |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    names = [f"{a:g} to {b:g} s" for a, b in data.BINS_S] + ["now"]
    for i, name in enumerate(names):
        known = ~np.isnan(target[:, i]) & ~np.isnan(target[:, -1])
        y, p, n = target[known, i] > 0.5, score[known, i], now[known]
        talking = target[known, -1] > 0.5
        while_speech = auc(p[talking], y[talking]) if i < len(names) - 1 else float("nan")
        while_silence = auc(p[~talking], y[~talking]) if i < len(names) - 1 else float("nan")
        figures = (y.mean(), auc(p, y), auc(n, y), balanced(p, y), balanced(n, y), while_speech, while_silence)
        print(f"| {name} | " + " | ".join("" if np.isnan(f) else f"{f:.3f}" for f in figures) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with the data")
    parser.add_argument("--epochs", type=int, default=32)
    parser.add_argument("--per-epoch", type=int, default=6, help="new streams of a minute in every epoch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "models" / "voice_activity")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    encoders = data.Encoders()
    seen, held = data.load(args.data, encoders)
    rng = np.random.default_rng(SEED + 1)
    composed = [data.encode(data.compose(held, SECONDS, rng), encoders) for _ in range(20)]
    clips = [data.encode(data.as_it_is(c), encoders) for c in held.clips]
    people = [data.encode(s, encoders) for s in held.synthetic]
    net = train(seen, encoders, args.epochs, args.per_epoch)

    model = step_graph(net, encoders.specs)
    worst = parity(net, model, composed[:4])
    if worst > 1e-5:
        raise SystemExit(f"the graph differs from the network by {worst:.1e}; nothing was written")
    args.out.mkdir(parents=True, exist_ok=True)
    path: Path = args.out / "step.onnx"
    path.write_bytes(model.SerializeToString())
    engine = StepEngine(path)
    print(f"{path.name}: {path.stat().st_size:,} bytes, sha256 {engine.spec.sha256}, differs by {worst:.1e}")
    evaluate(net, composed, "held-out voice and dialogues, composed")
    evaluate(net, composed, "held-out voice and dialogues, composed", ("text",))
    evaluate(net, composed, "held-out voice and dialogues, composed", ("audio",))
    evaluate(net, clips[:1], "held-out conversation of two")
    evaluate(net, clips[1:], "held-out clips with picture")
    evaluate(net, clips[1:], "held-out clips with picture", ("vision",))
    evaluate(net, people, "the synthetic person, other seeds")
    evaluate(net, people, "the synthetic person, other seeds", ("audio",))


if __name__ == "__main__":
    main()
