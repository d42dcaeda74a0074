"""Memory of the process."""

import json
import platform
import subprocess
import sys

import pytest

from megalodon_lm.training.memory import resident

KEEP = """
import json, resource, torch
from megalodon_lm.training.memory import keep_freed_memory, resident
kept, before = keep_freed_memory(), resident()
faults = []
for _ in range(10):
    started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [torch.ones(size << 20) for size in (1, 3, 20)]
    del parts
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - started)
print(json.dumps([kept, faults, resident() - before]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep nothing")
def test_freed_memory_is_kept_and_soon_no_more_is_taken():
    done = subprocess.run([sys.executable, "-c", KEEP], capture_output=True, text=True, check=True)
    kept, faults, growth = json.loads(done.stdout)
    assert kept
    assert max(faults[5:]) < 100  # a page at a time would take 24,000
    assert growth < 600 << 20  # blocks of 96 MB and the gaps between; the addresses reserved are no memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_memory_is_told():
    assert 0 < resident() <= resident(peak=True)
