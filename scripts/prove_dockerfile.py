"""Carry out the Dockerfile without Docker: each stage a root file system of its own, each RUN in a chroot.

    sudo python3 scripts/prove_dockerfile.py --target cpu --work /var/tmp/proof -- doctor --train

It starts from `debootstrap` (which must be installed), runs every instruction up to the target as the builder would,
then the health check and `kitaeru` with the words after `--`, as the image's user, with a /dev/shm of its own.
`--lend PATH` shows a file or folder of the host inside while it builds (package indexes, certificates), `--env NAME`
passes a variable on. Only what this Dockerfile uses is understood; anything else is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Stage:
    """What an image is: its files, and what instructions have set."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "0:0"
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    health: list[str] = field(default_factory=list)
    entry: list[str] = field(default_factory=list)


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Each instruction with its arguments; comments left out, continued lines joined."""
    lines = [line for line in text.splitlines() if not re.match(r"\s*#", line)]
    joined = re.sub(r"\\\n", "", "\n".join(lines))
    for line in joined.splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield name.upper(), rest.strip()


def filled(text: str, values: dict[str, str]) -> str:
    """`text` with $NAME and ${NAME} replaced, as Docker does outside of RUN."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda m: values.get(m[1] or m[2], ""), text)


def staged(text: str) -> tuple[list[str], dict[str, list[tuple[str, str]]]]:
    """The arguments before the first stage, and the instructions of each stage by its name."""
    first: list[str] = []
    stages: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for instruction, rest in instructions(text):
        if instruction == "FROM":
            name = rest.partition(" AS ")[2]
            stages[name] = []
        if name:
            stages[name].append((instruction, rest))
        else:
            first.append(rest)
    return first, stages


def needed(stages: dict[str, list[tuple[str, str]]], target: str) -> list[str]:
    """The stages that `target` is made of, in the order of the file."""
    if target not in stages:
        raise SystemExit(f"there is no stage {target}")
    found, new = set(), {target}
    while new:
        found |= new
        text = " ".join(rest for name in new for _, rest in stages[name])
        bases = {stages[name][0][1].partition(" AS ")[0] for name in new}
        new = ({*re.findall(r"from=(\w+)", text), *bases} & set(stages)) - found
    return [name for name in stages if name in found]


