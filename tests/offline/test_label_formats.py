"""The formats of labels: files by hand and by the programs' libraries, round trips, and what is wrong in a file."""

from __future__ import annotations

import string
from datetime import UTC
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stream_mmrnn.core.errors import FileError, StreamError, UsageError
from stream_mmrnn.offline.labels.entries import Entry, plain, written_s
from stream_mmrnn.offline.labels.formats import SUFFIXES, is_of_labels, read, write

pympi = pytest.importorskip("pympi", reason="pympi-ling (extra labels) is not installed")
textgrid = pytest.importorskip("praatio.textgrid", reason="praatio (extra labels) is not installed")

S = 1_000_000_000

CSV = 'begin_s,end_s,label,tier\n0.5,2,sitting,posture\n2,4.5,"walks, ""fast""",posture\n1,,left,gaze\n'
RTTM = """;; made by hand, as in the specification of RT-09
SPKR-INFO talk 1 <NA> <NA> <NA> unknown anna <NA>
SPEAKER talk 1 0.50 1.25 <NA> <NA> anna <NA>

SPEAKER talk 1 2.000 0.500 <NA> <NA> bert <NA> <NA>
LEXEME talk 1 2.0 0.2 hello lex bert 0.9
"""
CTM = ";; sclite\ntalk A 0.10 0.30 hello 0.98\ntalk A 0.50 0.25 you lex\n"
SHORT = 'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n5\n<exists>\n2\n"IntervalTier"\n"gaze"\n0\n5\n3\n'
SHORT += '0\n1.5\n""\n1.5\n3.25\n"left ""up"""\n3.25\n5\n""\n"TextTier"\n"beep"\n0\n5\n1\n2.5\n"high"\n'
LONG = '''File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 5
tiers? <exists>
size = 1
item []:
    item [1]:
        class = "IntervalTier"
        name = "gaze"
        xmin = 0
        xmax = 5
        intervals: size = 2
        intervals [1]:
            xmin = 0
            xmax = 1.5
            text = "links"
        intervals [2]:
            xmin = 1.5
            xmax = 5
            text = "über ""sich"""
'''
EAF = """<?xml version="1.0" encoding="UTF-8"?>
<ANNOTATION_DOCUMENT AUTHOR="" DATE="2026-01-31T18:30:00+01:00" FORMAT="3.0" VERSION="3.0"
    xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"
    xsi:noNamespaceSchemaLocation="http://www.mpi.nl/tools/elan/EAFv3.0.xsd">
    <HEADER MEDIA_FILE="" TIME_UNITS="milliseconds"/>
    <TIME_ORDER>
        <TIME_SLOT TIME_SLOT_ID="ts1" TIME_VALUE="500"/><TIME_SLOT TIME_SLOT_ID="ts2" TIME_VALUE="2000"/>
        <TIME_SLOT TIME_SLOT_ID="ts3" TIME_VALUE="2000"/><TIME_SLOT TIME_SLOT_ID="ts4" TIME_VALUE="4500"/>
    </TIME_ORDER>
    <TIER LINGUISTIC_TYPE_REF="default-lt" TIER_ID="P1 posture">
        <ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a1" TIME_SLOT_REF1="ts1" TIME_SLOT_REF2="ts2">
            <ANNOTATION_VALUE>sitting &amp; "still"</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION>
        <ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a2" TIME_SLOT_REF1="ts3" TIME_SLOT_REF2="ts4">
            <ANNOTATION_VALUE>walking</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION>
    </TIER>
    <TIER LINGUISTIC_TYPE_REF="ref" PARENT_REF="P1 posture" TIER_ID="P1 mood">
        <ANNOTATION><REF_ANNOTATION ANNOTATION_ID="a3" ANNOTATION_REF="a2">
            <ANNOTATION_VALUE>glad</ANNOTATION_VALUE></REF_ANNOTATION></ANNOTATION>
    </TIER>
    <LINGUISTIC_TYPE GRAPHIC_REFERENCES="false" LINGUISTIC_TYPE_ID="default-lt" TIME_ALIGNABLE="true"/>
    <LINGUISTIC_TYPE CONSTRAINTS="Symbolic_Association" LINGUISTIC_TYPE_ID="ref" TIME_ALIGNABLE="false"/>
</ANNOTATION_DOCUMENT>
"""
BOMB = EAF.replace(
    "<ANNOTATION_DOCUMENT",
    '<!DOCTYPE x [<!ENTITY e0 "aaaaaaaaaa">'
    + "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 10))
    + "]><ANNOTATION_DOCUMENT",
).replace("walking", "&e9;")
"""Entities that would become 10 GB of text."""


