"""Who started this process: the variables of torchrun and of Slurm."""

from __future__ import annotations

import doctest

import pytest

from kitaeru.engine import place
from kitaeru.engine.place import Place, placed
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


def test_examples() -> None:
    assert doctest.testmod(place).failed == 0
