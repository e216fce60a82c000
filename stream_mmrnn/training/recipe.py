"""A recipe: one TOML file with task, data, network and training settings.

Typed and strict like the configuration, by the same code. Does not import torch: `evaluate` reads recipes without it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from stream_mmrnn.core import plugins, strict_toml
from stream_mmrnn.core.errors import ConfigError

_Positive = Annotated[float, msgspec.Meta(gt=0)]
_Count = Annotated[int, msgspec.Meta(ge=1)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class ModalityRecipe(_Section, frozen=True):
    """One input of the model."""

    size: _Count
    """Numbers per tick, before any reduction."""
    encoder: str = ""
    """`name@sha256` of the encoder; filled in from recordings; "" accepts any."""
    reduction: Literal["", "last", "mean", "sum", "stack"] = ""
    stack: _Count = 1
    select: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()
    """Indices of the numbers that the model uses; empty means all."""
    energy: _Share = 0.0
    """Keep the principal axes with this share of the variance (PCA); 0 turns PCA off."""
    window_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """For a signal: the model also gets how its numbers moved in windows of up to so many seconds: how far from their
    mean, how fast, and how often (`training.movement`). 0: their values alone."""


FUSIONS = ("add", "concat", "gated", "attention", "attention_state", "cross", "memory")
CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru", "min_gru", "rg_lru")


class FusionRecipe(_Section, frozen=True):
    kind: str = "concat"
    """One of FUSIONS, or the name of a plug-in's fusion."""
    width: _Count = 64
    heads: _Count = 4
    memory: _Count = 16
    modality_dropout: _Share = 0.2
    """Probability that a modality is hidden for a whole chunk in training, so the model learns to do without."""
    choose: bool = False
    """After each epoch, measure the validation data also without each modality and with each alone, and keep the set
    with the smallest loss. The trained model ignores the others."""


class EventsRecipe(_Section, frozen=True):
    """A separate GRU for sparse modalities (words): it steps only in ticks where one of them is present. The fusion
    does not see these modalities; if they are all there are, nothing is fused.
    """

    modalities: tuple[str, ...] = ()
    """Empty: no such GRU."""
    width: _Count = 128
    """Width of the projected input."""
    hidden: _Count = 128
    dropout: _Share = 0.0
    tokens: tuple[str, ...] = ()
    """Modalities that hold token ids (`capture.encoders.tokens`): each id adds a trained vector to the input."""
    vocabulary: _Count = 8000
    """How many tokens have a vector of their own: the most common ones of the training data."""
    next_token: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Weight of a helper loss in training: which token comes next, whoever says it. 0: without."""


class EvidenceRecipe(_Section, frozen=True):
    """Log-odds that come ready made, for example of `turn_end`, added to those of one binary head.

    For what no training data have together with the other inputs. It holds from its event until somebody speaks.
    """

    head: str = ""
    """A classification of size 1."""
    modalities: tuple[str, ...] = ()
    """Inputs of one number each; empty: no evidence."""
    voices: tuple[tuple[str, Annotated[int, msgspec.Meta(ge=0)]], ...] = ()
    """Where it is said that somebody speaks: (modality, index), a probability."""
    weight: _Positive = 1.0


class LateFusionRecipe(_Section, frozen=True):
    """A small network on one modality that few training data have: its log-odds are added to some numbers of one head.

    It is fitted after the rest, on data of its own, and nothing else changes. The fusion does not see the modality.
    """

    modality: str = ""
    """"": no late fusion. `select` says which of its numbers are used."""
    present: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()
    """Indices of numbers that are 0 where the vector says nothing (no face)."""
    head: str = ""
    """One with labels whose numbers are probabilities, each by itself."""
    labels: tuple[str, ...] = ()
    """The head's numbers that it adds to."""
    silent: tuple[tuple[str, Annotated[int, msgspec.Meta(ge=0)]], ...] = ()
    """It counts while none of these speak: (modality, index), a probability."""
    hidden: _Count = 16


class CellRecipe(_Section, frozen=True):
    kind: str = "gru"
    """One of CELLS, or the name of a plug-in's cell."""
    hidden: _Count = 128
    layers: _Count = 1
    residual: bool = False
    norm: Literal["none", "layer", "rms"] = "none"
    dropout: _Share = 0.0
    learned_initial: bool = False


