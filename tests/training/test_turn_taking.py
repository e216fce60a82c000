"""Turn-taking: the owner of the turn, when shift or hold is scored, and that all inputs are causal."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_files import tar
from hypothesis import given
from hypothesis import strategies as st
from places import SHARED

from stream_mmrnn.capture.encoders.audio import SPEECH
from stream_mmrnn.capture.encoders.tokens import TokenEncoder
from stream_mmrnn.core.config import models_folder
from stream_mmrnn.core.errors import ConfigError
from stream_mmrnn.training import recipe as recipes
from stream_mmrnn.training import tasks
from stream_mmrnn.training.data import Task, Ticks, batches, check
from stream_mmrnn.training.recipe import Recipe
from stream_mmrnn.training.tasks import turn_taking
from stream_mmrnn.training.tasks.common import Words

TEXTS = ("text", "text.tokens", "other_text", "other_text.tokens")
RECIPE = models_folder() / "turn_taking" / "recipe.toml"


def recipe(**options: Any) -> Recipe:
    table = tomllib.loads(RECIPE.read_text(encoding="utf-8"))
    table["data"]["options"] = options
    return recipes.parse(table)


@st.composite
def people(draw: st.DrawFn) -> np.ndarray:
    """Segments of speech on a grid of 10 ms."""
    gaps = draw(st.lists(st.tuples(st.integers(5, 80), st.integers(1, 150)), max_size=8))
    at, out = 0, []
    for gap, length in gaps:
        out.append(((at + gap) / 100, (at + gap + length) / 100))
        at += gap + length
    return np.array(out).reshape(-1, 2)


def speaks(stretches: np.ndarray, at: float) -> bool:
    return any(a <= at < b for a, b in stretches)


@given(people(), st.lists(st.floats(0, 20), max_size=20))
def test_activity_is_the_duration_of_speech(voice: np.ndarray, times: list[float]) -> None:
    at = np.sort(np.array(times))
    expected = [sum(max(0.0, min(b, t) - a) for a, b in voice) for t in at]
    np.testing.assert_allclose(turn_taking.activity(voice, at), expected, atol=1e-9)


@given(people(), people(), st.integers(0, 1500))
def test_the_owner_of_the_turn_and_the_next_speaker(one: np.ndarray, other: np.ndarray, hundredths: int) -> None:
    at = hundredths / 100 + 0.005  # between grid points, so no event is at these times
    now = turn_taking.moments(one, other, np.array([at]))
    talks = speaks(one, at), speaks(other, at)
    assert now.silent[0] == (not any(talks))
    following = [min((a for a, _ in v if a > at), default=np.inf) for v in (one, other)]
    if talks == (True, True) or following[0] == following[1]:
        assert not now.known[0]
        return
    last = [max((b for _, b in v if b <= at), default=-np.inf) for v in (one, other)]
    if not any(talks) and last[0] == last[1]:
        assert not now.known[0]
        return
    holder = talks.index(True) if any(talks) else int(last[1] > last[0])
    assert now.known[0]
    assert now.shift[0] == (int(following[1] < following[0]) != holder)
    turned = turn_taking.moments(other, one, np.array([at]))
    assert (turned.shift[0], turned.known[0]) == (now.shift[0], now.known[0])  # the same from the other side


@pytest.mark.slow
@given(people(), people())
def test_decisions_are_in_long_silences(one: np.ndarray, other: np.ndarray) -> None:
    found = turn_taking.decisions(one, other)
    steps = np.arange(0.005, 20, 0.01)
    quiet = np.array([not speaks(one, t) and not speaks(other, t) for t in steps])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], quiet, [False]]).astype(int)))
    expected = []
    for begin, end in edges.reshape(-1, 2):
        if begin and end < len(steps) and end - begin >= 25:  # not before the first word, not after the last
            expected.append(begin / 100 + 0.25)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    clear = turn_taking.decisions(one, other, clear=True)
    assert set(np.round(clear, 6)) <= set(np.round(found, 6))
    for at in clear:
        heard = [any(speaks(v, t) for t in np.arange(at - 1.245, at - 0.25, 0.01)) for v in (one, other)]
        assert heard in ([True, False], [False, True])


def lines(side: str, said: list[tuple[float, float, str]]) -> bytes:
    return "".join(f"sw{side}-ms98-a-0001 {a:.6f} {b:.6f} {w}\n" for a, b, w in said).encode()


A = [(0.0, 1.0, "[silence]"), (1.0, 1.4, "so"), (1.4, 2.01, "what"), (2.01, 6.0, "[silence]"), (6.0, 7.0, "fine")]
B = [(0.0, 2.5, "[noise]"), (2.5, 3.0, "well"), (3.3, 4.0, "no"), (4.0, 9.0, "[silence]")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six equal dialogues, two per split."""
    names = [str(2001 + i) for i in range(6)]
    tree = {
        f"swb/{n[:2]}/{n}/sw{n}{side}-ms98-a-word.text": lines(n + side, said)
        for n in names
        for side, said in (("A", A), ("B", B))
    }
    for split, chosen in zip(("train", "val", "test"), (names[:2], names[2:4], names[4:]), strict=True):
        tree[f"swb/splits/{split}.txt"] = "\n".join(chosen).encode()
    return tar(tmp_path_factory.mktemp("swb") / "switchboard.tar.xz", tree, "w:xz")


