"""The host: memory, limits, disk, cores, libraries."""

from __future__ import annotations

from collections.abc import Iterator

from kitaeru.hardware import find_gpu
from kitaeru.i18n import tr
from kitaeru.machine.facts import Facts
from kitaeru.machine.findings import Finding
from kitaeru.machine.trials import Trials

_SHM_LEAST_BYTES = 1 << 30
_MEMLOCK_LEAST_BYTES = 64 << 20
_FILES_LEAST = 4096
_PIDS_LEAST = 1024
_DISK_LEAST_BYTES = 20 * 10**9


def small_shared_memory(facts: Facts, trials: Trials) -> Iterator[Finding]:
    """Docker's 64 MB of /dev/shm (nccl 290, torchtitan 853)."""
    size, free = facts.shm_bytes, facts.shm_free_bytes
    if size is None or min(size, free if free is not None else size) >= _SHM_LEAST_BYTES:
        return
    if size >= _SHM_LEAST_BYTES:
        what = tr("/dev/shm has {free:.0f} MB free of {size:.0f} MB.", free=(free or 0) / 1e6, size=size / 1e6)
        mend = "ls -lS /dev/shm | head"
    else:
        what = tr("/dev/shm has only {size:.0f} MB.", size=size / 1e6)
        mend = "docker run --ipc=host …   # docker run --shm-size=8g …" if facts.contained else ""
        mend = mend or "sudo mount -o remount,size=8G /dev/shm"
    proved = any(tried.transport == "shm" and tried.good for tried in trials.sums)
    yield Finding(
        "shm-small",
        "failure" if len(facts.usable) > 1 and not proved else "warning",
        what,
        tr(
            "Processes of a run hand data to each other there; without room they end with a bus error or an NCCL error."
        ),
        mend,
    )


def small_memlock(facts: Facts, _: Trials) -> Iterator[Finding]:
    """Too little memory may be pinned."""
    limit = facts.limits.memlock_bytes
    # A CPU run locks nothing to speak of.
    least = _MEMLOCK_LEAST_BYTES if facts.gpus else 1 << 20
    if limit is not None and limit < least:
        yield Finding(
            "memlock-low",
            "warning" if facts.gpus else "note",
            tr("A process may lock only {size:.0f} MB of memory (memlock).", size=limit / 1e6),
            tr("NCCL and copies that overlap with computing want locked memory; InfiniBand fails without it."),
            "docker run --ulimit memlock=-1 …"
            if facts.contained
            else "echo '* - memlock unlimited' | sudo tee /etc/security/limits.d/90-kitaeru.conf   # "
            + tr("then log in again"),
        )


def few_files(facts: Facts, _: Trials) -> Iterator[Finding]:
    """Too few files may be open."""
    files, hard = facts.limits.files, facts.limits.files_hard
    if files is None or files >= _FILES_LEAST:
        return
    if hard is None or hard >= _FILES_LEAST:
        mend = f"ulimit -n {min(hard or 65536, 65536)}"
    elif facts.contained:
        mend = "docker run --ulimit nofile=65536:65536 …"
    else:
        mend = "echo '* - nofile 65536' | sudo tee /etc/security/limits.d/91-kitaeru.conf"
    yield Finding(
        "nofile-low",
        "warning",
        tr("A process may have only {count} files open.", count=files),
        tr("Data sets of many files, and many processes, need more: “too many open files”."),
        mend,
    )


def memory_capped(facts: Facts, _: Trials) -> Iterator[Finding]:
    """A cgroup that leaves much less than the machine has."""
    if facts.machine_bytes and 0 < facts.host_bytes < 0.75 * facts.machine_bytes:
        yield Finding(
            "memory-capped",
            "warning",
            tr(
                "This process may use {limit:.0f} GB of the machine's {all:.0f} GB of RAM.",
                limit=facts.host_bytes / 1e9,
                all=facts.machine_bytes / 1e9,
            ),
            tr("A model is read through RAM, and offloading lives there; beyond the limit the kernel kills the run."),
            "docker run --memory=0 …" if facts.contained else "systemd-run --scope -p MemoryMax=infinity kitaeru …",
        )


def little_memory(facts: Facts, _: Trials) -> Iterator[Finding]:
    """Less RAM than one card has memory."""
    largest = max((gpu.memory_bytes for gpu in facts.usable), default=0)
    if largest and facts.host_free_bytes and facts.host_free_bytes < largest / 2:
        yield Finding(
            "memory-low",
            "warning",
            tr(
                "{free:.0f} GB of RAM are free; the largest card has {card:.0f} GB.",
                free=facts.host_free_bytes / 1e9,
                card=largest / 1e9,
            ),
            tr("Models that fit the card may not fit on their way to it."),
            "ps -eo pid,rss,comm --sort=-rss | head",
        )


def few_cores(facts: Facts, _: Trials) -> Iterator[Finding]:
    """A CPU quota or affinity that leaves fewer cores than processes will run."""
    wanted = max(2, 2 * len(facts.usable))
    if facts.cores < min(wanted, facts.machine_cores):
        yield Finding(
            "cores-capped",
            "warning",
            tr("This process may use {count} of {all} cores.", count=facts.cores, all=facts.machine_cores),
            tr("Each GPU wants a core that feeds it and one that prepares data."),
            f"docker run --cpus={facts.machine_cores} …"
            if facts.contained
            else "taskset -c 0-$(($(nproc --all)-1)) kitaeru train …",
        )


