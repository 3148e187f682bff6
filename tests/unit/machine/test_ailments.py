"""Each ailment on a described machine that has it and nothing else, and none on the healthy one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from kitaeru.machine.ailments import findings, unseen
from kitaeru.machine.facts import Torch, acs_control
from kitaeru.machine.trials import Copy, Load, Sum, Trials

Case = Callable[[Any, Any], None]
CASES: dict[str, tuple[Case, set[tuple[str, str]], str]] = {}


def ailment(*expected: tuple[str, str], mend: str = "") -> Callable[[Case], Case]:
    """A case: what it does to the healthy machine `m`, the findings (name, level), and a part of the first's remedy."""

    def register(case: Case) -> Case:
        CASES[case.__name__] = case, set(expected), mend
        return case

    return register


def with_sum(trials: Trials, transport: str, **changes: Any) -> Trials:
    return replace(trials, sums=tuple(replace(s, **changes) if s.transport == transport else s for s in trials.sums))


def no_driver(m: Any) -> None:
    m.driver_error, m.cards = "NVML Shared Library Not Found", []
    m.trials = Trials(torch=replace(m.trials.torch, devices=0), sums=(Sum("cpu", "gloo", 2, 1.0),))


@ailment(("driver-missing", "failure"), mend="nvidia-driver")
def a_card_without_a_driver(m: Any, d: Any) -> None:
    no_driver(m)


@ailment(("container-without-gpus", "failure"), mend="--gpus all")
def a_container_started_without_gpus(m: Any, d: Any) -> None:
    no_driver(m)
    m.files[".dockerenv"] = ""


@ailment(("driver-mismatch", "failure"), mend="reboot")
def a_driver_updated_under_way(m: Any, d: Any) -> None:
    no_driver(m)
    m.driver_error = "Driver/library version mismatch"


@ailment(("nouveau", "failure"), ("driver-missing", "failure"))
def the_free_driver(m: Any, d: Any) -> None:
    no_driver(m)
    m.files["proc/modules"] = "nouveau 2334720 0 - Live 0x0\n"


@ailment(("card-lost", "failure"), mend="xid")
def a_card_off_the_bus(m: Any, d: Any) -> None:
    m.cards[1] = None
    m.trials = replace(m.trials, torch=replace(m.trials.torch, devices=1))


@ailment(("cards-hidden", "warning"), mend="unset CUDA_VISIBLE_DEVICES")
def a_card_hidden(m: Any, d: Any) -> None:
    m.environment["CUDA_VISIBLE_DEVICES"] = "1"
    m.trials = replace(m.trials, torch=replace(m.trials.torch, devices=1))


@ailment(("cards-hidden", "failure"), mend="unset CUDA_VISIBLE_DEVICES")
def all_cards_hidden(m: Any, d: Any) -> None:
    m.environment["CUDA_VISIBLE_DEVICES"] = ""
    m.trials = replace(m.trials, torch=replace(m.trials.torch, devices=0))


@ailment(("torch-without-cuda", "failure"), mend="torch")
def torch_for_the_cpu(m: Any, d: Any) -> None:
    m.trials = replace(m.trials, torch=Torch("2.11.0+cpu"))


@ailment(("torch-broken", "failure"), mend="torch")
def torch_that_does_not_load(m: Any, d: Any) -> None:
    m.trials = Trials(error="ImportError: libcudart.so.12")


@ailment(("torch-newer-than-driver", "failure"), mend="nvidia-driver")
def torch_newer_than_the_driver(m: Any, d: Any) -> None:
    m.trials = replace(m.trials, torch=replace(m.trials.torch, cuda="13.0", devices=0, error="driver too old"))


@ailment(("torch-without-kernels", "failure"), ("no-bf16", "note"), mend="torch==")
def a_card_too_old_for_torch(m: Any, d: Any) -> None:
    m.cards[0] = d.card(0, CudaComputeCapability=(6, 1))


@ailment(("torch-without-kernels", "failure"), mend="--upgrade torch")
def a_card_too_new_for_torch(m: Any, d: Any) -> None:
    m.cards[0] = d.card(0, CudaComputeCapability=(13, 0))


@ailment(("cuda-does-not-start", "failure"), mend="dmesg")
def cuda_that_does_not_start(m: Any, d: Any) -> None:
    m.trials = replace(m.trials, torch=replace(m.trials.torch, devices=1, error="unspecified launch failure"))


