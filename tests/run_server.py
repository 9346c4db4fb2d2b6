"""A process that has imported everything and forks a child for each run it is asked for: a run can then be killed a hundred times a minute.

A line of JSON on stdin: {"settings": of fastpoem.fit, "log": file, "fault": of `arm` or null}; or {"torchrun": the words of its command, …}, see
`torchrun`. Answers with the child's process id, and when it has ended with its exit status (negative: the signal).
"""

import errno
import json
import os
import resource
import runpy
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.run

from fastpoem import disk, signals
from fastpoem.config import from_kwargs
from fastpoem.engine import world
from fastpoem.run import saving
from fastpoem.run.fit import fit
from fastpoem.run.loop import Loop

OPERATIONS = ("open", "write", "pwrite", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")


def arm(fault: dict) -> None:
    """Have something happen in this process:

    {"kill_at": k}: SIGKILL in the middle of the k-th operation on the disk, half a write done.
    {"refuse": [first, last], "errno": "ENOSPC"}: these operations fail, a write after half of it.
    {"count": file}: count the operations into a file.
    {"no_larger_than": bytes}: the kernel refuses larger files (RLIMIT_FSIZE).
    {"vanish": path, "step": n}: a folder is removed after step n.
    {"stall": seconds}: writing the first tensors takes so long, once "writing" was printed.
    {"slow": seconds}: a step takes so much longer.
    """
    done = 0

    def tick(name, inner, args, kwargs):
        nonlocal done
        done += 1
        if "count" in fault:
            Path(fault["count"]).write_text(str(done))
        if done == fault.get("kill_at"):
            if "write" in name:
                inner(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
            os.kill(os.getpid(), signal.SIGKILL)
        first, last = fault.get("refuse", (0, -1))
        harmless = name in ("unlink", "rmdir") or (name == "open" and not args[1] & os.O_CREAT)
        if first <= done <= last and not harmless:
            if "write" in name and done == first:
                return inner(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
            number = getattr(errno, fault["errno"])
            raise OSError(number, os.strerror(number))
        return inner(*args, **kwargs)

    def wrap(name, inner):
        return lambda *args, **kwargs: tick(name, inner, args, kwargs)

    saving.RETRY_SECONDS = 0.01
    for name in OPERATIONS:
        setattr(os, name, wrap(name, getattr(os, name)))
    disk.exchange = wrap("exchange", disk.exchange)
    if "no_larger_than" in fault:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["no_larger_than"], resource.RLIM_INFINITY))
    if "vanish" in fault:
        one_step = Loop.one_step

        def step(self):
            one_step(self)
            if self.done == fault["step"]:
                self.saver.wait()
                shutil.rmtree(fault["vanish"])

        Loop.one_step = step
    if "slow" in fault:
        taken = Loop.one_step
        Loop.one_step = lambda self: (taken(self), time.sleep(fault["slow"]))[0]
    if "stall" in fault:
        write_tensors = disk.write_tensors

        def stall(path, tensors):
            disk.write_tensors = write_tensors
            print("writing", flush=True)
            time.sleep(fault["stall"])
            return write_tensors(path, tensors)

        disk.write_tensors = stall


def child(job: dict) -> int:
    log = open(job["log"], "ab", buffering=0)  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    config = from_kwargs(**job["settings"])
    if job.get("fault"):
        arm(job["fault"])
    run = fit(config)
    return 128 + run.stopped_by if run.stopped_by else 0


def torchrun(job: dict) -> int:
    """What the command of that name does, by its own main: only that its processes, which it would start anew, are forked.

    {"torchrun": its words, "cwd": folder, "out" and "log": files for stdout and stderr, "processes": folder for a file a rank with its process
    id, "seconds": of fastpoem.engine.world}. It leads a process group, in which all of them are."""
    os.setpgid(0, 0)
    os.chdir(job["cwd"])
    for number, name in enumerate((os.devnull, job["out"], job["log"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    world.SECONDS = job["seconds"]
    processes, launch = Path(job["processes"]), torch.distributed.run.elastic_launch

    def process(*words: str) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)  # torchrun's own are there
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signals.MOMENT = 10.0  # where one of them ends, forked ones are sent two: by torch.multiprocessing, and by torchrun as always
        (processes / os.environ["RANK"]).write_text(str(os.getpid()))
        begin = 1 + (words[1] == "-m")  # words[0] is -u
        sys.argv = [*words[begin:]]
        try:
            if begin == 2:
                runpy.run_module(words[begin], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(words[begin], run_name="__main__")
        except Exception:
            traceback.print_exc()
            sys.exit(1)

    def forked(config, entrypoint):
        config.start_method = "fork"
        return launch(config, process)

    torch.distributed.run.elastic_launch = forked
    torch.distributed.run.main(job["torchrun"])
    return 0


def status(run: Callable[[dict], int], job: dict) -> int:
    """What `run` returns; 1 for whatever it raises, after the traceback."""
    try:
        return run(job)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    for line in sys.stdin:
        job = json.loads(line)
        if "torchrun" in job:
            import torch.distributed.fsdp  # here, and not two seconds in each process
        pid = os.fork()
        if pid == 0:
            os._exit(status(torchrun if "torchrun" in job else child, job))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
