import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from torch import nn

from kitaeru.engine.checkpoint import (
    available,
    begin,
    load,
    newest_good,
    prune,
    save,
    size_bytes,
    verify,
    write_part,
)
from kitaeru.engine.checkpoint_lock import exclusive
from kitaeru.errors import CheckpointError

META = {"step": 120, "sampler": {"epoch": 1, "order": [3, 1, 2]}, "best": None, "losses": [1.25, 0.1], "文": "日本語"}


def tensors_of(value, size=1000):
    return {"model/w": torch.full((size,), float(value)), "rng/torch": torch.arange(16, dtype=torch.uint8)}


def nothing_damaged(path, reason):
    raise AssertionError(f"{path}: {reason}")


def hidden(folder):
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(".") and entry.name != ".lock"]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


def test_everything_comes_back_bit_for_bit(folder):
    base = torch.randn(6, 4)
    tensors = {
        "model/a.b": nn.Parameter(base),
        "model/turned": base.t(),
        "model/part": base[2:4],
        "optimizer/a.b/exp_avg": torch.randn(5, 3).bfloat16(),
        "optimizer/a.b/state1": torch.randint(0, 256, (7,), dtype=torch.uint8),
        "optimizer/a.b/step": torch.tensor(3.0),
        "model/odd": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "model/none": torch.empty(0, 3),
        "rng/flags": torch.tensor([True, False]),
        "rng/count": torch.tensor([2**62]),
    }
    path = save(folder, 120, tensors, META)
    assert path == folder / "step-00000120"
    loaded, meta = load(path)
    assert meta == META
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        back = loaded[name]
        assert (back.dtype, back.shape, back.device.type) == (tensor.dtype, tensor.shape, "cpu")
        original = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(back.reshape(-1).view(torch.uint8), original), name