@ailment(("driver-capabilities", "failure"), mend="NVIDIA_DRIVER_CAPABILITIES=compute")
def a_driver_let_in_by_half(m: Any, d: Any) -> None:
    m.environment["NVIDIA_DRIVER_CAPABILITIES"] = "utility"
    m.trials = replace(m.trials, torch=replace(m.trials.torch, devices=0, error="no CUDA-capable device"))


@ailment(("uvm-missing", "failure"), mend="nvidia-modprobe")
def no_device_file(m: Any, d: Any) -> None:
    del m.files["dev/nvidia-uvm"]
    m.trials = replace(m.trials, torch=replace(m.trials.torch, devices=0, error="unknown error"))


@ailment(("fabric-manager", "failure"), mend="nvidia-fabricmanager")
def a_fabric_that_was_not_started(m: Any, d: Any) -> None:
    m.cards = [d.card(n, GpuFabricInfo=1) for n in (0, 1)]
    m.trials = replace(m.trials, torch=replace(m.trials.torch, devices=0, error="system not yet initialized"))


@ailment(("compute-mode", "warning"), mend="-i 1 -c DEFAULT")
def a_card_for_one_process(m: Any, d: Any) -> None:
    m.cards[1]["ComputeMode"] = 3


@ailment(("compute-mode", "failure"), mend="-i 0 -c DEFAULT")
def a_card_for_nobody(m: Any, d: Any) -> None:
    m.cards[0]["ComputeMode"] = 2


@ailment(("mig", "warning"), mend="-mig 0")
def a_card_in_pieces(m: Any, d: Any) -> None:
    m.cards[0]["MigMode"] = (1, 1)


@ailment(("card-in-use", "warning"), mend="kill 4242")
def a_card_in_use(m: Any, d: Any) -> None:
    m.files["proc/4242/comm"] = "ollama\n"
    m.cards[0]["ComputeRunningProcesses"] = [SimpleNamespace(pid=4242, usedGpuMemory=9 << 30)]


@ailment(("memory-errors", "failure"), mend="--gpu-reset")
def memory_errors(m: Any, d: Any) -> None:
    m.cards[1]["TotalEccErrors"] = 3


@ailment(("memory-remap-pending", "failure"), mend="-i 1 --gpu-reset")
def a_row_that_waits(m: Any, d: Any) -> None:
    m.cards[1]["RemappedRows"] = (0, 1, 1, 0)


@ailment(("memory-remap-failed", "failure"), mend="ROW_REMAPPER")
def a_row_that_stays(m: Any, d: Any) -> None:
    m.cards[1]["RemappedRows"] = (0, 1, 1, 1)


@ailment(("power-limit", "warning"), mend="-i 0 -pl 230")
def a_power_limit(m: Any, d: Any) -> None:
    m.cards[0]["PowerManagementLimit"] = 140_000


@ailment(("too-hot", "warning"), mend="TEMPERATURE")
def heat(m: Any, d: Any) -> None:
    m.cards[0]["Temperature"] = 95


@ailment(("too-hot", "warning"))
def a_clock_held_down_by_heat(m: Any, d: Any) -> None:
    m.cards[0]["CurrentClocksEventReasons"] = 0x40 | 0x08


@ailment(("power-brake", "warning"), mend="POWER")
def a_weak_power_supply(m: Any, d: Any) -> None:
    m.cards[1]["CurrentClocksEventReasons"] = 0x80


@ailment(("persistence-off", "note"), mend="-pm 1")
def no_persistence(m: Any, d: Any) -> None:
    m.cards[0]["PersistenceMode"] = 0


@ailment(("pcie-width", "warning"), mend="lspci")
def lanes_lost(m: Any, d: Any) -> None:
    m.trials = replace(m.trials, loads=(m.trials.loads[0], Load(1, 6.3, 6.2, 4, 4)))


@ailment(("pcie-generation", "warning"), mend="lspci")
def an_older_generation(m: Any, d: Any) -> None:
    m.trials = replace(m.trials, loads=(m.trials.loads[0], Load(1, 12.5, 12.4, 3, 16)))