def file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def got(path: Path, *names: str) -> list[tuple[str, float, float | None, str]]:
    return [
        (e.tier, e.begin_ns / S, None if e.end_ns is None else e.end_ns / S, e.name)
        for e in read(path, names or ("talk",))
        if e.name
    ]


def why(path: Path, *names: str) -> str:
    with pytest.raises(FileError) as caught:
        read(path, names or ("talk",))
    return str(caught.value)


POSTURE = [("posture", 0.5, 2.0, "sitting"), ("posture", 2.0, 4.5, 'walks, "fast"'), ("gaze", 1.0, None, "left")]


@pytest.mark.parametrize(
    "content",
    [
        CSV,
        "\ufeff" + CSV.replace("\n", "\r\n"),
        CSV.replace("begin_s", " Start ").replace("end_s", "STOP"),
        "\n" + CSV.replace("0.5,2,", "0:00:00.5,0:02,"),
        ("\ufeff" + CSV).encode("utf-16-le"),
        'tier;onset;dur;text\nposture;0,5;1,5;sitting\nposture;2;2,5;"walks, ""fast"""\ngaze;1;;left\n',
        'tier\tonset\toffset\ttext\nposture\t0.5\t2e0\tsitting\nposture\t2\t4.5\t"walks, ""fast"""\ngaze\t1\t\tleft',
    ],
    ids=["plain", "mark-and-crlf", "names", "clock-times", "utf-16", "semicolons", "tabs"],
)
def test_tables_of_all_kinds(tmp_path: Path, content: str | bytes) -> None:
    assert got(file(tmp_path, "a.csv", content)) == POSTURE


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty; expected a file with labels"),
        ("\n \n", "is empty; expected a file with labels"),
        ("begin_s;label;what\n1;a", "line 2 has 2 fields, the header has 3; expected begin_s, label, what,"),
        ("begin_s,label\n1,a\n2,b,c\n", "line 3 has 3 fields, the header has 2; .* in quotation marks"),
        ("when,what\n1,a\n", "line 1 has the columns 'when', 'what'; expected a header with begin_s and label"),
        ("\n1.5,2.5,sitting\n", "line 2 has the columns '1.5', '2.5', 'sitting'; expected a header"),
        ("begin_s,label\n1,a\nnan,b\n", "the begin of line 3 is 'nan'; expected seconds such as 12.5"),
        ("begin_s,end_s,label\n1,inf,a\n", "the end of line 2 is 'inf'; expected seconds"),
        ("begin_s,label\n,a\n", "the begin of line 2 is ''; expected seconds"),
        ("begin_s,label\n1e300,a\n", "the begin of line 2 is '1e300'; expected seconds"),
        ("begin_s,label\n1_0,a\n", "the begin of line 2 is '1_0'; expected seconds"),
        ("begin_s,label\n1,\n", "line 2 has no label; expected a name, or none"),
        (b"begin_s,label\n1,a\n2,sch\xf6n\n", "line 3 is not in UTF-8; save the file again as UTF-8"),
        (b"\xff\xfeb\x00\x00", "line 1 is not in UTF-16; save the file again as UTF-8"),
        (b"begin_s,label\n1,a\x00b\n", "line 2 holds a zero byte; expected text"),
        (b"begin_s,label\n1,a\x1b[2Jb\n", "the label of line 2 holds the character U.001B, which is no text"),
        ("begin_s,start,label\n1,1,a\n", "line 1 names 'begin_s' and 'start', which are both the begin; leave one"),
        ("begin_s,end_s,duration_s,label\n1,2,1,a\n", "line 1 has both an end and a duration; leave one of them out"),
        ('begin_s,label\n1,"a\n', "line 2 is no row of a table: .*; is a quotation mark missing"),
        (f"begin_s,label\n1,{'x' * 1001}\n", "the label of line 2 has 1001 characters, at most 1000 are a label"),
    ],
)
def test_a_wrong_table_is_a_sentence_that_names_the_line(tmp_path: Path, content: str | bytes, words: str) -> None:
    path = file(tmp_path, "a.csv", content)
    with pytest.raises(FileError, match=words) as caught:
        read(path, ())
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "zone", "unix_ns"),
    [
        ("2026-01-31T18:30:00.25Z", "UTC", 1769884200_250_000_000),
        ("2026-01-31 19:30:00.25", "Europe/Berlin", 1769884200_250_000_000),
        ("2026-01-31T18:30:00.25+00:00", "Europe/Berlin", 1769884200_250_000_000),
        ("1769884200.250000001", "UTC", 1769884200_250_000_001),
    ],
)
def test_dates_and_times(tmp_path: Path, text: str, zone: str, unix_ns: int) -> None:
    path = file(tmp_path, "a.csv", f"begin_s,label\n{text},a\n")
    (entry,) = read(path, (), "wall", ZoneInfo(zone))
    assert entry.begin_ns == unix_ns


