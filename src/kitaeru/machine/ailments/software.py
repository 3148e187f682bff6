"""The driver, torch, and which cards this process may use."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kitaeru.i18n import tr
from kitaeru.machine.facts import Facts
from kitaeru.machine.findings import DOCKER_RUN, Finding
from kitaeru.machine.trials import Trials

_GIB = 1 << 30
_BUSY_BYTES = 500 << 20


def driver_missing(facts: Facts, _: Trials) -> Iterator[Finding]:
    """A card on the bus and nobody who drives it."""
    if not facts.cards_on_bus or not facts.driver_error or facts.gpus or "mismatch" in facts.driver_error.lower():
        return
    if facts.contained:
        yield Finding(
            "container-without-gpus",
            "failure",
            tr(
                "This container does not see the {count} NVIDIA card(s) of the machine ({reason}).",
                count=facts.cards_on_bus,
                reason=facts.driver_error,
            ),
            tr("Containers see a GPU only when they are started with it."),
            DOCKER_RUN,
        )
        return
    yield Finding(
        "driver-missing",
        "failure",
        tr(
            "{count} NVIDIA card(s) and no working driver ({reason}).",
            count=facts.cards_on_bus,
            reason=facts.driver_error,
        ),
        tr("Without its driver a card cannot be used."),
        "sudo apt-get install nvidia-driver && sudo reboot",
    )


def driver_mismatch(facts: Facts, _: Trials) -> Iterator[Finding]:
    """The driver was updated and its old kernel module is still loaded."""
    if "mismatch" in facts.driver_error.lower():
        yield Finding(
            "driver-mismatch",
            "failure",
            tr(
                "The driver's library and its kernel module ({version}) are of different versions.",
                version=facts.kernel_driver or "?",
            ),
            tr("It was updated while it was in use; no program can use a GPU until the new module is loaded."),
            "sudo reboot",
        )


def nouveau_loaded(facts: Facts, _: Trials) -> Iterator[Finding]:
    """The free driver holds the cards, and NVIDIA's cannot."""
    if facts.nouveau and facts.cards_on_bus:
        yield Finding(
            "nouveau",
            "failure",
            tr("The nouveau driver is loaded."),
            tr("It keeps NVIDIA's driver from the card, and has no CUDA."),
            "echo -e 'blacklist nouveau\\noptions nouveau modeset=0' | sudo tee /etc/modprobe.d/no-nouveau.conf"
            " && sudo update-initramfs -u && sudo reboot",
        )


def card_lost(facts: Facts, _: Trials) -> Iterator[Finding]:
    """More cards on the bus than the driver answers for: one has fallen off (Xid 79) or did not start."""
    if facts.gpus and not facts.contained and facts.cards_on_bus > len(facts.gpus):
        yield Finding(
            "card-lost",
            "failure",
            tr(
                "{bus} NVIDIA cards are on the bus, and the driver answers for {count}.",
                bus=facts.cards_on_bus,
                count=len(facts.gpus),
            ),
            tr(
                "A card has fallen off the bus or failed to start: heat, power, or a riser cable. The kernel says "
                "which."
            ),
            "sudo dmesg | grep -iE 'xid|nvrm' ; sudo reboot",
        )


def cards_hidden(facts: Facts, _: Trials) -> Iterator[Finding]:
    """CUDA_VISIBLE_DEVICES leaves cards out."""
    hidden = [gpu for gpu in facts.gpus if gpu.usable is None]
    if not hidden or "CUDA_VISIBLE_DEVICES" not in facts.environment:
        return
    every = len(hidden) == len(facts.gpus)
    yield Finding(
        "cards-hidden",
        "failure" if every else "warning",
        tr(
            "CUDA_VISIBLE_DEVICES={value} hides {names}.",
            value=facts.environment["CUDA_VISIBLE_DEVICES"] or '""',
            names=", ".join(gpu.title for gpu in hidden),
        ),
        tr("No GPU is left to train on.") if every else tr("Only the others are used."),
        "unset CUDA_VISIBLE_DEVICES",
    )


def torch_broken(facts: Facts, trials: Trials) -> Iterator[Finding]:
    """torch does not import."""
    if trials.error:
        yield Finding(
            "torch-broken",
            "failure",
            tr("torch cannot be loaded: {reason}", reason=trials.error),
            tr("Everything that trains needs it."),
            "python -m pip install --force-reinstall torch",
        )


def torch_without_cuda(facts: Facts, trials: Trials) -> Iterator[Finding]:
    """A CPU build of torch beside a GPU."""
    torch = facts.torch
    if facts.gpus and torch is not None and torch.version and not torch.cuda:
        yield Finding(
            "torch-without-cuda",
            "failure",
            tr("torch {version} was built without CUDA.", version=torch.version),
            tr("The GPUs would stand idle, and training would run on the CPU."),
            "python -m pip install --force-reinstall torch",
        )


def _too_new(facts: Facts) -> bool:
    torch = facts.torch
    if torch is None or not torch.cuda or not facts.driver_cuda[0]:
        return False
    return int(torch.cuda.split(".")[0]) > facts.driver_cuda[0]


