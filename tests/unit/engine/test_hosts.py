"""Hosts that meet: the real store, each host a thread."""

from __future__ import annotations

import doctest
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kitaeru.engine import hosts
from kitaeru.engine.hosts import EndedError, Leader, LeaderGoneError, Member, packed, unpacked
from kitaeru.engine.ladder import RUNG
from kitaeru.engine.place import Nodes
from kitaeru.errors import PlanError, TrainingError
from kitaeru.hardware import Hardware, parse_gpus

ONE = parse_gpus("2x RTX A5000")


@pytest.fixture
def leader(monkeypatch: pytest.MonkeyPatch, in_tmp: Path) -> Iterator[Leader]:
    monkeypatch.setattr(hosts, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(hosts, "FRESH_SECONDS", 0.5)
    (in_tmp / "run").mkdir()
    for name in hosts.FILES[:2]:
        (in_tmp / "run" / name).write_text(name)
    made = Leader(Nodes(2, 0, "127.0.0.1", 0), ONE, print)
    yield made
    made.store = None


def member_of(leader: Leader, hardware: Hardware = ONE) -> Member:
    member = Member(Nodes(2, 1, "127.0.0.1", leader.store.port), hardware, print)
    member.come()
    return member


def meeting(leader: Leader, member: Member, *, restarts: int = 0) -> tuple[hosts.Team, hosts.Team]:
    """What both get of a meeting."""
    found: list[hosts.Team] = []
    thread = threading.Thread(target=lambda: found.append(member.meet(Path("run"))))
    thread.start()
    own = leader.meet(Path("run"), 4, resume=restarts > 0, restarts=restarts)
    thread.join(5)
    return own, found[0]


def test_they_plan_as_one_machine_and_share_the_ranks_out(leader: Leader, tmp_path: Path) -> None:
    member = member_of(leader)
    together = leader.hardware()
    assert (together.hosts, len(together.devices)) == (2, 4)
    assert together.host_ram_bytes == 2 * ONE.host_ram_bytes
    leader.publish(Path("run"))
    assert member.folder() == Path("run")
    own, other = meeting(leader, member)
    assert [(t.first, t.local, t.size, t.attempt) for t in (own, other)] == [(0, 2, 4, 1), (2, 2, 4, 1)]
    place = other.place({"LOCAL_RANK": "1"})
    assert (place.rank, place.size, place.local_rank, place.local_size, place.port) == (3, 4, 1, 2, own.port)


def test_an_attempt_begins_only_with_hosts_that_are_there_now(leader: Leader, monkeypatch: pytest.MonkeyPatch) -> None:
    member = member_of(leader)
    leader.hardware()
    meeting(leader, member)
    monkeypatch.setattr(hosts, "PATIENCE", hosts.timedelta(seconds=1.2))
    with pytest.raises(TrainingError, match=r"did not come .* 1\."):  # it was there once, and says nothing now
        leader.meet(Path("run"), 4, resume=True, restarts=1)
    again = member_of(leader)  # started anew, with another life
    monkeypatch.setattr(hosts, "PATIENCE", hosts.timedelta(seconds=10))
    own, other = meeting(leader, again, restarts=1)
    assert (own.attempt, other.attempt, other.resume, other.restarts) == (3, 3, True, 1)


def test_a_rung_goes_to_all_hosts(leader: Leader, tmp_path: Path) -> None:
    member = member_of(leader)
    leader.hardware()
    (Path("run") / RUNG).write_text("lower")
    meeting(leader, member)
    assert (Path("run") / RUNG).read_text() == "lower"


def test_the_end_is_told(leader: Leader) -> None:
    member, said = member_of(leader), []

    def wait() -> None:
        with member:
            try:
                member.folder()
            except EndedError as ended:
                said.append(str(ended))

    thread = threading.Thread(target=wait)
    thread.start()
    with pytest.raises(TrainingError), leader:
        raise TrainingError("no data", remedy="some")
    thread.join(5)
    assert said == ["no data"]


def test_a_leader_that_has_gone_is_not_waited_for_in_vain(leader: Leader, monkeypatch: pytest.MonkeyPatch) -> None:
    member = member_of(leader)
    leader.store = None
    with pytest.raises(LeaderGoneError):
        member.folder()
    monkeypatch.setattr(hosts, "PATIENCE", hosts.timedelta(seconds=0))
    monkeypatch.setattr(hosts, "ANSWER", hosts.timedelta(seconds=1))
    with pytest.raises(TrainingError, match="does not answer"):
        member.come()


def test_files_go_where_they_are_missing_or_other(leader: Leader, tmp_path: Path) -> None:
    text = packed(Path("run"))
    (Path("run") / "plan.json").write_text("another")
    (Path("run") / RUNG).write_text("of another run")
    before = (Path("run") / "recipe.yaml").stat().st_mtime_ns
    assert unpacked(text) == Path("run")
    assert (Path("run") / "plan.json").read_text() == "plan.json"
    assert not (Path("run") / RUNG).exists()
    assert (Path("run") / "recipe.yaml").stat().st_mtime_ns == before


def test_what_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(PlanError, match="3 processes"):
        hosts.shares([0, 0], 3)


def test_examples() -> None:
    assert doctest.testmod(hosts).failed == 0