def test_wrong_dates(tmp_path: Path) -> None:
    path = file(tmp_path, "a.csv", "begin_s,label\n2026-13-01T00:00:00Z,a\n")
    with pytest.raises(FileError, match="the begin of line 2 is '2026-13-01T00:00:00Z'; expected a date and time"):
        read(path, (), "wall", UTC)


def test_rttm_and_ctm(tmp_path: Path) -> None:
    notes: list[str] = []
    path = file(tmp_path, "a.rttm", RTTM)
    read(path, (), note=notes.append)
    assert got(path) == [("label", 0.5, 1.75, "anna"), ("label", 2.0, 2.5, "bert")]
    assert "1 lines of the type LEXEME were left out" in " ".join(notes)
    assert got(file(tmp_path, "a.ctm", CTM)) == [("label", 0.1, 0.4, "hello"), ("label", 0.5, 0.75, "you")]
    channels = CTM.replace("talk A 0.50", "talk B 0.50")
    assert [row[0] for row in got(file(tmp_path, "b.ctm", channels))] == ["A", "B"]
    several = file(tmp_path, "b.rttm", RTTM + "SPEAKER other 1 0 1 <NA> <NA> carl <NA> <NA>\n")
    assert [row[3] for row in got(several)] == ["anna", "bert"]
    assert [row[3] for row in got(several, "x", "other")] == ["carl"]
    assert r"is of 2 files (talk, other), and none is called x or y; keep the lines" in why(several, "x", "y")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.rttm", "SPEAKER talk 1 0 1 <NA> <NA> anna\n", "line 1 has 8 fields; expected 9 or 10: SPEAKER FILE"),
        ("a.rttm", ";; x\ntalk 1 0 1 anna\n", "line 2 begins with 'talk'; expected a line SPEAKER FILE CHANNEL BEGIN"),
        ("a.rttm", RTTM.replace("1.25", "NaN"), "the duration of line 3 is 'NaN'; expected seconds"),
        ("a.rttm", "SPKR-INFO talk 1 <NA> <NA> <NA> unknown anna <NA>\n", "has no SPEAKER line; expected one for each"),
        ("a.rttm", b"SPEAKER t 1 0 1 <NA> <NA> \xe4 <NA> <NA>\n", "line 1 is not in UTF-8"),
        ("a.ctm", "talk A 0.1\n", "line 1 has 3 fields; expected 5 to 8: FILE CHANNEL BEGIN DURATION WORD"),
        ("a.ctm", "talk A * * <ALT_BEGIN>\n", r"the begin of line 1 is '\*'; expected seconds"),
        ("a.ctm", ";; nothing\n", "has no word; expected one for each label"),
        ("a.TextGrid", "hello\nyou", "line 1 is 'hello'; expected a TextGrid as Praat saves it as text"),
        ("a.TextGrid", LONG[: LONG.index("intervals [2]")], "was cut off or damaged: save it again in Praat"),
        ("a.TextGrid", SHORT[: SHORT.index('3.25\n"left')], "was cut off or damaged|that praatio can read"),
        ("a.TextGrid", SHORT.replace("1.5", "x"), "the end of interval 1 of the tier 'gaze' is 'x'; expected seconds"),
        ("a.TextGrid", SHORT.replace('"beep"', '"gaze"'), "has two tiers 'gaze'; give each another name"),
        ("a.eaf", EAF[:900], "is no ELAN file that pympi can read .*; open it in ELAN and save it again"),
        ("a.eaf", BOMB, "is no ELAN file that pympi can read"),
        ("a.eaf", "<html/>", "is no ELAN file that pympi can read"),
        ("a.eaf", EAF.replace(' TIME_VALUE="2000"', ""), "'a1' of the tier 'P1 posture' has no time of its own"),
        ("a.eaf", EAF.replace('_REF="a2"', '_REF="a3"'), "'a3' of the tier 'P1 mood' refers to 'a3', which has"),
        (
            "a.eaf",
            EAF.replace("2000", "9" * 400),
            "'a1' of the tier 'P1 posture' is at 99999999999999999999… ms",
        ),
        ("a.eaf", EAF.replace("milliseconds", "PAL-frames"), "counts time in 'PAL-frames'; expected milliseconds"),
    ],
)
def test_a_wrong_file_is_a_sentence(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    with pytest.raises(FileError, match=words) as caught:
        read(file(tmp_path, name, content), ("talk",))
    assert "\n" not in str(caught.value)


def test_elan_by_hand_and_by_its_library(tmp_path: Path) -> None:
    expected = [
        ("P1 posture", 0.5, 2.0, 'sitting & "still"'),
        ("P1 posture", 2.0, 4.5, "walking"),
        ("P1 mood", 2.0, 4.5, "glad"),
    ]
    assert got(file(tmp_path, "a.eaf", EAF)) == expected
    made = pympi.Eaf()
    made.add_tier("gaze")
    made.add_annotation("gaze", 1500, 3250, "links\n unten")
    made.add_annotation("default", 0, 10, "")
    made.to_file(str(tmp_path / "b.eaf"))
    assert got(tmp_path / "b.eaf") == [("gaze", 1.5, 3.25, "links  unten")]


def test_praat_by_hand_and_by_its_library(tmp_path: Path) -> None:
    short = [("gaze", 1.5, 3.25, 'left "up"'), ("beep", 2.5, None, "high")]
    assert got(file(tmp_path, "a.TextGrid", SHORT)) == short
    assert got(file(tmp_path, "b.TextGrid", SHORT.replace("ooTextFile", "ooTextFile short").encode("utf-16"))) == short
    long = [("gaze", 0.0, 1.5, "links"), ("gaze", 1.5, 5.0, 'über "sich"')]
    assert got(file(tmp_path, "c.textgrid", LONG.replace("\n", "\r\n"))) == long
    made = textgrid.Textgrid(0, 5)
    made.addTier(textgrid.IntervalTier("gaze", [(0, 1.5, "links"), (1.5, 5, 'über "sich"')], 0, 5))
    for form in ("short_textgrid", "long_textgrid"):
        made.save(str(tmp_path / f"{form}.TextGrid"), form, includeBlankSpaces=True)
        assert got(tmp_path / f"{form}.TextGrid") == long


def test_names_of_formats(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a.doc is no format of labels; use a name that ends in .csv, .tsv, .eaf"):
        read(file(tmp_path, "a.doc", "x"), ())
    assert [is_of_labels(Path(f"x{suffix}")) for suffix in SUFFIXES] == [False, False, True, True, True, True]
    for broken in ("there-is-none.csv", "."):
        with pytest.raises(StreamError, match=r"expected one with labels|is no format of labels"):
            read(tmp_path / broken, ())


RESOLUTION_NS = {".csv": 1, ".tsv": 1, ".eaf": 1_000_000, ".TextGrid": 1000, ".rttm": 1000, ".ctm": 1000}
_ANY = st.characters(exclude_categories=["Cc", "Cs"]) | st.sampled_from("\"',;\t{}<>&")
_TEXT = st.text(_ANY, min_size=1, max_size=20)


@st.composite
def _entries(draw: st.DrawFn, words: bool) -> list[Entry]:
    out = []
    names = ["label"] if words else draw(st.lists(st.sampled_from(["label", "gaze", "P-1"]), min_size=1, unique=True))
    for tier in names:
        at_ns = 0
        for _ in range(draw(st.integers(1, 6))):
            at_ns += draw(st.integers(0, 3) | st.integers(0, 10**12)) * 1_000_000
            end_ns = at_ns + draw(st.integers(1_000_000, 10**11))
            text = st.text(string.ascii_letters + "äß语\"'<>&", min_size=1, max_size=9) if words else _TEXT
            name = draw(text.map(plain).filter(bool))
            out.append(Entry("", tier, at_ns, end_ns, name))
            at_ns = end_ns
    return out


def test_labels_that_fall_together_in_a_format_are_refused(tmp_path: Path) -> None:
    entries = [Entry("", "label", 2_000_000, 2_100_000, "a"), Entry("", "label", 2_100_000, 9_000_000, "b")]
    with pytest.raises(FileError, match="the labels 'a' and 'b', which begin in the same unit of"):
        write(tmp_path / "a.eaf", entries, "talk", 9_000_000)
    write(tmp_path / "a.csv", entries, "talk", 9_000_000)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SUFFIXES)
@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_reads_back(tmp_path: Path, suffix: str, data: st.DataObject) -> None:
    """Labels with any text and tiers; times to the resolution of the format. What it cannot hold is an error."""
    entries = data.draw(_entries(suffix in (".rttm", ".ctm")))
    path = tmp_path / f"talk{suffix}"
    end_ns = max(e.end_ns or 0 for e in entries)
    refused = ""
    try:
        write(path, entries, "talk", end_ns, force=True)
    except FileError as e:
        refused = str(e)
    if refused:
        # praatio cannot read its own files where a label looks like the head of a tier
        assert suffix == ".TextGrid"
        assert "use .csv" in refused
        assert any(c in e.name for e in entries for c in '[":')
        return
    found = [e for e in read(path, ("talk",)) if e.name]

    def key(e: Entry) -> tuple[str, int]:
        return e.tier, e.begin_ns

    tolerance_ns = RESOLUTION_NS[suffix]
    for wanted, back in zip(sorted(entries, key=key), sorted(found, key=key), strict=True):
        assert (wanted.tier, wanted.name) == (back.tier, back.name)
        assert abs(wanted.begin_ns - back.begin_ns) <= tolerance_ns
        assert wanted.end_ns is not None
        assert back.end_ns is not None
        assert abs(wanted.end_ns - back.end_ns) <= 2 * tolerance_ns


SAMPLES = {"a.csv": CSV, "a.rttm": RTTM, "a.ctm": CTM, "a.TextGrid": LONG, "b.TextGrid": SHORT, "a.eaf": EAF}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_read_or_is_one_sentence(tmp_path: Path, name: str, data: st.DataObject) -> None:
    content = bytearray(SAMPLES[name].encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        put = data.draw(st.binary(max_size=6) | st.sampled_from([b"\n", b'"', b"\0", b"nan", b"-1", b"&x;", b"<"]))
        content[at : at + data.draw(st.integers(0, 40))] = put
    path = file(tmp_path, name, bytes(content))
    refused, entries = "", []
    try:
        entries = read(path, ("talk",))
    except StreamError as e:
        refused = str(e)
    assert not refused or (str(path) in refused and "\n" not in refused)
    assert all(isinstance(e.begin_ns, int) and e.name == plain(e.name) for e in entries)


@given(st.integers(0, 2**61), st.integers(1, 9))
def test_seconds_are_rounded_as_integers(ns: int, digits: int) -> None:
    whole, part = written_s(ns, digits).split(".")
    assert len(part) == digits
    back = int(whole) * S + int(part.ljust(9, "0"))
    assert abs(back - ns) <= 10 ** (9 - digits) / 2


def test_a_file_is_not_replaced_without_being_asked(tmp_path: Path) -> None:
    path = file(tmp_path, "a.rttm", "mine")
    with pytest.raises(FileError, match="is there already; choose another name, or use --force"):
        write(path, [Entry("", "label", 0, S, "a")], "talk", S)
    with pytest.raises(FileError, match=r"a.rttm separates its fields by spaces, and the label 'a b' has one; use"):
        write(path, [Entry("", "label", 0, S, "a b")], "talk", S, force=True)
    with pytest.raises(FileError, match=r"a.rttm can hold no tiers, and there are x, y; choose one with --tier"):
        write(path, [Entry("", tier, 0, S, "a") for tier in "xy"], "talk", S, force=True)
    assert path.read_text() == "mine"
    assert [*tmp_path.iterdir()] == [path]
    with pytest.raises(FileError, match="cannot be written: No such file"):
        write(tmp_path / "none" / "a.csv", [Entry("", "label", 0, S, "a")], "talk", S)
