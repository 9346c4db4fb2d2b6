"""A process that has imported everything and forks a child for each run it is asked for: a run can then be killed a hundred times a minute.

A line of JSON on stdin: {"settings": of fastpoem.fit, "log": file, "fault": of `arm` or null}. Answers with the child's process id, and when
it has ended with its exit status (negative: the signal).
"""

import errno
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from fastpoem import disk
from fastpoem.config import from_kwargs
from fastpoem.run import loop
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

    loop.RETRY_SECONDS = 0.01
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
    try:
        run = fit(config)
        return 128 + run.stopped_by if run.stopped_by else 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(child(job))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