def test_a_checkpoint_is_three_files_and_the_manifest_tells_their_hashes(folder):
    path = save(folder, 7, tensors_of(1), META)
    assert sorted(f.name for f in path.iterdir()) == ["manifest.json", "state.json", "state.safetensors"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 7
    for name in ("state.json", "state.safetensors"):
        content = (path / name).read_bytes()
        assert manifest["files"][name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert size_bytes(path) == sum(f.stat().st_size for f in path.iterdir())
    assert hidden(folder) == []


def test_meta_that_is_not_json_is_refused_and_nothing_is_left(folder):
    with pytest.raises(TypeError):
        save(folder, 1, tensors_of(1), {"x": object()})
    assert available(folder) == []


def test_the_same_step_is_replaced(folder):
    save(folder, 5, tensors_of(1), META)
    path = save(folder, 5, tensors_of(2), {"step": 5})
    tensors, meta = load(path)
    assert meta == {"step": 5}
    assert torch.equal(tensors["model/w"], tensors_of(2)["model/w"])
    assert (available(folder), hidden(folder)) == ([path], [])


def test_available_is_sorted_by_step_and_ignores_everything_else(folder):
    assert available(folder) == []
    for step in (20, 3, 123456789):
        save(folder, step, tensors_of(step), META)
    (folder / "step-00000004").touch()
    (folder / "step-5").mkdir()
    (folder / ".step-00000006.writing").mkdir()
    assert [p.name for p in available(folder)] == ["step-00000003", "step-00000020", "step-123456789"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": (lambda p: os.truncate(p / "state.safetensors", 100), "state.safetensors has 100 bytes instead of"),
    "flipped": (lambda p: flip(p / "state.safetensors"), "content of state.safetensors has changed"),
    "edited": (lambda p: flip(p / "state.json"), "content of state.json has changed"),
    "no tensors": (lambda p: (p / "state.safetensors").unlink(), "state.safetensors is missing"),
    "no meta": (lambda p: (p / "state.json").unlink(), "state.json is missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "empty manifest": (lambda p: (p / "manifest.json").write_text(""), "manifest.json cannot be read"),
    "other manifest": (lambda p: (p / "manifest.json").write_text("[1]"), "manifest.json cannot be read"),
    "half manifest": (lambda p: (p / "manifest.json").write_text('{"step": 30}'), "manifest.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_previous_good_one_is_taken(folder, damage):
    for step in (10, 20, 30):
        save(folder, step, tensors_of(step), META)
    newest = folder / "step-00000030"
    assert verify(newest) is None
    hurt, expected = DAMAGES[damage]
    hurt(newest)
    assert expected in verify(newest)
    with pytest.raises(CheckpointError, match="cannot be used"):
        load(newest)
    seen = []
    assert newest_good(folder, damaged=lambda path, reason: seen.append((path, reason))) == folder / "step-00000020"
    assert [path for path, _ in seen] == [newest]
    assert expected in seen[0][1]


def test_a_checkpoint_under_another_steps_name_is_damaged(folder):
    save(folder, 10, tensors_of(1), META).rename(folder / "step-00000011")
    assert "step 10" in verify(folder / "step-00000011")


def test_nothing_good_is_none(folder):
    assert newest_good(folder, damaged=nothing_damaged) is None
    flip(save(folder, 10, tensors_of(1), META) / "state.json")
    seen = []
    assert newest_good(folder, damaged=lambda path, reason: seen.append(path.name)) is None
    assert seen == ["step-00000010"]


def test_a_damaged_one_never_pushes_a_good_one_out(folder):
    save(folder, 10, tensors_of(1), META)
    flip(save(folder, 30, tensors_of(1), META) / "state.json")
    newest_good(folder, damaged=lambda path, reason: None)
    prune(folder, 1)
    assert (folder / "step-00000030.damaged").is_dir()  # kept to be looked at
    save(folder, 20, tensors_of(1), META)
    prune(folder, 1)
    assert [p.name for p in available(folder)] == ["step-00000020"]
    save(folder, 30, tensors_of(1), META)
    prune(folder, 2)
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-00000020", "step-00000030"]


def test_prune_keeps_the_newest_and_the_protected(folder):
    for step in (10, 20, 30, 40, 50):
        save(folder, step, tensors_of(step), META)
    prune(folder, 2, protect={20})
    assert [p.name for p in available(folder)] == ["step-00000020", "step-00000040", "step-00000050"]
    assert hidden(folder) == []
    prune(folder, 9)
    assert len(available(folder)) == 3
    with pytest.raises(ValueError, match="at least one"):
        prune(folder, 0)


def run_killed_at(operation, action):
    """Run `action` in a forked child that is killed with SIGKILL right before its n-th file-system operation.

    Returns True when the child was killed, False when it had finished first.
    """
    child = os.fork()
    if child == 0:
        try:
            count = 0

            def hook(event, _):
                nonlocal count
                if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate"):
                    count += 1
                    if count == operation:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_a_kill_before_any_file_operation_loses_nothing(folder):
    def replace_and_prune():
        save(folder, 20, tensors_of(2), {"value": 2})
        prune(folder, 1)

    operation, outcomes = 1, []
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        save(folder, 10, tensors_of(0), {"value": 0})
        save(folder, 20, tensors_of(1), {"value": 1})
        killed = run_killed_at(operation, replace_and_prune)
        newest = newest_good(folder, damaged=nothing_damaged)
        assert newest == folder / "step-00000020"
        tensors, meta = load(newest)
        assert meta["value"] in (1, 2)
        assert torch.equal(tensors["model/w"], tensors_of(meta["value"])["model/w"])
        assert all(verify(path) is None for path in available(folder))
        assert hidden(folder) == []
        outcomes.append(meta["value"])
        if not killed:
            break
        operation += 1
    assert operation > 20  # the kills did land inside
    assert outcomes == sorted(outcomes)  # the old one up to some moment, the new one from then on
    assert {1, 2} == set(outcomes)


def test_what_a_killed_writer_left_is_gone_at_the_next_save(folder):
    save(folder, 10, tensors_of(0), META)

    def crawl():
        save(folder, 20, tensors_of(1), META)

    operation = 1
    while not (folder / ".step-00000020.writing" / "state.safetensors").exists():
        assert run_killed_at(operation, crawl)
        operation += 1
    save(folder, 30, tensors_of(2), META)
    assert hidden(folder) == []
    assert [p.name for p in available(folder)] == ["step-00000010", "step-00000030"]


def test_a_full_disk_is_seen_before_writing(folder, monkeypatch):
    save(folder, 10, tensors_of(0), META)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(
        CheckpointError, match=r"step 20 takes 4\.1 MB; the disk is 3\.1 MB short.*\n.*--resume"
    ) as info:
        save(folder, 20, tensors_of(1, size=10**6), META)
    assert info.value.where == str(folder)
    assert newest_good(folder, damaged=nothing_damaged) == folder / "step-00000010"
    assert hidden(folder) == []


def test_a_write_that_breaks_off_leaves_the_earlier_ones(folder):
    # A limit on the size of a file stops the write in the middle like a disk that fills up meanwhile.
    save(folder, 10, tensors_of(0), META)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written.*\n.*Free space on this disk"):
            save(folder, 20, tensors_of(1, size=10**6), META)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert newest_good(folder, damaged=nothing_damaged) == folder / "step-00000010"
    assert hidden(folder) == []
    save(folder, 20, tensors_of(1, size=10**6), META)


FULL_DISK = """
import shutil, sys, torch
from pathlib import Path
from kitaeru.engine.checkpoint import save, newest_good
from kitaeru.errors import CheckpointError
folder = Path(sys.argv[1]) / "checkpoints"
save(folder, 10, {"model/w": torch.ones(1000)}, {})
real = shutil.disk_usage
shutil.disk_usage = lambda path: real("/")._replace(free=10**12)  # the space is taken after it was looked at
try:
    save(folder, 20, {"model/w": torch.ones(10**6)}, {})
except CheckpointError as error:
    assert "Free space on this disk" in error.remedy, error
    assert newest_good(folder, damaged=lambda p, r: sys.exit(r)).name == "step-00000010"
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "step-00000010"]
    print("refused")
"""


def test_a_disk_that_fills_up_while_writing(tmp_path):
    mount = f'mount -t tmpfs -o size=2m none "{tmp_path}" && exec "$@"'
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let a user mount a small disk")
    command = [*inside, sys.executable, "-c", FULL_DISK, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout == "refused\n", result.stderr


def test_an_interrupt_while_writing_cleans_up(folder, monkeypatch):
    save(folder, 10, tensors_of(0), META)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("kitaeru.engine.checkpoint.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(folder, 20, tensors_of(1), META)
    assert (len(available(folder)), hidden(folder)) == (1, [])


def test_what_the_disk_changes_is_noticed_before_the_rename(folder, monkeypatch):
    from safetensors.torch import save_file

    def corrupting(tensors, path):
        save_file(tensors, path)
        flip(path)

    monkeypatch.setattr("kitaeru.engine.checkpoint.save_file", corrupting)
    with pytest.raises(CheckpointError, match="read back differs"):
        save(folder, 20, tensors_of(1), META)
    assert (available(folder), hidden(folder)) == ([], [])


def test_two_writers_do_not_mix(folder):
    save(folder, 10, tensors_of(0), META)
    with (
        exclusive(folder),
        pytest.raises(CheckpointError, match="Another process is writing"),
        exclusive(folder, patience_seconds=0.1),
    ):
        pass
    with exclusive(folder, patience_seconds=0):
        pass


def test_a_folder_that_cannot_be_locked_or_changed_still_gives_its_newest(folder):
    save(folder, 10, tensors_of(0), META)
    flip(save(folder, 20, tensors_of(0), META) / "state.json")
    (folder / ".lock").unlink()
    (folder / ".lock").mkdir()  # stands in the way of the lock file, for root too
    assert newest_good(folder, damaged=lambda path, reason: None) == folder / "step-00000010"
    assert (folder / "step-00000020").is_dir()


def test_a_place_that_cannot_be_written_to_is_an_error_for_a_person(folder):
    folder.parent.mkdir()
    folder.write_text("a file in the way")
    with pytest.raises(CheckpointError, match=r"could not be written.*\n.*can be written to"):
        save(folder, 10, tensors_of(0), META)


def test_parts_and_files_are_joined(folder, monkeypatch):
    """Three processes have rows of one tensor; the first file is too small for all that process 0 writes."""
    monkeypatch.setattr("kitaeru.engine.checkpoint.FILE_BYTES", 64)
    whole, other = torch.randn(7, 5), torch.randn(30)
    pieces = [{"model/a@0": whole[:3], "model/b": other}, {"model/a@3": whole[3:6]}, {"model/a@6": whole[6:]}]
    draft = begin(folder, 4, 1000, META)
    for number in (2, 1, 0):
        write_part(draft.temporary, number, pieces[number])
    path = draft.complete(3)
    names = {file.name for file in path.iterdir()}
    parts = {"state.safetensors", "state-0000-0001.safetensors", "state-0001.safetensors", "state-0002.safetensors"}
    assert names == {"state.json", "manifest.json", *parts}
    assert verify(path) is None
    tensors, meta = load(path)
    assert meta == META
    assert set(tensors) == {"model/a", "model/b"}
    assert torch.equal(tensors["model/a"], whole)
    assert torch.equal(tensors["model/b"], other)
    (path / "state-0002.safetensors").unlink()
    assert "state-0002" in str(verify(path))


def test_a_part_that_fails_leaves_nothing(folder, monkeypatch):
    save(folder, 10, tensors_of(0), META)
    draft = begin(folder, 20, 1000, META)
    write_part(draft.temporary, 0, tensors_of(1))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kitaeru.engine.checkpoint.save_file", full)
    write_part(draft.temporary, 1, tensors_of(1))
    with pytest.raises(CheckpointError, match="No space"):
        draft.complete(2)
    assert (len(available(folder)), hidden(folder)) == (1, [])
    monkeypatch.undo()
    save(folder, 20, tensors_of(1), META)  # and nothing is locked