@pytest.fixture(scope="module")
def task(corpus: Path) -> Task:
    return tasks.create(recipe(), [corpus])


def test_a_dialogue_as_ticks(task: Task) -> None:
    seen = task.test[0]
    check(seen, recipe())
    assert len(seen) == int(9.0 / 0.04)
    names = list(recipe().modalities)
    assert "vision" not in seen.features
    assert not seen.present[:, names.index("vision")].any()
    assert seen.present[:, names.index("audio")].all()
    speech = seen.features["audio"][:, SPEECH]
    assert not seen.features["audio"][:, :SPEECH].any()
    assert speech[24] == 0  # (0.96, 1.0]
    assert speech[25] == 1
    assert speech[50] == pytest.approx(0.25, abs=1e-5)  # speech to 2.01, of (2.00, 2.04]
    assert seen.features["other_audio"][:, SPEECH].sum() * 0.04 == pytest.approx(1.2, abs=1e-4)
    text = names.index("text")
    # "what" ends at 2.01, in the tick that ends at 2.04; the model sees it in this tick, not earlier
    assert np.flatnonzero(seen.present[:, text]).tolist() == [34, 50, 174]
    np.testing.assert_array_equal(seen.features["text"][50], Words()["what"])
    assert seen.age_s[0, text] == 10
    assert seen.age_s[50, text] == pytest.approx(0.03, abs=1e-5)
    assert seen.age_s[60, text] == pytest.approx(61 * 0.04 - 2.01, abs=1e-5)


def test_targets_of_a_dialogue(task: Task) -> None:
    seen = task.test[0]
    at = round(2.0 / 0.04) - 1  # the tick that ends at 2.00
    assert seen.targets["activity"][at].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert not seen.weights["activity"][-50:].any()  # unknown in the last two seconds
    assert seen.weights["activity"][-51] == 1
    # silences: 2.01 to 2.50 a shift; 3.00 to 3.30 a hold; 4.00 to 6.00 a shift; after 7.00 no speech follows
    decided = np.flatnonzero(seen.weights["turn_over"])
    assert [(int(k) + 1) * 0.04 for k in decided] == pytest.approx([2.24, 3.24, 4.24])
    assert seen.targets["turn_over"][decided].tolist() == [1, 0, 1]


def test_the_second_dialogue_is_from_the_other_side(task: Task) -> None:
    one, other = task.test[0], task.test[1]
    assert one.features["audio"].tobytes() == other.features["other_audio"].tobytes()
    assert one.features["text"].tobytes() == other.features["other_text"].tobytes()
    assert one.targets["turn_over"].tobytes() == other.targets["turn_over"].tobytes()
    assert one.targets["activity"][:, :4].tobytes() == other.targets["activity"][:, 4:].tobytes()


@pytest.mark.slow
def test_ticks_are_causal(corpus: Path, tmp_path: Path) -> None:
    """Truncate the dialogue: earlier ticks do not change."""
    cut = [(a, b, w) for a, b, w in A if b <= 6.0]
    tree = {f"swb/splits/{s}.txt": i for s, i in (("train", b"2001"), ("val", b"2002"), ("test", b"2003"))}
    for n in ("2001", "2002", "2003"):
        tree[f"swb/sw{n}A-ms98-a-word.text"], tree[f"swb/sw{n}B-ms98-a-word.text"] = (
            lines(n + "A", cut),
            lines(n + "B", B),
        )
    short = tasks.create(recipe(), [tar(tmp_path / "swb.tar", tree, "w")]).test[0]
    whole = tasks.create(recipe(), [corpus]).test[0]
    until = 150  # 6.0 s
    for name, vectors in short.features.items():
        assert vectors[:until].tobytes() == whole.features[name][:until].tobytes(), name
    assert short.age_s[:until].tobytes() == whole.age_s[:until].tobytes()
    assert short.present[:until].tobytes() == whole.present[:until].tobytes()


def test_training_has_both_sides_and_delayed_ends_of_speech(corpus: Path) -> None:
    chosen = recipe(late_s=0.2)
    task = tasks.create(chosen, [corpus])
    rng = np.random.default_rng(0)
    made = [s for _ in range(6) for s in task.train(rng)]
    assert {s.name for s in made} == {f"sw{n} from {side}" for n in ("2001", "2002") for side in "AB"}
    plain = task.test[0]
    heard = {round(float(s.features["audio"][:, SPEECH].sum()) * 0.04, 3) for s in made}
    exact = float(plain.features["audio"][:, SPEECH].sum()) * 0.04
    assert len(heard) > 2
    assert all(h > 1.2 - 2 * 0.1 - 1e-3 for h in heard)  # each start is up to half as late
    assert max(heard) < exact + 2 * 0.2 + 1e-3
    assert task.epoch_ticks == pytest.approx(sum(map(len, made[:2])), abs=2)
    for s in made:
        check(s, chosen)
        assert set(np.unique(s.weights["turn_over"])) <= {0.0, 0.25, 1.0}


