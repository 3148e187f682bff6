"""Starts kitaeru's command line many times without importing torch each time: a process that forks on request.

Reads one JSON object a line. `{"argv": [...], "cwd": "...", "output": "..."}` forks a child that runs `kitaeru ARGV`;
the answer is its pid. Also: `file_bytes`, the largest file it may write; `host`, the network namespace
it runs in, whose name is then the host's too; `fresh`, whether it starts workers as where there is a GPU.
`{"wait": pid}` answers with its exit code, or minus the signal that ended it.
"""

import ctypes
import json
import os
import resource
import sys

CLONE_NEWUTS, CLONE_NEWNET = 0x04000000, 0x40000000


def enter(host):
    libc = ctypes.CDLL(None, use_errno=True)
    namespace = os.open(f"/run/netns/{host}", os.O_RDONLY)
    assert libc.setns(namespace, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    os.close(namespace)
    assert libc.unshare(CLONE_NEWUTS) == 0, os.strerror(ctypes.get_errno())
    assert libc.sethostname(host.encode(), len(host)) == 0, os.strerror(ctypes.get_errno())
    os.environ["KITAERU_CACHE"] += f"-{host}"


def child(request):
    os.setsid()
    if request.get("host"):
        enter(request["host"])
    os.chdir(request["cwd"])
    handle = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for target in (1, 2):
        os.dup2(handle, target)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if request.get("file_bytes"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], resource.RLIM_INFINITY))
    if request.get("fresh"):
        from kitaeru.engine import launch

        launch.start_method = lambda: "spawn"
    from kitaeru.cli import main

    code = 70
    try:
        code = main(request["argv"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def answer(value):
    print(json.dumps(value), flush=True)


def serve():
    import kitaeru.engine.run  # noqa: F401 - what takes seconds

    answer("ready")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer(os.waitstatus_to_exitcode(status))
            continue
        pid = os.fork()
        if pid == 0:
            child(request)
        answer(pid)


if __name__ == "__main__":  # a run on several devices imports this file again in each of them
    serve()
