"""Sessions over an engine: each as if alone, through eviction, resuming and crashes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from toy_ticks import alone, tick

from stream_mmrnn.core import errors
from stream_mmrnn.core.block import Block, BlockPredictions
from stream_mmrnn.core.errors import (
    BadTick,
    Busy,
    DuplicateSession,
    Evicted,
    SessionError,
    SnapshotError,
    StreamError,
    UnknownSession,
)
from stream_mmrnn.core.settings import AdmissionSettings, StateSettings
from stream_mmrnn.core.types import Tick
from stream_mmrnn.predict import arena
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.sharded_engine import ShardedEngine
from stream_mmrnn.predict.snapshots import Snapshot, StateStore
from stream_mmrnn.serve.open_sessions import Notice
from stream_mmrnn.serve.sessions import Sessions
from tools.faults import session_machine

S = 1_000_000_000
NOW = 10**15

Make = Callable[..., Sessions]


@pytest.fixture
def make(toy: Path, tmp_path: Path) -> Make:
    def make(
        slots: int = 3,
        model: Path = toy,
        admission: AdmissionSettings | None = None,
        engine: type[StepEngine] = StepEngine,
        store: type[StateStore] = StateStore,
        **state: float,
    ) -> Sessions:
        settings = StateSettings(**{"idle_s": 10, "ttl_s": 100, "snapshot_every": 4, **state})  # type: ignore[arg-type]
        states = store(tmp_path / "states", settings.ttl_s)
        return Sessions(engine(model, slots), states, settings, admission=admission)

    return make


def stepped(sessions: Sessions, ticks: list[Tick], now_ns: int = NOW) -> list[bytes]:
    return [p.heads["next"].tobytes() for p in sessions.step(ticks, now_ns=now_ns)]


# ---- the state machine -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_any_actions_leave_each_session_as_if_alone(toy: Path) -> None:
    found = session_machine.run(lambda: StepEngine(toy, session_machine.SLOTS, batch=4), toy, 600)
    assert not found.wrong
    assert (found.leaks, found.differing, found.unnoticed) == (0, 0, 0)
    assert found.compared > 200
    assert {"open", "step", "cancel", "time-out", "kill", "reopen", "reset", "close"} <= set(found.actions)


@pytest.mark.process
def test_the_same_over_processes(toy: Path) -> None:
    found = session_machine.run(
        lambda: ShardedEngine(toy, session_machine.SLOTS, processes=2, batch=2), toy, 150, kill_one_in=4
    )
    assert not found.wrong
    assert (found.leaks, found.differing, found.unnoticed) == (0, 0, 0)
    assert found.compared > 50


def test_the_state_machine_notices_a_slot_that_is_not_reset(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acquire = arena.Arena.acquire

    def leaky(self: arena.Arena, session: str) -> int:
        slot = acquire(self, session)
        if session != "alone":
            self.fresh[slot] = False
        return slot

    monkeypatch.setattr(arena.Arena, "acquire", leaky)
    found = session_machine.run(lambda: StepEngine(toy, session_machine.SLOTS, batch=4), toy, 150)
    assert found.leaks
    assert found.differing


# ---- opening and eviction --------------------------------------------------------------------------------------------


def test_an_idle_session_is_evicted_and_resumed_by_its_token(toy: Path, make: Make) -> None:
    sessions = make()
    expected = alone(toy, 1, 0, 8)
    opened = sessions.open("a", now_ns=NOW)
    other = sessions.open("b", now_ns=NOW)
    assert (opened.next_index, opened.resumed) == (0, False)
    assert len(opened.token) > 30
    assert opened.token != other.token
    got = stepped(sessions, [tick("a", k) for k in range(4)], NOW + 5 * S)
    assert sessions.evict_idle(NOW + 10 * S) == []
    assert sessions.evict_idle(NOW + 11 * S) == [Notice("b", other.token, "idle", 0)]
    assert sessions.evict_idle(NOW + 16 * S) == [Notice("a", opened.token, "idle", 4)]
    assert len(sessions) == len(sessions.engine) == 0
    with pytest.raises(Evicted, match="open it with its resume token"):
        sessions.step([tick("a", 4)], now_ns=NOW + 17 * S)
    again = make()  # another process
    back = again.open("a", opened.token, now_ns=NOW + 90 * S)
    assert (back.next_index, back.resumed, back.token) == (4, True, opened.token)
    got += stepped(again, [tick("a", k) for k in range(2, 8)], NOW + 90 * S)
    assert got == expected
    assert (again.counts["stale"], again.counts["duplicates"]) == (1, 1)


def test_each_refusal_is_an_error_of_its_own(make: Make) -> None:
    sessions = make(2)
    a = sessions.open("a", now_ns=NOW)
    b = sessions.open("b", now_ns=NOW)
    with pytest.raises(DuplicateSession):
        sessions.open("a", now_ns=NOW)
    with pytest.raises(DuplicateSession):
        sessions.open("a", b.token, now_ns=NOW)
    with pytest.raises(Busy, match="ask again in") as busy:
        sessions.open("c", now_ns=NOW + 7 * S)
    assert busy.value.retry_after_s == pytest.approx(3.0)
    with pytest.raises(UnknownSession):
        sessions.step([tick("c", 0)], now_ns=NOW)
    with pytest.raises(UnknownSession, match="no state of session"):
        sessions.open("c", "token", now_ns=NOW)
    notice = sessions.cancel("a", now_ns=NOW)
    assert notice == Notice("a", a.token, "cancelled", 0)
    for call in (
        lambda: sessions.open("a", now_ns=NOW),
        lambda: sessions.open("a", b.token, now_ns=NOW),
        lambda: sessions.open("a", "\ud800", now_ns=NOW),
        lambda: sessions.cancel("a", now_ns=NOW),
        lambda: sessions.reset("a", now_ns=NOW),
        lambda: sessions.close("a", now_ns=NOW),
        lambda: sessions.close("a", b.token, now_ns=NOW),
    ):
        with pytest.raises(Evicted):
            call()
    assert sessions.counts["evicted_asked"] == 7
    sessions.close("a", a.token, now_ns=NOW)
    with pytest.raises(UnknownSession):
        sessions.open("a", a.token, now_ns=NOW)
    assert not sessions.open("a", now_ns=NOW).resumed


def test_the_token_takes_an_open_session_over(make: Make) -> None:
    sessions = make()
    opened = sessions.open("a", now_ns=NOW)
    stepped(sessions, [tick("a", 3)])
    again = sessions.open("a", opened.token, now_ns=NOW)
    assert (again.token, again.next_index) == (opened.token, 4)
    assert len(sessions) == 1


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a\n", "\0measured 0", "x" * 65, "é", "\ud800"])
def test_invalid_names_are_refused(make: Make, name: str) -> None:
    with pytest.raises(SessionError, match="cannot be called"):
        make().open(name, now_ns=NOW)


def test_a_state_expires(make: Make) -> None:
    sessions = make()
    token = sessions.open("a", now_ns=NOW).token
    sessions.cancel("a", now_ns=NOW)
    after_ns = NOW + 101 * S
    with pytest.raises(UnknownSession):
        sessions.open("a", token, now_ns=after_ns)
    assert sessions.sweep(after_ns) == 1
    assert not sessions.open("a", now_ns=after_ns).resumed


def test_the_token_is_not_on_disk(make: Make) -> None:
    sessions = make()
    token = sessions.open("a", now_ns=NOW).token
    sessions.cancel("a", now_ns=NOW)
    assert token.encode() not in sessions.store.path("a").read_bytes()


def test_a_state_of_another_model_is_refused(toy: Path, make: Make, tmp_path: Path) -> None:
    import toy_model

    sessions = make()
    token = sessions.open("a", now_ns=NOW).token
    sessions.cancel("a", now_ns=NOW)
    other = make(model=toy_model.make(tmp_path / "other.onnx", seed=1))
    with pytest.raises(SessionError, match="close it with its token to begin anew"):
        other.open("a", token, now_ns=NOW)
    other.close("a", token, now_ns=NOW)
    assert not other.open("a", now_ns=NOW).resumed


def test_a_state_that_does_not_fit_leaves_no_slot_taken(make: Make) -> None:
    sessions = make()
    opened = sessions.open("a", now_ns=NOW)
    stepped(sessions, [tick("a", 0)])
    sessions.cancel("a", now_ns=NOW)
    kept = sessions.store.load("a", NOW)
    assert kept is not None
    wrong = {name: np.zeros(2, np.float32) for name in kept.state}
    sessions.store.save(msgspec.structs.replace(kept, state=wrong), NOW)
    with pytest.raises(SessionError, match="does not fit"):
        sessions.open("a", opened.token, now_ns=NOW)
    assert len(sessions.engine) == len(sessions) == 0


def test_a_damaged_state_is_an_error_and_is_not_deleted(make: Make) -> None:
    sessions = make()
    opened = sessions.open("a", now_ns=NOW)
    sessions.cancel("a", now_ns=NOW)
    path = sessions.store.path("a")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(SnapshotError, match="is damaged, remove it to begin session 'a' anew"):
        sessions.open("a", opened.token, now_ns=NOW)
    assert path.exists()
    assert len(sessions.engine) == 0


class FullStore(StateStore):
    """A disk that is full, for a time."""

    is_full = True

    def save(self, snapshot: Snapshot, unix_ns: int) -> Path:
        if self.is_full:
            raise SnapshotError("no space")
        return super().save(snapshot, unix_ns)


def test_a_session_that_cannot_be_saved_is_not_evicted(make: Make) -> None:
    sessions = make(store=FullStore)
    sessions.open("a", now_ns=NOW)
    assert sessions.evict_idle(NOW + 11 * S) == []
    assert sessions.save(NOW + 11 * S) == []
    assert sessions.counts["unsaved"] == 2
    assert sessions.last_problem == "no space"
    assert "a" in sessions
    assert isinstance(sessions.store, FullStore)
    sessions.store.is_full = False
    assert [n.session for n in sessions.evict_idle(NOW + 11 * S)] == ["a"]


def test_leaving_saves_all_sessions(make: Make) -> None:
    sessions = make()
    tokens = {name: sessions.open(name, now_ns=NOW).token for name in "abc"}
    notices = sessions.leave(NOW)
    assert {(n.session, n.token, n.reason) for n in notices} == {(n, t, "leaving") for n, t in tokens.items()}
    again = make()
    assert all(again.open(name, token, now_ns=NOW).resumed for name, token in tokens.items())


# ---- stepping --------------------------------------------------------------------------------------------------------


def test_no_tick_is_stepped_twice_and_all_are_counted(toy: Path, make: Make) -> None:
    sessions = make()
    sessions.open("a", now_ns=NOW)
    got = stepped(sessions, [tick("a", 0), tick("a", 0), tick("a", 1), tick("a", 0)])
    got += stepped(sessions, [tick("a", 1), tick("a", 2)])
    assert got == alone(toy, 1, 0, 3)
    assert stepped(sessions, [tick("a", 2)]) == []
    stepped(sessions, [tick("a", 6)])
    counts = sessions.counts
    assert (counts["stepped"], counts["duplicates"], counts["stale"], counts["skipped"]) == (4, 3, 1, 3)


def replaced(of: Tick, **features: object) -> Tick:
    return msgspec.structs.replace(of, features={**of.features, **features})


def test_bad_ticks_do_not_reach_the_batch_and_do_not_delay_it(toy: Path, make: Make) -> None:
    """Two vectors of wrong sizes that fill two rows together would mix two sessions."""
    sessions = make()
    for name in "ab":
        sessions.open(name, now_ns=NOW)
    good = tick("b", 0)
    bad = [
        replaced(tick("a", 0), vision=np.zeros(6, np.float32)),
        replaced(tick("a", 0), vision=np.zeros(5, np.float64)),
        replaced(tick("a", 0), vision=np.zeros((5, 1), np.float32)),
        msgspec.structs.replace(tick("a", 0), features={}),
        msgspec.structs.replace(tick("a", 0), present={}),
        msgspec.structs.replace(tick("a", 0), index=-1),
        msgspec.structs.replace(tick("a", 0), index=1 << 53),
    ]
    refused: list[tuple[Tick, SessionError]] = []
    out = sessions.step([*bad, good, tick("c", 0)], now_ns=NOW, refused=lambda t, e: refused.append((t, e)))
    assert [p.heads["next"].tobytes() for p in out] == alone(toy, 1, 0, 1)
    assert [type(e) for _, e in refused] == [BadTick] * len(bad) + [UnknownSession]
    assert sessions.counts["bad_ticks"] == len(bad)
    for one in bad:
        with pytest.raises(BadTick):
            sessions.step([tick("b", 1), one], now_ns=NOW)
    assert stepped(sessions, [tick("b", 1)]) == alone(toy, 1, 0, 2)[1:]  # refused ticks were not stepped


def test_snapshots_are_due_by_ticks_and_a_crash_goes_back_to_them(toy: Path, make: Make) -> None:
    sessions = make()
    tokens = {name: sessions.open(name, now_ns=NOW).token for name in "abc"}
    assert sorted(sessions.save(NOW, 2) + sessions.save(NOW, 2)) == ["a", "b", "c"]
    assert sessions.save(NOW) == []
    stepped(sessions, [tick("a", k) for k in range(4)] + [tick("b", k) for k in range(5)] + [tick("c", 0)])
    assert sessions.save(NOW) == ["b"]
    assert sessions.save(NOW) == ["a"]
    assert sessions.save(NOW) == []
    stepped(sessions, [tick("a", 4)])
    again = make()
    with pytest.raises(Evicted):
        again.open("a", now_ns=NOW)
    assert again.open("a", tokens["a"], now_ns=NOW).next_index == 4
    assert again.open("c", tokens["c"], now_ns=NOW).next_index == 0
    assert stepped(again, [tick("a", k) for k in range(6)]) == alone(toy, 1, 0, 6)[4:]


def test_without_a_period_states_are_saved_only_on_leaving(make: Make) -> None:
    sessions = make(snapshot_every=0)
    sessions.open("a", now_ns=NOW)
    stepped(sessions, [tick("a", k) for k in range(9)])
    assert sessions.save(NOW, 9) == []


# ---- admission -------------------------------------------------------------------------------------------------------


def test_a_measured_engine_refuses_more_sessions_than_it_can_serve(make: Make) -> None:
    sessions = make(64, admission=AdmissionSettings(retry_s=2.0, retry_max_s=5.0))
    admission = sessions.admission
    assert admission is not None
    assert admission.settled is not None
    assert len(sessions.engine) == 0  # dummy sessions are closed
    for i in range(512):  # this model as if a tick took 4 ms
        admission.add(1 + i % 4, (1 + i % 4) * 4_000_000, NOW)
    for i in range(5):  # half of 40 ms
        sessions.open(f"s{i}", now_ns=NOW)
    with pytest.raises(Busy, match="could not be served in time") as busy:
        sessions.open("more", now_ns=NOW)
    assert busy.value.retry_after_s == 5.0
    for i in range(32):
        admission.add(1 + i % 4, (1 + i % 4) * 4_000_000, NOW + 9 * S)
    with pytest.raises(Busy) as busy:
        sessions.open("more", now_ns=NOW + 9 * S)
    assert busy.value.retry_after_s == 2.0
    assert sessions.counts["busy"] == 2
    sessions.close("s0", now_ns=NOW)
    sessions.open("more", now_ns=NOW)


class SlowEngine(StepEngine):
    """Steps of a second, by their stamps."""

    def step_block(self, block: Block) -> BlockPredictions:
        done = super().step_block(block)
        return msgspec.structs.replace(done, step_end_ns=done.step_start_ns + S)


def test_an_engine_with_slow_steps_is_measured_enough(make: Make) -> None:
    """On a busy machine the time for measuring may be over after one round, which is too few steps."""
    sessions = make(64, admission=AdmissionSettings(), engine=SlowEngine)
    assert sessions.admission is not None
    assert sessions.admission.settled is not None
    sessions.open("a", now_ns=NOW)
    with pytest.raises(Busy, match="could not be served in time"):
        sessions.open("b", now_ns=NOW)


def test_one_session_is_served_however_slow(make: Make) -> None:
    sessions = make(admission=AdmissionSettings())
    assert sessions.admission is not None
    for _ in range(512):
        sessions.admission.add(1, 10**10, NOW)
    sessions.open("a", now_ns=NOW)
    with pytest.raises(Busy):
        sessions.open("b", now_ns=NOW)


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_the_error_tree_in_the_docstring_is_complete() -> None:
    drawn: dict[str, str] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines()[2:]:
        if not line.strip():
            continue
        stripped = line.lstrip(" │├└─")
        depth = (len(line) - len(stripped)) // 4
        name = stripped.split()[0]
        above[depth:] = [name]
        drawn[name] = above[depth - 1] if depth else "Exception"
    classes = {n: c for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, StreamError)}
    assert drawn == {n: c.__bases__[0].__name__ for n, c in classes.items()}


def test_busy_says_when_to_ask_again() -> None:
    assert Busy("x").retry_after_s == 0.0
    assert (str(Busy("x", 1.5)), Busy("x", 1.5).retry_after_s, Busy.exit_code) == ("x", 1.5, 4)