class HeadRecipe(_Section, frozen=True):
    """One output of the model; the data define its targets. A classification of size 1 is binary."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]*$")]
    kind: Literal["classification", "activity_projection", "regression", "hazard"]
    size: _Count
    labels: tuple[str, ...] = ()
    horizons_s: tuple[tuple[float, float], ...] = ()
    unit: str = "probability"
    loss: Literal["", "mse", "huber"] = ""
    """For a regression; "" is mse."""
    standardise: bool = False
    """For a regression: the loss is on targets with mean 0 and deviation 1, by the training data. The served numbers
    are in the units of the data."""
    from_last: tuple[tuple[str, Annotated[int, msgspec.Meta(ge=0)]], ...] = ()
    """For a standardised regression: inputs as (modality, index). Number j is learnt as the change from the last known
    value of the input j % len(from_last)."""
    weight: _Positive = 1.0


class Train(_Section, frozen=True):
    epochs: _Count = 20
    batch: _Count = 16
    length: _Count = 100
    """Ticks of back-propagation through time; state is carried from chunk to chunk."""
    optimizer: Literal["adam", "adamw"] = "adamw"
    learning_rate: _Positive = 1e-3
    schedule: Literal["constant", "cosine", "one_cycle"] = "cosine"
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.01
    clip: _Positive = 1.0
    patience: Annotated[int, msgspec.Meta(ge=0)] = 5
    """Early stopping: epochs without a better validation loss; 0 turns it off."""
    mixed_precision: bool = True
    """On a GPU only."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0


class Data(_Section, frozen=True):
    """Where the sequences come from; `kind` names the task in `tasks/`, `options` are settings of that task."""

    kind: str
    path: str = ""
    options: dict[str, Any] = {}


class Recipe(_Section, frozen=True):
    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]*$")]
    modalities: dict[str, ModalityRecipe]
    heads: tuple[HeadRecipe, ...]
    data: Data
    tick_ms: _Positive = 40.0
    fusion: FusionRecipe = FusionRecipe()
    events: EventsRecipe = EventsRecipe()
    evidence: EvidenceRecipe = EvidenceRecipe()
    late_fusion: LateFusionRecipe = LateFusionRecipe()
    cell: CellRecipe = CellRecipe()
    train: Train = Train()
    quick: dict[str, Any] = {}
    """What `--quick` changes in `train`: a run of minutes, to check that everything works."""

    @property
    def tick_ns(self) -> int:
        return round(self.tick_ms * 1e6)


def parse(table: dict[str, Any]) -> Recipe:
    """The recipe of a table; raises ConfigError."""
    recipe = strict_toml.convert(table, Recipe)
    groups: tuple[tuple[plugins.Group, str, tuple[str, ...]], ...] = (
        ("cells", recipe.cell.kind, CELLS),
        ("fusions", recipe.fusion.kind, FUSIONS),
    )
    for group, kind, own in groups:
        if kind not in own and plugins.find(group, kind) is None:
            known = ", ".join([*own, *plugins.names(group)])
            raise ConfigError(f"`{group[:-1]}.kind` has a wrong value: there is no {kind!r}; use one of {known}")
    for head in recipe.heads:
        for name, what in (("labels", head.labels), ("horizons_s", head.horizons_s)):
            if what and len(what) != head.size:
                raise ConfigError(
                    f"head {head.name!r} has {len(what)} {name} for {head.size} numbers; give one for each"
                )
        _check_from_last(head, recipe)
    _check_apart(recipe)
    for name, m in recipe.modalities.items():
        if m.size % m.stack:
            raise ConfigError(f"modality {name!r} has a size of {m.size}, which is not a multiple of stack = {m.stack}")
        if m.select and (max(m.select) >= m.size or len(set(m.select)) < len(m.select)):
            raise ConfigError(
                f"modality {name!r} has a wrong `select`: expected different numbers from 0 to {m.size - 1}"
            )
        if m.select and m.energy:
            raise ConfigError(f"modality {name!r} has both `select` and `energy`; use one of them")
        if m.window_s:
            _check_window(name, m, recipe)
    return recipe


def _check_window(name: str, m: ModalityRecipe, recipe: Recipe) -> None:
    if m.select or m.energy:
        raise ConfigError(f"modality {name!r} has `window_s`, and `select` or `energy`; use one of them")
    apart = (*recipe.events.modalities, *recipe.events.tokens, *recipe.evidence.modalities)
    if name in (*apart, recipe.late_fusion.modality):
        raise ConfigError(f"modality {name!r} has `window_s`, so name it neither in events, evidence nor late_fusion")


