"""Who started this process: the variables of torchrun and of Slurm."""

from __future__ import annotations

import doctest

import pytest

from kitaeru.engine import place
from kitaeru.engine.place import Nodes, Place, nodes_given, nodes_of_slurm, placed, use_interface
from kitaeru.errors import UsageError

TORCH = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "6",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_JOB_ID": "40123",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
}


def test_a_person_s_own_process_has_no_place() -> None:
    assert placed({}) is None
    assert placed({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}) is None  # the batch script itself


def test_torchrun() -> None:
    assert placed(TORCH) == Place(3, 4, 1, 2, "10.0.0.1", 29500, 2)


def test_half_of_torchrun_s_variables_is_an_error() -> None:
    with pytest.raises(UsageError, match="MASTER_PORT"):
        placed({name: value for name, value in TORCH.items() if name != "MASTER_PORT"})


def test_srun() -> None:
    assert placed(SLURM) == Place(5, 6, 1, 2, "gpu07", 20123)
    assert placed(SLURM | {"MASTER_ADDR": "head", "MASTER_PORT": "5"}) == Place(5, 6, 1, 2, "head", 5)


def test_srun_with_one_task_on_each_host_starts_hosts() -> None:
    one = SLURM | {"SLURM_NTASKS": "3", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_TASKS_PER_NODE": "1(x3)"}
    assert placed(one) is None
    assert nodes_of_slurm(one) == Nodes(3, 2, "gpu07", 40123 % 20000 + 20000)
    assert nodes_of_slurm(SLURM | {"SLURM_STEP_NUM_NODES": "3"}) is None
    assert nodes_of_slurm({}) is None
    alone = one | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
    assert (placed(alone), nodes_of_slurm(alone)) == (None, None)


@pytest.mark.parametrize(
    ("count", "number", "master"),
    [(2, None, "a:1"), (2, 0, None), (None, 1, "a:1"), (2, 2, "a:1"), (2, 0, "a"), (2, 0, "a:x"), (2, 0, ":5")],
)
def test_half_of_the_words_for_several_hosts_is_an_error(count: int, number: int, master: str) -> None:
    with pytest.raises(UsageError):
        nodes_given(count, number, master)


def test_gloo_and_nccl_meet_through_the_network_that_leads_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    use_interface("127.0.0.1")
    assert place.os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert place.os.environ["NCCL_SOCKET_IFNAME"] == "ib0"  # told already
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")


def test_examples() -> None:
    assert doctest.testmod(place).failed == 0