def torch_newer_than_driver(facts: Facts, _: Trials) -> Iterator[Finding]:
    """A driver runs CUDA programs up to its own major version."""
    torch = facts.torch
    if torch is not None and _too_new(facts):
        have = ".".join(str(n) for n in facts.driver_cuda)
        yield Finding(
            "torch-newer-than-driver",
            "failure",
            tr(
                "torch was built for CUDA {torch}; the driver {driver} runs up to CUDA {have}.",
                torch=torch.cuda,
                driver=facts.driver,
                have=have,
            ),
            tr("CUDA does not start with an older driver."),
            "sudo apt-get install --only-upgrade nvidia-driver && sudo reboot",
        )


def torch_without_kernels(facts: Facts, _: Trials) -> Iterator[Finding]:
    """A card older, or much newer, than what this torch was compiled for. Within a major version code runs upwards."""
    torch = facts.torch
    if torch is None or not torch.architectures:
        return
    built = [(int(a[3:-1]), int(a[-1])) for a in torch.architectures if re.fullmatch(r"sm_\d{2,}", a)]
    portable = [(int(a[8:-1]), int(a[-1])) for a in torch.architectures if re.fullmatch(r"compute_\d{2,}", a)]
    for gpu in facts.usable:
        runs = any(major == gpu.sm[0] and minor <= gpu.sm[1] for major, minor in built)
        if gpu.sm[0] and built and not runs and not any(sm <= gpu.sm for sm in portable):
            yield Finding(
                "torch-without-kernels",
                "failure",
                tr(
                    "torch {version} has no code for {gpu} (compute capability {sm}).",
                    version=torch.version,
                    gpu=gpu.title,
                    sm=".".join(str(n) for n in gpu.sm),
                ),
                tr("Its first operation on this card fails: no kernel image is available."),
                "python -m pip install --upgrade torch" if gpu.sm > max(built) else 'pip install "torch==2.7.*"',
            )


def cuda_does_not_start(facts: Facts, _: Trials) -> Iterator[Finding]:
    """The driver answers and CUDA does not."""
    torch = facts.torch
    usable = facts.usable
    if torch is None or not torch.cuda or not usable or torch.devices == len(usable) or _too_new(facts):
        return
    what = tr(
        "The driver offers {count} GPU(s), and torch can use {usable}: {reason}",
        count=len(usable),
        usable=torch.devices,
        reason=torch.error or "—",
    )
    capabilities = facts.environment.get("NVIDIA_DRIVER_CAPABILITIES", "")
    if capabilities and not {"compute", "all"} & set(capabilities.split(",")):
        why = tr("NVIDIA_DRIVER_CAPABILITIES={value} lets only part of the driver in.", value=capabilities)
        mend = "docker run -e NVIDIA_DRIVER_CAPABILITIES=compute,utility …"
        yield Finding("driver-capabilities", "failure", what, why, mend)
    elif "nvidia-uvm" not in facts.device_files:
        why = tr("The device /dev/nvidia-uvm is missing: CUDA needs it, nvidia-smi does not.")
        yield Finding("uvm-missing", "failure", what, why, "sudo nvidia-modprobe -u -c=0")
    elif any(gpu.fabric in (1, 2) for gpu in usable):
        why = tr("These cards are joined by NVSwitch, and its fabric manager has not brought them up.")
        yield Finding("fabric-manager", "failure", what, why, "sudo systemctl enable --now nvidia-fabricmanager")
    else:
        why = tr("Training cannot start on the cards that CUDA does not open.")
        yield Finding("cuda-does-not-start", "failure", what, why, "nvidia-smi ; sudo dmesg | grep -iE 'xid|nvrm'")


def exclusive_mode(facts: Facts, _: Trials) -> Iterator[Finding]:
    """A card that lets in one process, or none."""
    for gpu in facts.usable:
        if gpu.compute_mode in (2, 3):
            none = gpu.compute_mode == 2
            yield Finding(
                "compute-mode",
                "failure" if none else "warning",
                tr("{gpu} is in compute mode {mode}.", gpu=gpu.title, mode="prohibited" if none else "exclusive"),
                tr("No program may compute on it.")
                if none
                else tr("A second process on it, such as a chat beside a training, is refused."),
                f"sudo nvidia-smi -i {gpu.index} -c DEFAULT",
            )


def mig_on(facts: Facts, _: Trials) -> Iterator[Finding]:
    """A card cut into instances, which NCCL does not join."""
    for gpu in facts.usable:
        if gpu.mig:
            yield Finding(
                "mig",
                "warning",
                tr("{gpu} is cut into MIG instances.", gpu=gpu.title),
                tr("A process sees one instance with part of the memory, and NCCL does not join instances."),
                f"sudo nvidia-smi -i {gpu.index} -mig 0",
            )


def cards_in_use(facts: Facts, _: Trials) -> Iterator[Finding]:
    """Others hold memory that the plan would count on."""
    for gpu in facts.usable:
        holders = [process for process in gpu.processes if process.bytes >= _BUSY_BYTES]
        if holders:
            names = ", ".join(f"{p.name or '?'} ({p.pid}): {p.bytes / _GIB:.1f} GiB" for p in holders)
            yield Finding(
                "card-in-use",
                "warning",
                tr("{gpu} is used by {names}.", gpu=gpu.title, names=names),
                tr("That memory is missing for training, and the two slow each other down."),
                f"nvidia-smi -i {gpu.index} ; kill {holders[0].pid}",
            )