def _check_apart(recipe: Recipe) -> None:
    """Check the modalities that the fusion does not see, and where evidence goes."""
    evidence, events, late = recipe.evidence, recipe.events, recipe.late_fusion
    late_modality = (late.modality,) if late.modality else ()
    voices = tuple(name for name, _ in evidence.voices)
    named = {
        "events.modalities": events.modalities,
        "events.tokens": events.tokens,
        "evidence.modalities": evidence.modalities,
        "evidence.voices": voices,
        "late_fusion.modality": late_modality,
        "late_fusion.silent": tuple(name for name, _ in late.silent),
    }
    for key, names in named.items():
        if unknown := set(names) - set(recipe.modalities):
            raise ConfigError(f"{key} names {min(unknown)!r}, which is not a modality of the recipe")
    apart = [*events.modalities, *events.tokens, *evidence.modalities, *late_modality]
    if len(set(apart)) < len(apart):
        twice = next(name for name in apart if apart.count(name) > 1)
        raise ConfigError(f"{twice!r} is named twice in events, evidence and late_fusion; name it once")
    if len(apart) == len(recipe.modalities) and not events.modalities:
        raise ConfigError(
            "evidence and late_fusion name every modality of the recipe; leave out one for the cell to read"
        )
    if events.tokens and not events.modalities:
        raise ConfigError("events.tokens needs events.modalities, the words that the tokens are of; name them")
    for name in evidence.modalities:
        if recipe.modalities[name].size != 1:
            raise ConfigError(f"evidence.modalities names {name!r}, which must have a size of 1")
    for key, pairs in (("evidence.voices", evidence.voices), ("late_fusion.silent", late.silent)):
        for name, index in pairs:
            if index >= recipe.modalities[name].size:
                raise ConfigError(f"{key} names number {index} of {name!r}, which has none such")
    head = next((h for h in recipe.heads if h.name == evidence.head), None)
    if evidence.modalities and (head is None or head.kind != "classification" or head.size != 1):
        raise ConfigError(
            f"evidence.head is {evidence.head!r}; expected the name of a head of kind classification and size 1"
        )
    if late.modality:
        _check_late_fusion(late, recipe)


def _check_late_fusion(late: LateFusionRecipe, recipe: Recipe) -> None:
    head = next((h for h in recipe.heads if h.name == late.head), None)
    if head is None or head.kind != "activity_projection" or not head.labels:
        raise ConfigError(
            f"late_fusion.head is {late.head!r}; expected the name of a head of kind activity_projection with labels"
        )
    if not late.labels or not set(late.labels) <= set(head.labels):
        raise ConfigError(f"late_fusion.labels has to name some of {', '.join(head.labels)}")
    for index in late.present:
        if index >= recipe.modalities[late.modality].size:
            raise ConfigError(f"late_fusion.present names number {index} of {late.modality!r}, which has none such")


def _check_from_last(head: HeadRecipe, recipe: Recipe) -> None:
    for modality, index in head.from_last:
        if modality not in recipe.modalities or index >= recipe.modalities[modality].size:
            raise ConfigError(
                f"head {head.name!r} has from_last = {modality}, {index}, which is no input of the recipe"
            )
    if head.from_last and (head.size % len(head.from_last) or not head.standardise):
        raise ConfigError(
            f"head {head.name!r} has from_last: it needs standardise = true, and a size that is a multiple of "
            f"{len(head.from_last)}"
        )


def load(path: Path) -> Recipe:
    """The recipe of a TOML file."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"the recipe {path} cannot be read: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"the recipe {path} is not valid TOML: {e}") from e
    return parse(table)


def quick(recipe: Recipe) -> Recipe:
    """The recipe with its `quick` settings applied."""
    table = msgspec.to_builtins(recipe)
    table["train"] |= table.pop("quick")
    return parse(table)


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    """The same recipe with another seed."""
    return msgspec.structs.replace(recipe, train=msgspec.structs.replace(recipe.train, seed=seed))


def with_data_options(recipe: Recipe, given: Sequence[str]) -> Recipe:
    """The same recipe with options of its data as in `silences=clear`: KEY=VALUE, the value as in TOML or a bare word.

    Raises:
        ConfigError: no `=`; an unknown key is found by the task.

    """
    options = dict(recipe.data.options)
    for text in given:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ConfigError(f"the option {text!r} of the data is not KEY=VALUE; give one such as silences=clear")
        try:
            options[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            options[key] = value
    return msgspec.structs.replace(recipe, data=msgspec.structs.replace(recipe.data, options=options))


def save(recipe: Recipe, path: Path) -> None:
    """Write a recipe as TOML; `load` gives the same recipe back."""
    path.write_text(msgspec.toml.encode(recipe).decode(), encoding="utf-8")