def test_words_in_training_are_late_missing_or_wrong(corpus: Path) -> None:
    task = tasks.create(recipe(late_words_s=1.0, wrong_words=0.5), [corpus])
    rng = np.random.default_rng(0)
    made = [s for _ in range(20) for s in task.train(rng)]
    names = list(recipe().modalities)
    first, said = set(), set()
    for s in made:
        i, side = names.index("text"), s.name[-1]
        assert (s.present[:, i] == s.present[:, names.index("text.tokens")]).all()
        there = np.flatnonzero(s.present[:, i])
        if side == "A":
            said.add(len(there))
            if len(there) == 3:
                first.add(int(there[0]))
    assert min(first) == 34  # on time: "so" ends at 1.4
    assert 34 + 0.3 / 0.04 <= max(first) <= 34 + 1.0 / 0.04 + 1
    assert min(said) < 3
    assert {*task.common_tokens} >= set(Words(TokenEncoder())["what"].astype(int)) - {0}
    plain = task.test[0]  # nothing of this in the test
    assert np.flatnonzero(plain.present[:, names.index("text")]).tolist() == [34, 50, 174]
    np.testing.assert_array_equal(plain.features["text.tokens"][50, 8:], Words(TokenEncoder())["what"])


def test_some_training_dialogues_have_one_person_only(corpus: Path) -> None:
    task = tasks.create(recipe(alone=0.5), [corpus])
    rng = np.random.default_rng(0)
    names = list(recipe().modalities)
    others = [i for i, name in enumerate(names) if name.startswith("other_")]
    made = [s for _ in range(10) for s in task.train(rng)]
    alone = [s for s in made if not s.present[:, others].any()]
    assert 0 < len(alone) < len(made)
    assert all(s.present[:, names.index("audio")].all() and s.targets["turn_over"].any() for s in alone)
    assert all((s.age_s[:, others] == 10).all() for s in alone)


def test_a_modality_that_is_never_present_is_in_no_batch(task: Task) -> None:
    batch = next(batches(task.train(np.random.default_rng(0)), recipe(), 2, 50))
    assert set(batch.features) == {*TEXTS, "audio", "other_audio"}
    assert batch.present.shape == (2, 50, 9)


def test_the_test_can_score_only_clear_silences(corpus: Path) -> None:
    given = recipes.with_data_options(recipe(), ["silences=clear", "test=1"])
    assert given.data.options == {"silences": "clear", "test": 1}
    task = tasks.create(given, [corpus])
    assert len(task.test) == 1
    clear: Ticks = task.test[0]
    # in the second before 3.00 both spoke
    assert np.flatnonzero(clear.weights["turn_over"]).tolist() == [55, 105]


@pytest.mark.parametrize(
    ("option", "says"),
    [("silences", "'silences' of the data is not KEY=VALUE"), ("silence=clear", "silences"), ("test=few", "test")],
)
def test_a_wrong_option_of_the_data_is_a_sentence(corpus: Path, option: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        tasks.create(recipes.with_data_options(recipe(), [option]), [corpus])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"modalities": {"audio": {"size": 81}}}, "set its select to"),
        ({"modalities": {"audio": {"size": 80, "select": [79]}}}, "no modality 'audio' of 80 numbers"),
        ({"modalities": {"text": {"size": 256}}}, "needs a modality of audio and other_audio"),
        ({"modalities": {"audio": {"size": 81, "select": [81]}}}, "wrong `select`"),
        ({"heads": [{"name": "x", "kind": "classification", "size": 2}]}, "'x' does not fit the data"),
        ({"heads": [{"name": "x", "kind": "activity_projection", "size": 3}]}, "'x' needs the same horizons_s"),
        ({"data": {"kind": "turn_taking", "options": {"silence": "all"}}}, "nearest is `silences`"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(corpus: Path, change: dict[str, Any], says: str) -> None:
    table = (
        tomllib.loads(RECIPE.read_text(encoding="utf-8")) | {"events": {}, "evidence": {}, "late_fusion": {}} | change
    )
    with pytest.raises(ConfigError, match=says):
        tasks.create(recipes.parse(table), [corpus])


@pytest.mark.slow
@pytest.mark.shared_data
def test_switchboard_itself() -> None:
    place = SHARED / "data" / "switchboard_words.tar.xz"
    if not place.exists():
        pytest.skip("the shared data folder is not beside this checkout")
    task = tasks.create(recipe(validation=3, test=3, train=2), [place])
    for seen in (*task.validation, *task.test, *task.train(np.random.default_rng(0))):
        check(seen, recipe())
    weights = np.concatenate([s.weights["turn_over"] for s in task.validation])
    shift = np.concatenate([s.targets["turn_over"] for s in task.validation])[weights > 0]
    assert 0.1 < shift.mean() < 0.5
