"""Commands as real processes that begin in a moment: forks of one that has imported everything and computed nothing."""

import atexit
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
HANGS = 1200  # seconds that nothing here takes, on however slow a machine: what is waited for will never be

_NURSERY = """
import importlib, json, os, resource, sys, traceback
from pathlib import Path
import matplotlib.figure, pyarrow.parquet, sentencepiece, tokenizers, torch.utils.tensorboard
import megalodon_lm.generation.generator, megalodon_lm.training.report
import megalodon_lm.cli.commands, tests.preloaded
for path in Path(megalodon_lm.cli.commands.__file__).parent.glob("*.py"):
    importlib.import_module(f"megalodon_lm.cli.{path.stem}")
from megalodon_lm.cli.main import main
FLAGS = (os.O_RDONLY, os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_APPEND)
{prepare}
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(request["cwd"])
            for number, (path, flags) in enumerate(zip(request["streams"], FLAGS)):
                os.dup2(os.open(path, flags), number)
            sys.stdin = open(0, closefd=False)
            if request["largest_file"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, [request["largest_file"]] * 2)
            main([str(a) for a in request["arguments"]])
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Starts commands, one at a time.

    Args:
        prepare: code that it runs before the first one.
    """

    def __init__(self, prepare: str = ""):
        code = _NURSERY.replace("{prepare}", prepare)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def start(self, arguments, streams=(os.devnull,) * 3, cwd=None, largest_file=None) -> int:
        """Begin a command, which can write no file of more bytes than the largest; gives its process number."""
        request = {"arguments": arguments, "streams": streams, "cwd": cwd or Path.cwd(), "largest_file": largest_file}
        print(json.dumps(request, default=str), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def ended(self) -> int:
        """Wait for its end; gives its exit code, or minus the number of the signal that ended it."""
        return int(self.process.stdout.readline())

    def close(self) -> None:
        """End it with the command that runs."""
        self.process.communicate()


@functools.cache
def _nursery() -> Nursery:
    nursery = Nursery()
    atexit.register(nursery.close)
    return nursery


def megalodon(*arguments, cwd=None, input="") -> subprocess.CompletedProcess:
    """Run a command to its end; `input` comes to it through a pipe."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("in", "out", "err")]
        os.mkfifo(streams[0])
        for path in streams[1:]:
            path.touch()
        writer = threading.Thread(target=_write, args=(streams[0], input), daemon=True)
        writer.start()
        _nursery().start(arguments, streams, cwd)
        code = _nursery().ended()
        writer.join()
        return subprocess.CompletedProcess(arguments, code, streams[1].read_text(), streams[2].read_text())


def _write(path, text):
    with contextlib.suppress(BrokenPipeError), path.open("w") as pipe:
        pipe.write(text)


def wait_until(holds, process, said=lambda: "") -> None:
    """Look until something holds, which it never will once the process has ended, having said something."""
    late = time.monotonic() + HANGS
    while not holds():
        assert process.poll() is None, f"it ended before: {said()}"
        assert time.monotonic() < late
        time.sleep(0.01)