@ailment(("pcie-slow", "warning"), mend="topo")
def a_slow_link(m: Any, d: Any) -> None:
    m.trials = replace(m.trials, loads=(m.trials.loads[0], Load(1, 24.0, 5.5, 4, 16)))


@ailment(("pcie-errors", "warning"), mend="replay")
def a_bad_riser(m: Any, d: Any) -> None:
    m.cards[0]["PcieReplayCounter"] = 52_000


@ailment(("nvlink-down", "warning"), mend="nvlink -s -i 0")
def a_loose_bridge(m: Any, d: Any) -> None:
    m.cards[0]["NvLinkState"] = lambda link: int(link < 2) if link < 4 else None


def without_p2p(m: Any) -> None:
    """A machine whose direct copies do not work and that knows it."""
    copies = tuple(replace(c, gb_s=0.0, error="no peer access") if c.direct else c for c in m.trials.copies)
    sums = tuple(replace(s, gb_s=9.0, used="SHM") if s.transport == "default" else s for s in m.trials.sums)
    m.trials = replace(m.trials, copies=copies, sums=tuple(s for s in sums if s.transport != "p2p"))


@ailment(("no-p2p", "note"), mend="topo -m")
def cards_at_different_sockets(m: Any, d: Any) -> None:
    without_p2p(m)
    m.cards[0]["P2PStatus"] = lambda *_: 3


@ailment(("no-p2p", "note"), mend="NVreg_RegistryDwords")
def direct_copies_switched_off_in_the_driver(m: Any, d: Any) -> None:
    without_p2p(m)
    m.cards[0]["P2PStatus"] = lambda *_: 4


@ailment(("acs", "warning"), mend="setpci -s $b ECAP_ACS+6.w=0000")
def copies_sent_to_the_root(m: Any, d: Any) -> None:
    without_p2p(m)
    m.files["sys/bus/pci/devices/0000:00:01.0/config"] = d.pci_space(0x1D)


@ailment(("acs", "note"), mend="0000:00:01.0")
def copies_sent_to_the_root_that_work(m: Any, d: Any) -> None:
    m.files["sys/bus/pci/devices/0000:00:01.0/config"] = d.pci_space(0x1D)


@ailment(("iommu", "warning"), mend="iommu=pt")
def an_iommu(m: Any, d: Any) -> None:
    without_p2p(m)
    for n in (1, 2):
        m.files[f"sys/bus/pci/devices/0000:0{n}:00.0/iommu_group/type"] = "DMA-FQ\n"


@ailment(("copy-wrong", "failure"), mend="NCCL_P2P_DISABLE=1")
def a_copy_that_arrives_changed(m: Any, d: Any) -> None:
    m.trials = replace(m.trials, copies=(replace(m.trials.copies[0], wrong=True), *m.trials.copies[1:]))


@ailment(("copy-hangs", "failure"), mend="NCCL_P2P_DISABLE=1")
def a_copy_that_hangs(m: Any, d: Any) -> None:
    m.trials = replace(m.trials, copies=(Copy(0, 1, True, hung=True), *m.trials.copies[1:]))


@ailment(("p2p-slow", "warning"), ("nccl-choice", "warning"), mend="NCCL_P2P_DISABLE=1")
def direct_and_slow(m: Any, d: Any) -> None:
    m.trials = replace(
        with_sum(with_sum(m.trials, "default", gb_s=2.0), "p2p", gb_s=2.0),
        copies=tuple(replace(c, gb_s=2.1) if c.direct else c for c in m.trials.copies),
    )


@ailment(("allreduce-hangs", "failure"), ("allreduce-hangs", "note"), mend="NCCL_P2P_DISABLE=1")
def nccl_hangs(m: Any, d: Any) -> None:
    m.trials = replace(
        with_sum(m.trials, "default", hung=True, gb_s=0.0),
        sums=tuple(replace(s, hung=True, gb_s=0.0) if s.transport in ("default", "p2p") else s for s in m.trials.sums),
    )


@ailment(("allreduce-wrong", "failure"), mend="NCCL_P2P_DISABLE=1")
def nccl_sums_wrong(m: Any, d: Any) -> None:
    m.trials = with_sum(m.trials, "default", wrong=True)


@ailment(("allreduce-fails", "note"), mend="--ipc=host")
def one_transport_fails(m: Any, d: Any) -> None:
    m.trials = with_sum(m.trials, "shm", error="No space left on device", gb_s=0.0)


