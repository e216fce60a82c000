"""The table of a session's streams: from the settings, with the defaults of each kind, and what feeds a model."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from stream_mmrnn.capture.encoders import create_encoder
from stream_mmrnn.core import config, processes, streams, topics
from stream_mmrnn.core.errors import ConfigError
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.stream_table import chosen_encoders, for_model, stream_table, wanted_encoders
from stream_mmrnn.core.streams import Stream
from stream_mmrnn.core.types import ModalitySpec

WRIST = {"source": "lsl:IMU-L"}


def table(rows: dict[str, dict[str, Any]], **sections: Any) -> dict[str, Stream]:
    return stream_table(config.parse({"streams": rows, **sections}))


def test_without_streams_the_table_has_the_usual_ones() -> None:
    rows = stream_table(Settings())
    assert {name: row.kind for name, row in rows.items()} == {n: kind for n, (kind, _) in streams.SHORT_FORMS.items()}
    assert {row.name for row in rows.values() if row.person != streams.SELF} == {"other_audio", "other_text"}
    assert [row.source for row in rows.values()] == ["camera:0", "microphone", "stdin", "none", "none", "none"]


def test_a_stream_has_what_is_given_and_else_the_defaults_of_its_kind() -> None:
    rows = table(
        {
            "left_wrist": WRIST,
            "door": {"source": "camera:1", "person": "room", "lateness_ms": 7, "policy": "block", "dense": False},
            "b": {"kind": "audio", "source": "file:b.wav", "raw": False, "feeds": "other_audio", "reduction": "last"},
        },
        align={"signal_lateness_ms": 12.0},
        queues={"signal": "latest"},
    )
    assert rows["left_wrist"] == Stream(
        "left_wrist", "signal", True, "mean", "lsl:IMU-L", lateness_ns=12_000_000, policy="latest", raw=False
    )
    door = rows["door"]
    assert (door.kind, door.person, door.dense, door.lateness_ns, door.policy) == (
        "vision", "room", False, 7_000_000, "block",
    )  # fmt: skip
    b = rows["b"]
    assert (b.kind, b.modality, b.raw, b.reduction) == ("audio", "other_audio", False, "last")
    # the usual ones are not there unless they are given
    assert {name for name, row in rows.items() if row.source != "none"} == {"left_wrist", "door", "b"}
    given = table({"left_wrist": WRIST}, sources={"audio": "synthetic"})
    assert {name for name, row in given.items() if row.source != "none"} == {"left_wrist", "audio"}


def test_a_usual_name_says_the_kind_where_the_source_may_give_it() -> None:
    rows = table({"audio": {"source": "lsl:mic"}, "vision": {"source": "file:a.mp4"}, "text": {"source": "lsl:words"}})
    assert [rows[name].kind for name in ("audio", "vision", "text")] == ["audio", "vision", "text"]


def test_a_signal_is_recorded_raw_only_beside_another_encoder() -> None:
    assert not table({"a": WRIST})["a"].raw
    assert table({"a": {**WRIST, "encoders": ["signal", "slope"]}})["a"].raw


@pytest.mark.parametrize(
    ("rows", "sections", "words"),
    [
        ({"a": {}}, {}, "`streams.a.source` is missing"),
        ({"a": {"source": "file:x.mp4"}}, {}, "`streams.a.kind` is missing"),
        ({"a b": WRIST}, {}, "`streams.a b`: a stream's name has 1 to 32 letters"),
        ({"a": {**WRIST, "kind": "smell"}}, {}, "`streams.a.kind` has a wrong value"),
        ({"a": {**WRIST, "feedz": "x"}}, {}, "unknown key `streams.a.feedz`: the nearest is `feeds`"),
        ({"a": WRIST, "b": {**WRIST, "feeds": "a"}}, {}, "the streams `a` and `b` both feed the modality 'a'"),
        ({"audio": {"source": "microphone"}}, {"sources": {"audio": "none"}}, "two streams are named `audio`"),
    ],
)
def test_what_is_wrong_is_one_sentence(rows: dict[str, dict[str, Any]], sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as e:
        table(rows, **sections)
    assert words in str(e.value)
    assert "\n" not in str(e.value)


def test_no_stream_has_the_name_of_a_process() -> None:
    for name in ("engine", "camera", "supervisor", "clock"):
        with pytest.raises(ConfigError, match=f"`streams.{name}`: a process of the session has this name"):
            processes.captured(config.parse({"streams": {name: WRIST}}))


def test_an_option_names_the_source_of_a_stream_in_the_file(tmp_path: Any) -> None:
    file = tmp_path / "a.toml"
    file.write_text('[streams.audio]\nsource = "microphone"\nlateness_ms = 5\n')
    settings = config.load(file, {"sources.audio": "synthetic"}, {"wrist": dict(WRIST)})
    rows = stream_table(settings)
    assert (rows["audio"].source, rows["audio"].lateness_ns) == ("synthetic", 5_000_000)
    assert rows["wrist"].source == "lsl:IMU-L"


def test_a_recording_keeps_the_table() -> None:
    settings = config.parse({"streams": {"a": {**WRIST, "lateness_ms": 5.0, "encoders": ["signal", "slope"]}}})
    again = config.recorded(msgspec.json.decode(msgspec.json.encode(settings)))
    assert stream_table(again) == stream_table(settings)


def test_topics_follow_from_names() -> None:
    assert topics.stream_of("raw/left_wrist") == topics.stream_of("feature/left_wrist.slope") == "left_wrist"
    for no in ("raw/", "raw/a/b", "feature/a.b.c", "clock", "feature/" + "x" * 33, "feature/a.", "raw/-a"):
        assert topics.stream_of(no) == ""
    assert topics.is_known("status/anything")
    assert not topics.is_known("raw/no name")


def test_what_feeds_a_modality() -> None:
    rows = table(
        {
            "webcam": {"source": "camera:0", "feeds": "vision", "encoders": ["vision", "face"]},
            "a": {**WRIST, "encoders": ["signal", "slope"]},
        }
    )

    def features(modality: str, encoder: str = "") -> tuple[str, str]:
        name, row = streams.feeding(modality, encoder, rows)
        return name, row.name

    assert features("vision") == ("webcam", "webcam")
    assert features("vision.face") == ("webcam.face", "webcam")
    assert features("vision", "face@1234") == ("webcam.face", "webcam")
    assert features("a.slope") == ("a.slope", "a")
    # nothing feeds these: they are masked, and behave in time as their names say
    assert features("text") == ("text", "text")
    assert not streams.feeding("text", "", rows)[1].dense
    assert features("gaze") == ("gaze", "gaze")


# ---- encoders that a model asks for ----------------------------------------------------------------------------------

FACE = ModalitySpec("vision", 95, "face@1")


def wanted(
    *modalities: ModalitySpec, rows: dict[str, dict[str, Any]] | None = None, plugged: tuple[str, ...] = ()
) -> dict[str, tuple[str, ...]]:
    return wanted_encoders(table(rows or {}), modalities, plugged)


def test_a_model_asks_for_the_first_encoder_of_a_stream_and_for_further_ones() -> None:
    assert wanted(FACE) == {"vision": ("face",)}
    assert wanted(ModalitySpec("audio", 81, "logmel80+silero_vad@1"), ModalitySpec("audio.prosody", 21)) == {
        "audio": ("audio", "prosody")
    }
    both = [ModalitySpec(f"{text}{of}", 16) for text in ("text", "other_text") for of in ("", ".tokens")]
    assert wanted(*both) == {"text": ("text", "tokens"), "other_text": ("text", "tokens")}
    assert wanted(ModalitySpec("text", 16, "tokens-l2-supercat@1")) == {"text": ("tokens",)}
    assert wanted(ModalitySpec("vision.vision", 1280), FACE) == {"vision": ("face", "vision")}


def test_a_model_changes_nothing_where_it_asks_for_the_kind_s_own_or_for_what_is_unknown() -> None:
    assert wanted(ModalitySpec("vision", 1280, "efficientnet-lite0-128@1"), ModalitySpec("text", 256)) == {}
    # an encoder of another kind, one that is not installed, a stream that is not there
    assert wanted(ModalitySpec("audio", 95, "face@1"), ModalitySpec("vision.prosody", 21)) == {}
    assert wanted(ModalitySpec("audio.loudness", 1), ModalitySpec("gaze", 2, "face@1")) == {}


def test_a_model_may_ask_for_a_plug_in_s_encoder() -> None:
    asked = (ModalitySpec("wrist", 2, "slope@1"), ModalitySpec("wrist.mean", 1))
    rows = {"wrist": dict(WRIST)}
    assert wanted(*asked, rows=rows) == {}
    assert wanted(*asked, rows=rows, plugged=("mean", "slope")) == {"wrist": ("slope", "mean")}


def test_the_stream_that_feeds_a_modality_gets_the_encoder_and_what_settings_name_stays() -> None:
    cam = {"source": "camera:0", "feeds": "vision"}
    assert wanted(FACE, rows={"webcam": cam})["webcam"] == ("face",)
    assert "webcam" not in wanted(FACE, rows={"webcam": {**cam, "encoders": ["vision"]}})


def test_settings_for_a_model_make_the_table_with_its_encoders() -> None:
    settings = Settings()
    tokens = ModalitySpec("text.tokens", 16, "tokens-l2-supercat@1", "stack", 2)
    asked = for_model(settings, (FACE, tokens))
    rows = stream_table(asked)
    assert rows["vision"].features() == ("vision",)
    assert rows["text"].features() == ("text", "text.tokens")
    assert streams.feeding("text.tokens", tokens.encoder, rows) == ("text.tokens", rows["text"])
    assert {n: row for n, row in rows.items() if n not in ("vision", "text")} == {
        n: row for n, row in stream_table(settings).items() if n not in ("vision", "text")
    }
    # a recording keeps them, and another model's take their place
    again = config.recorded(msgspec.json.decode(msgspec.json.encode(asked)))
    assert stream_table(again) == rows
    assert for_model(again, ()) == settings
    assert {name: c.encoders for name, c in chosen_encoders(asked).items()} == {
        "vision": ("face",), "audio": ("audio",), "text": ("text", "tokens"),
    }  # fmt: skip


def test_which_encoder_makes_which_features() -> None:
    rows = table({"webcam": {"source": "camera:0", "encoders": ["vision", "face"]}, "a": WRIST})
    assert [rows["webcam"].encoder_of(name) for name in rows["webcam"].features()] == ["vision", "face"]
    assert rows["a"].encoder_of("a") == "signal"


def test_why_a_stream_has_its_encoders() -> None:
    rows = {"vision": {"source": "camera:0"}, "audio": {"source": "microphone", "encoders": ["audio"]}, "w": WRIST}
    chosen = chosen_encoders(for_model(config.parse({"streams": rows}), (FACE,)))
    assert {name: c.why for name, c in chosen.items()} == {
        "vision": "the model's choice", "audio": "named in the settings", "w": "its kind's own",
    }  # fmt: skip


def test_a_file_names_encoders_of_streams_and_not_of_the_model() -> None:
    with pytest.raises(ConfigError, match=r"`engine\.encoders` is filled in from the model's contract; name"):
        config.parse({"engine": {"encoders": {"vision": ["face"]}}})
    assert config.parse({"engine": {"encoders": {}}}) == config.parse({})
    with pytest.raises(ConfigError):
        config.recorded({"engine": {"encoders": {"vision": ["../x"]}}})


def test_features_are_told_by_the_name_in_their_origin() -> None:
    rows = table({"words": {"source": "page", "feeds": "text", "encoders": ["text", "tokens"]}})
    assert streams.feeding("text", "tokens-l2-supercat@1", rows)[0] == "words.tokens"
    assert streams.feeding("text", "wordllama-l2-supercat-256@1", rows)[0] == "words"
    for name in streams.FURTHER_ENCODERS:
        assert streams.made_by(create_encoder(name).origin, name)