class Builder:
    """Carries out instructions; one stage after the other in `work`."""

    def __init__(
        self, work: Path, lent: list[Path], passed: dict[str, str], given: dict[str, str], kept: list[str]
    ) -> None:
        self.work, self.lent, self.passed, self.given, self.kept = work, lent, passed, given, kept
        self.stages: dict[str, Stage] = {}
        self.outer: dict[str, str] = {}

    def build(self, text: str, target: str) -> Stage:
        """The stages that `target` is made of, and itself."""
        first, stages = staged(text)
        for rest in first:
            self.outer |= self.argument(rest)
        for name in needed(stages, target):
            kept = name in self.kept and (self.work / name).is_dir()
            stage = self.begin(stages[name][0][1], name, kept)
            for instruction, rest in stages[name][1:]:
                if not kept or instruction not in ("RUN", "COPY"):
                    self.carry_out(stage, instruction, rest)
        return self.stages[target]

    def argument(self, rest: str) -> dict[str, str]:
        key, _, default = rest.partition("=")
        return {key: self.given.get(key, default.strip('"'))}

    def begin(self, rest: str, name: str, kept: bool) -> Stage:
        base = filled(rest, self.outer).partition(" AS ")[0]
        root = self.work / name
        say(f"FROM {base} AS {name}" + (" (kept)" if kept else ""))
        if not kept:
            shutil.rmtree(root, ignore_errors=True)
        if base in self.stages:
            parent = self.stages[base]
            if not kept:
                subprocess.run(["cp", "-a", "--reflink=auto", parent.root, root], check=True)
            stage = replace(parent, root=root, environment=dict(parent.environment), arguments={})
        elif base.startswith("debian:"):
            suite = {"12": "bookworm", "13": "trixie"}[base.removeprefix("debian:")[:2]]
            if not kept:
                words = ["debootstrap", "--variant=minbase", suite, str(root)]
                subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            stage = Stage(root, {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"})
        else:
            raise SystemExit(f"no base image {base} here")
        self.stages[name] = stage
        return stage

    def carry_out(self, stage: Stage, instruction: str, rest: str) -> None:
        say(" ".join((instruction, *rest.split()))[:160])
        match instruction:
            case "ARG":
                stage.arguments |= self.argument(rest)
            case "ENV":
                for word in shlex.split(filled(rest, stage.environment | stage.arguments)):
                    key, _, value = word.partition("=")
                    stage.environment[key] = value
            case "WORKDIR":
                stage.folder = rest
                (stage.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "SHELL":
                stage.shell = json.loads(rest)
            case "USER":
                stage.user = rest
            case "ENTRYPOINT":
                stage.entry = json.loads(rest)
            case "CMD":
                pass
            case "HEALTHCHECK":
                stage.health = json.loads(rest[rest.index("[") :])
            case "COPY":
                self.copy(stage, shlex.split(rest))
            case "RUN":
                self.run(stage, rest)
            case _:
                raise SystemExit(f"{instruction} is not understood")

    def copy(self, stage: Stage, words: list[str]) -> None:
        source = ROOT
        if words[0].startswith("--from="):
            source = self.stages[words.pop(0).removeprefix("--from=")].root
        *given, to = words
        target = stage.root / str(Path(stage.folder) / to).lstrip("/")
        for one in given:
            if source == ROOT and not sent(one):
                raise SystemExit(f".dockerignore keeps {one} from the builder")
            path = source / one.lstrip("/")
            # Of a folder Docker copies what is in it.
            inner = f"{path}/." if path.is_dir() else str(path)
            place = target / path.name if path.is_file() and to.endswith("/") else target
            (place if path.is_dir() else place.parent).mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-a", inner, place], check=True)
            for ignored in ("__pycache__", "*.egg-info"):
                for found in list(target.rglob(ignored)) if source == ROOT and path.is_dir() else []:
                    shutil.rmtree(found)
        if source == ROOT:
            subprocess.run(["chown", "-R", "0:0", target], check=True)

    def run(self, stage: Stage, rest: str) -> None:
        bound: list[tuple[Path, str]] = []
        while rest.startswith("--mount="):
            option, _, rest = rest.partition(" ")
            words = dict(pair.split("=") for pair in option.removeprefix("--mount=").split(","))
            if words.pop("type") != "bind":
                raise SystemExit("only bind mounts are understood")
            bound.append((self.stages[words["from"]].root / words["source"].lstrip("/"), words["target"]))
            rest = rest.lstrip()
        inside(stage, [*stage.shell, rest], bound=bound, lent=self.lent, more=self.passed | stage.arguments)


def sent(name: str) -> bool:
    """Whether .dockerignore lets a file or folder of the top level through; the last pattern that matches counts."""
    sends = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#") and fnmatch(name, line.lstrip("!")):
            sends = line.startswith("!")
    return sends


def inside(
    stage: Stage,
    words: list[str],
    *,
    bound: list[tuple[Path, str]] | None = None,
    lent: list[Path] | None = None,
    more: dict[str, str] | None = None,
    user: str | None = None,
    shm: str = "1g",
) -> int:
    """Run words in the stage's root, in mount and process namespaces of their own. Returns the exit code if `user`."""
    at = shlex.quote(str(stage.root))
    lines = ["set -e", f"mount -t proc proc {at}/proc", f"mount --rbind /sys {at}/sys", f"mount --rbind /dev {at}/dev"]
    lines += [f"mkdir -p {at}/dev/shm", f"mount -t tmpfs -o size={shm} shm {at}/dev/shm"]
    # Docker, too, gives a container these two.
    places = [(path, str(path)) for path in [Path("/etc/resolv.conf"), Path("/etc/hosts"), *(lent or [])]]
    for source, target in [*places, *(bound or [])]:
        place = shlex.quote(f"{stage.root}{target}")
        make = f"mkdir -p {place}" if source.is_dir() else f"mkdir -p $(dirname {place}) && touch {place}"
        lines += [
            make,
            f"mount --bind {shlex.quote(str(source.resolve()))} {place}",
            f"mount -o remount,bind,ro {place}",
        ]
    environment = stage.environment | (more or {})
    start = ["env", "-i", *(f"{k}={v}" for k, v in environment.items())]
    folder = ["sh", "-c", 'cd "$0" && exec "$@"', stage.folder, *words]
    change = ["chroot", f"--userspec={user or stage.user}", str(stage.root)]
    lines.append("exec " + shlex.join([*start, *change, *folder]))
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", "\n".join(lines)], check=False
    )
    if done.returncode and user is None:
        raise SystemExit(f"exit code {done.returncode}")
    return done.returncode


def say(line: str) -> None:
    """A line with the time, above what the commands print."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def main() -> int:
    """Build, then check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--lend", type=Path, action="append", default=[])
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--build-arg", action="append", default=[])
    parser.add_argument("--keep", action="append", default=[], help="a stage whose files are there from last time")
    parser.add_argument("--shm", default="1g", help="size of /dev/shm when kitaeru runs")
    parser.add_argument("words", nargs="*")
    given = parser.parse_args()
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        print("It takes root and debootstrap.", file=sys.stderr)
        return 2
    passed = {name: os.environ[name] for name in given.env if name in os.environ}
    arguments = dict(pair.split("=", 1) for pair in given.build_arg)
    given.work.mkdir(parents=True, exist_ok=True)
    builder = Builder(given.work, given.lend, passed, arguments, given.keep)
    stage = builder.build((ROOT / "Dockerfile").read_text(encoding="utf-8"), given.target)
    code = 0
    for title, words in (("HEALTHCHECK", stage.health), ("ENTRYPOINT", [*stage.entry, *given.words])):
        say(f"{title} {shlex.join(words)} (as {stage.user})")
        ended = inside(stage, words, user=stage.user, shm=given.shm)
        say(f"exit code {ended}")
        code = code or ended
    return code


if __name__ == "__main__":
    sys.exit(main())
