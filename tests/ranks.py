"""Functions run by several ranks of gloo at once: forks of one process that has imported everything, computed nothing.

A rank ends by os._exit once all have finished. Left to the interpreter's own end, threads of a process group that
something still refers to (a mesh, FSDP2) may outlive what destroys them, and the process aborts.
"""

import atexit
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from .processes import ROOT

HANGS = 900  # seconds that nothing here takes, on however slow a machine

_NURSERY = """
import faulthandler, importlib, json, os, signal, sys, time, traceback
sys.path.insert(0, os.getcwd())
import torch, torch.distributed as dist, torch.distributed.fsdp, torch.distributed.device_mesh
import tests.preloaded
from datetime import timedelta
parent = os.getppid()

def rank_of(request, function, rank):
    code = 1
    try:
        sys.stdout = sys.stderr = open(f"{request['folder']}/log{rank}", "w", buffering=1)
        faulthandler.dump_traceback_later(0.9 * request["timeout"], file=sys.stderr)
        torch.set_num_threads(1)
        count = request["count"]
        dist.init_process_group(
            "cpu:gloo", init_method=f"file://{request['folder']}/store", rank=rank, world_size=count,
            timeout=timedelta(seconds=request["timeout"]),
        )
        arguments = torch.load(f"{request['folder']}/arguments", weights_only=False)
        found = function(rank, *arguments)
        torch.save(found, f"{request['folder']}/found{rank}")
        dist.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)

for line in sys.stdin:
    request = json.loads(line)
    module, name = request["function"]
    function = getattr(importlib.import_module(module), name)
    running = {}
    for rank in range(request["count"]):
        child = os.fork()
        if child == 0:
            rank_of(request, function, rank)
        running[child] = rank
    codes, late = {}, time.monotonic() + request["timeout"]
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[running.pop(child)] = os.waitstatus_to_exitcode(status)
            if any(codes.values()):
                late = min(late, time.monotonic() + 5)
        elif time.monotonic() > late or os.getppid() != parent:
            for child in running:
                os.kill(child, signal.SIGKILL)
            late = float("inf")
        else:
            time.sleep(0.01)
    print(json.dumps([codes[rank] for rank in range(request["count"])]), flush=True)
"""


@functools.cache
def _nursery() -> subprocess.Popen:
    started = subprocess.Popen(
        [sys.executable, "-c", _NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    atexit.register(_end, started)
    return started


def _end(started):
    with contextlib.suppress(subprocess.TimeoutExpired):
        started.communicate(timeout=10)
    started.kill()


def run_ranks(function, count: int, *arguments, timeout: float = HANGS, check: bool = True) -> list[Any]:
    """What a function gives on each of so many ranks.

    Args:
        function: of a module of tests, called with the rank and the arguments, inside the process group of all.
        count: ranks.
        arguments: anything that torch.save takes.
        timeout: in seconds, after which all are killed; a few after one of them failed.
        check: fail with the logs if a rank does; otherwise what a failed one gave is None.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(arguments, f"{folder}/arguments")
        name = [function.__module__, function.__name__]
        request = {"function": name, "count": count, "folder": folder, "timeout": timeout}
        nursery = _nursery()
        print(json.dumps(request), file=nursery.stdin, flush=True)
        codes = json.loads(nursery.stdout.readline())
        logs = "".join(f"rank {r} ({codes[r]}): {Path(folder, f'log{r}').read_text()}\n" for r in range(count))
        assert not check or not any(codes), logs
        kept = [Path(folder, f"found{r}") for r in range(count)]
        return [torch.load(p, weights_only=False) if p.exists() else None for p in kept]