def strict_overcommit(facts: Facts, _: Trials) -> Iterator[Finding]:
    """Memory that CUDA only reserves counts as used."""
    if facts.overcommit == 2:
        yield Finding(
            "overcommit",
            "failure" if facts.gpus else "warning",
            tr("The kernel refuses to promise more memory than there is (vm.overcommit_memory=2)."),
            tr("CUDA reserves address space far beyond the RAM, and processes that fork are refused."),
            "sudo sysctl vm.overcommit_memory=0",
        )


def few_processes(facts: Facts, _: Trials) -> Iterator[Finding]:
    """Too few threads for several processes of torch."""
    most = min((n for n in (facts.pids_most, facts.limits.processes) if n is not None), default=None)
    if most is not None and most < _PIDS_LEAST:
        yield Finding(
            "pids-low",
            "warning",
            tr("Only {count} processes and threads may run.", count=most),
            tr("Each process of a run starts dozens of threads: “resource temporarily unavailable”."),
            "docker run --pids-limit=-1 …" if facts.contained else "ulimit -u unlimited",
        )


def sleepy_cpu(facts: Facts, _: Trials) -> Iterator[Finding]:
    """A CPU kept at a low clock delays every kernel launch."""
    if facts.gpus and facts.governor == "powersave":
        yield Finding(
            "governor",
            "note",
            tr("The CPU's clock is kept low (governor: powersave)."),
            tr("Small models wait for the CPU that starts their kernels; on recent Intel CPUs it makes no difference."),
            "sudo cpupower frequency-set -g performance",
        )


def no_localhost(facts: Facts, _: Trials) -> Iterator[Finding]:
    """A container or chroot without /etc/hosts."""
    if not facts.localhost:
        yield Finding(
            "no-localhost",
            "failure",
            tr("The name localhost leads nowhere."),
            tr("The processes of a run on one machine find each other under it."),
            "echo '127.0.0.1 localhost' | sudo tee -a /etc/hosts",
        )


def little_disk(facts: Facts, _: Trials) -> Iterator[Finding]:
    """No room for a model or a checkpoint."""
    for folder, free in facts.disk_free.items():
        if free < _DISK_LEAST_BYTES:
            yield Finding(
                "disk-low",
                "failure" if free < 10**9 else "warning",
                tr("{folder}: {free:.1f} GB free.", folder=folder, free=free / 1e9),
                tr("An 8B model takes 16 GB, and each checkpoint of full training three times the model."),
                f"du -xh --max-depth=2 {folder} | sort -h | tail",
            )


def unwritable_folders(facts: Facts, _: Trials) -> Iterator[Finding]:
    """A volume that belongs to somebody else."""
    for folder in facts.unwritable:
        yield Finding(
            "unwritable",
            "failure",
            tr("{folder} cannot be written to.", folder=folder),
            tr("Runs, models and caches go there."),
            f"sudo chown -R $(id -u):$(id -g) {folder}",
        )


def wrong_libraries(facts: Facts, _: Trials) -> Iterator[Finding]:
    """Libraries outside of what this version of kitaeru is made for."""
    for name, wanted in facts.wrong_versions.items():
        have = facts.versions.get(name)
        what = tr("{name} {version} is installed; kitaeru needs {wanted}.", name=name, version=have, wanted=wanted)
        if have is None:
            what = tr("{name} is not installed; kitaeru needs {wanted}.", name=name, wanted=wanted)
        yield Finding(
            "library",
            "failure" if have is None else "warning",
            what,
            tr("Other versions have other names and other bugs; it is not tested with them."),
            f'python -m pip install "{name}{wanted}"',
        )


def slow_bf16(facts: Facts, _: Trials) -> Iterator[Finding]:
    """Cards from before 2020 have no bfloat16."""
    for gpu in facts.usable:
        if gpu.sm[0] and gpu.sm < (8, 0):
            yield Finding(
                "no-bf16",
                "note",
                tr("{gpu} has no bfloat16 (compute capability {sm}).", gpu=gpu.title, sm=".".join(map(str, gpu.sm))),
                tr("kitaeru trains in fp16 with a loss scaler on it; models stored in bf16 may overflow."),
                "kitaeru train recipe.yaml --set train.precision=fp32",
            )


def unequal_cards(facts: Facts, _: Trials) -> Iterator[Finding]:
    """Cards of different speed: the slower one sets the pace."""
    usable = facts.usable
    rates = [known.bf16_tflops for gpu in usable if (known := find_gpu(gpu.name, gpu.memory_bytes)) is not None]
    if len(rates) == len(usable) > 1 and min(rates) < 0.7 * max(rates):
        yield Finding(
            "unequal-cards",
            "note",
            tr("The cards differ: {names}.", names=", ".join(gpu.title for gpu in usable)),
            tr("With data parallelism the fast one waits for the slow one in every step."),
            "kitaeru plan MODEL",
        )
