from __future__ import annotations

import json
from pathlib import Path

import pytest

from kitaeru.errors import UsageError
from kitaeru.hardware import Hardware, find_gpu, known_gpus, parse_gpus, parse_size


@pytest.mark.parametrize(
    ("driver_name", "row"),
    [
        ("NVIDIA RTX A5000", "RTX A5000"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3090 Ti", "RTX 3090 Ti"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("Tesla V100-SXM2-16GB", "V100 16GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada Generation"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("Quadro RTX 8000", "Quadro RTX 8000"),
        ("rtx3090", "RTX 3090"),
        ("a5000", "RTX A5000"),
    ],
)
def test_the_driver_s_names_find_their_row(driver_name: str, row: str) -> None:
    found = find_gpu(driver_name)
    assert found is not None
    assert found.name == row


@pytest.mark.parametrize("name", ["Radeon", "RTX 3090 Super", "GeForce GTX 480", ""])
def test_a_card_that_is_not_there_is_not_guessed(name: str) -> None:
    assert find_gpu(name) is None


def test_memory_tells_twins_apart() -> None:
    small, large = find_gpu("NVIDIA A100", 42 * 10**9), find_gpu("NVIDIA A100", 85 * 10**9)
    assert small is not None
    assert large is not None
    assert (small.name, large.name) == ("A100 40GB", "A100 80GB")


def test_the_table_is_sane() -> None:
    rows = known_gpus()
    assert len(rows) >= 25
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        found = find_gpu(row.name)
        assert found is not None
        assert found.name == row.name
        assert 8_000 < row.memory_mib < 300_000
        assert (row.bf16_tflops > 0) == (float(row.sm) >= 8.0)
        assert (row.fp8_tflops > 0) == (float(row.sm) >= 8.9)


def test_a_machine_in_words() -> None:
    machine = parse_gpus("2x RTX A5000, nvlink", "128GB")
    assert [d.name for d in machine.devices] == ["RTX A5000"] * 2
    assert [d.index for d in machine.devices] == [0, 1]
    assert machine.devices[0].memory_bytes == 24564 << 20
    assert (machine.links[0].kind, machine.links[0].gb_s) == ("nvlink", 112.5)
    assert machine.host_ram_bytes == 128 * 10**9
    assert machine.described


def test_unequal_cards_are_joined_by_pcie_even_with_nvlink() -> None:
    machine = parse_gpus("RTX 3090 + RTX 4090, nvlink")
    assert [link.kind for link in machine.links] == ["pcie"]


def test_no_gpu_at_all() -> None:
    assert parse_gpus("none", "16GB").devices == ()


@pytest.mark.parametrize(("text", "count"), [("4 x A100 80GB", 4), ("8×H100", 8), ("3 L4", 3), ("L4", 1)])
def test_counts(text: str, count: int) -> None:
    assert len(parse_gpus(text).devices) == count


def test_a_card_with_another_size_than_usual() -> None:
    assert parse_gpus("RTX 3090 48GB").devices[0].memory_bytes == 48 << 30


def test_an_unknown_card_gets_names_like_it() -> None:
    with pytest.raises(UsageError, match="RTX 9090"):
        parse_gpus("2x RTX 9090")
    with pytest.raises(UsageError, match="RTX A5000"):
        parse_gpus("RTX 5000 Super")


@pytest.mark.parametrize("text", ["", "twelve", "12 parsecs", "-3GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


def test_json_round_trip(tmp_path: Path) -> None:
    machine = parse_gpus("2x RTX A5000, L4, nvlink", "128GB")
    file = tmp_path / "machine.json"
    file.write_text(json.dumps({**machine.to_dict(), "future": 1}))
    assert Hardware.load(file) == machine


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1, "devices": [{"colour": 1}]}', '{"version": 9}'])
def test_a_file_that_is_no_machine(tmp_path: Path, text: str) -> None:
    file = tmp_path / "machine.json"
    file.write_text(text)
    with pytest.raises(UsageError):
        Hardware.load(file)