@ailment(("allreduce-fails", "failure"), mend="GLOO_SOCKET_IFNAME")
def gloo_fails(m: Any, d: Any) -> None:
    m.trials = with_sum(m.trials, "cpu", error="Unable to find address for: eth7", gb_s=0.0)


@ailment(("environment", "warning"), mend="unset CUDA_LAUNCH_BLOCKING")
def a_debugging_day(m: Any, d: Any) -> None:
    m.environment["CUDA_LAUNCH_BLOCKING"] = "1"


@ailment(("p2p-switched-off", "warning"), mend="unset NCCL_P2P_DISABLE")
def a_remedy_that_outlived_its_cause(m: Any, d: Any) -> None:
    m.environment["NCCL_P2P_DISABLE"] = "1"


@ailment(("shm-small", "warning"), mend="--ipc=host")
def docker_s_shared_memory(m: Any, d: Any) -> None:
    m.files[".dockerenv"] = ""
    m.files["proc/mounts"] = "shm /dev/shm tmpfs rw,nosuid,nodev,noexec,relatime,size=65536k 0 0\n"


@ailment(("shm-small", "failure"), ("allreduce-fails", "note"), mend="remount,size=8G")
def shared_memory_that_nccl_cannot_use(m: Any, d: Any) -> None:
    m.files["proc/mounts"] = "shm /dev/shm tmpfs rw,size=65536k 0 0\n"
    m.trials = with_sum(m.trials, "shm", error="No space left on device", gb_s=0.0)


@ailment(("memlock-low", "warning"), mend="limits.d")
def little_locked_memory(m: Any, d: Any) -> None:
    m.files["proc/self/limits"] = d.limits(memlock="65536")


@ailment(("memlock-low", "warning"), mend="--ulimit memlock=-1")
def little_locked_memory_in_a_container(m: Any, d: Any) -> None:
    m.files[".dockerenv"] = ""
    m.files["proc/self/limits"] = d.limits(memlock="65536")


@ailment(("nofile-low", "warning"), mend="ulimit -n 65536")
def few_open_files(m: Any, d: Any) -> None:
    m.files["proc/self/limits"] = d.limits(files="1024")


@ailment(("nofile-low", "warning"), mend="limits.d/91")
def few_open_files_for_good(m: Any, d: Any) -> None:
    m.files["proc/self/limits"] = d.limits(files="1024", files_hard="1024")


