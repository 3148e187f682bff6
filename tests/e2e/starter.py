"""Starts kitaeru's command line many times without importing torch each time: a process that forks on request.

Reads one JSON object a line. `{"argv": [...], "cwd": "...", "output": "..."}` forks a child that runs `kitaeru ARGV`;
the answer is its pid. Also: `file_bytes`, the largest file it may write; `host`, the network namespace
it runs in, whose name is then the host's too; `fresh`, whether it starts workers as where there is a GPU; `whole`,
whether the process that it forks workers from imports everything itself, as it does outside of tests: else it is a fork
of this one, in which all that is imported already. `{"wait": pid}` answers with its exit code, or minus the signal that
ended it.
"""

import ctypes
import json
import os
import resource
import signal
import socket
import sys
from multiprocessing import forkserver, reduction, util

CLONE_NEWUTS, CLONE_NEWNET = 0x04000000, 0x40000000


def enter(host):
    libc = ctypes.CDLL(None, use_errno=True)
    namespace = os.open(f"/run/netns/{host}", os.O_RDONLY)
    assert libc.setns(namespace, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    os.close(namespace)
    assert libc.unshare(CLONE_NEWUTS) == 0, os.strerror(ctypes.get_errno())
    assert libc.sethostname(host.encode(), len(host)) == 0, os.strerror(ctypes.get_errno())
    os.environ["KITAERU_CACHE"] += f"-{host}"


def keep_forkserver():
    """Fork what will be multiprocessing's server of forks, if this process comes to start one: nothing is imported
    again. It gets what a new process would inherit then: files, environment, whether SIGTERM is ignored.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        be_forkserver(theirs)
    theirs.close()
    usual = util.spawnv_passfds

    def start(path, arguments, files):
        if "multiprocessing.forkserver" not in arguments[-1]:
            return usual(path, arguments, files)
        util.spawnv_passfds = usual
        modules = forkserver._forkserver._preload_modules
        ignores = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        reduction.sendfds(ours, files)
        ours.sendall(json.dumps([dict(os.environ), modules, ignores]).encode())
        ours.close()
        return pid

    util.spawnv_passfds = start


def be_forkserver(theirs):
    try:
        files = reduction.recvfds(theirs, 2)
        with theirs.makefile() as said:
            environment, modules, ignores = json.load(said)
        theirs.close()
        os.environ.clear()
        os.environ.update(environment)
        if ignores:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        forkserver.main(*files, modules)
    finally:  # nobody has asked, or nobody is there any more
        os._exit(0)


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
    elif not request.get("whole"):
        keep_forkserver()
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
    import kitaeru.engine.rank
    import kitaeru.engine.run
    import kitaeru.report.live  # noqa: F401 - what takes seconds

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