@ailment(("memory-capped", "warning"), mend="--memory=0")
def a_container_with_little_memory(m: Any, d: Any) -> None:
    m.files |= {".dockerenv": "", "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "68719476736\n"}


@ailment(("memory-low", "warning"), mend="sort=-rss")
def memory_that_others_use(m: Any, d: Any) -> None:
    m.files["proc/meminfo"] = "MemTotal: 131072000 kB\nMemAvailable: 8000000 kB\n"


@ailment(("cores-capped", "warning"), mend="--cpus=16")
def a_container_with_one_core(m: Any, d: Any) -> None:
    m.files |= {".dockerenv": "", "sys/fs/cgroup/cpu.max": "100000 100000\n"}


@ailment(("overcommit", "failure"), mend="vm.overcommit_memory=0")
def no_overcommit(m: Any, d: Any) -> None:
    m.files["proc/sys/vm/overcommit_memory"] = "2\n"


@ailment(("pids-low", "warning"), mend="--pids-limit=-1")
def few_processes(m: Any, d: Any) -> None:
    m.files |= {".dockerenv": "", "sys/fs/cgroup/pids.max": "100\n"}


@ailment(("governor", "note"), mend="performance")
def a_sleepy_cpu(m: Any, d: Any) -> None:
    m.files["sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"] = "powersave\n"


@ailment(("no-localhost", "failure"), mend="/etc/hosts")
def a_chroot_without_names(m: Any, d: Any) -> None:
    m.files["etc/hosts"] = "# 127.0.0.1 localhost\n"


@ailment(("disk-low", "warning"), mend="du -xh")
def a_full_disk(m: Any, d: Any) -> None:
    m.changes["disk_free"] = {"/data/runs": 6 * 10**9}


@ailment(("disk-low", "failure"))
def a_disk_full_to_the_brim(m: Any, d: Any) -> None:
    m.changes["disk_free"] = {"/data/runs": 10**8}


@ailment(("unwritable", "failure"), mend="sudo chown -R $(id -u):$(id -g) /data/runs")
def a_volume_of_somebody_else(m: Any, d: Any) -> None:
    m.changes["unwritable"] = ("/data/runs",)


@ailment(("library", "warning"), mend='"transformers<6,>=5.17"')
def another_library(m: Any, d: Any) -> None:
    m.changes |= {"wrong_versions": {"transformers": "<6,>=5.17"}, "versions": {"transformers": "4.40.0"}}


@ailment(("library", "failure"), mend="peft")
def a_library_that_is_missing(m: Any, d: Any) -> None:
    m.changes |= {"wrong_versions": {"peft": ">=0.19"}, "versions": {}}


@ailment(("no-bf16", "note"), mend="precision=fp32")
def an_older_card(m: Any, d: Any) -> None:
    m.cards = [d.card(n, CudaComputeCapability=(7, 5)) for n in (0, 1)]


@ailment(("unequal-cards", "note"), mend="plan")
def unequal_cards(m: Any, d: Any) -> None:
    m.cards[0]["Name"] = "NVIDIA GeForce RTX 4090"


@pytest.mark.parametrize("name", CASES)
def test_an_ailment_is_found_and_nothing_else(machine: Any, described: Any, name: str) -> None:
    change, expected, mend = CASES[name]
    change(machine, described)
    found = findings(machine.facts(), machine.trials)
    assert {(f.ailment, f.level) for f in found} == expected
    assert all(f.what and f.why and f.mend for f in found)
    assert mend in " | ".join(f.mend for f in found)


def test_the_healthy_machine_is_healthy(machine: Any) -> None:
    facts = machine.facts()
    assert [gpu.usable for gpu in facts.gpus] == [0, 1]
    assert facts.kernel_driver == facts.driver == "570.86.15"
    assert facts.p2p == {(0, 1): 0}
    assert findings(facts, machine.trials) == []
    assert unseen(facts, machine.trials) == []
    assert machine.trials.environment == {}


def test_at_least_twenty_ailments_are_described() -> None:
    assert len({name for _, expected, _ in CASES.values() for name, _ in expected}) >= 20


def test_failures_come_first(machine: Any, described: Any) -> None:
    machine.cards[0]["PersistenceMode"] = 0
    machine.files["proc/self/limits"] = described.limits(files="1024")
    machine.cards[1]["TotalEccErrors"] = 3
    assert [f.level for f in findings(machine.facts(), machine.trials)] == ["failure", "warning", "note"]


def test_the_environment_that_proved_fastest(machine: Any) -> None:
    slow = with_sum(with_sum(machine.trials, "default", gb_s=2.0), "p2p", gb_s=2.0)
    assert slow.environment == {"NCCL_P2P_DISABLE": "1"}
    assert with_sum(slow, "shm", wrong=True).environment == {}
    hung = with_sum(with_sum(machine.trials, "default", hung=True), "p2p", hung=True)
    assert hung.environment == {"NCCL_P2P_DISABLE": "1"}
    assert with_sum(hung, "shm", hung=True).environment == {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}


def test_what_cannot_be_looked_at_is_said(machine: Any) -> None:
    del machine.files["sys/bus/pci/devices/0000:00:01.0/config"]
    without_p2p(machine)
    told = {one.what: one.why for one in unseen(machine.facts(), machine.trials)}
    assert told["ACS of the PCIe bridges"].startswith("only root")
    assert told["direct copy between GPU 0 and GPU 1"] == "no peer access"


def test_nothing_readable_is_no_error(machine: Any) -> None:
    machine.files, machine.cards, machine.driver_error = {"etc/hosts": "::1 localhost"}, [], "no driver"
    machine.trials = Trials()
    facts = machine.facts()
    assert findings(facts, machine.trials) == []
    assert "no driver" in {one.why for one in unseen(facts, machine.trials)}


def test_acs_is_read_from_the_capability_list(described: Any) -> None:
    assert acs_control(described.pci_space(0x1D)) == 0x1D
    assert acs_control(bytes(4096)) == 0
    looped = bytearray(4096)
    looped[0x100:0x104] = (0x0001 | 0x100 << 20).to_bytes(4, "little")
    assert acs_control(bytes(looped)) == 0
