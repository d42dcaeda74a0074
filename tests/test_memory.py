"""Memory of the process."""

import json
import os
import platform
import subprocess
import sys

import pytest

from megalodon_lm.cli.main import KEPT_PRODUCTS
from megalodon_lm.training.memory import resident

KEEP = """
import json, resource, torch
from megalodon_lm.cli.main import KEPT_PRODUCTS
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


PRODUCTS = """
import sys
from megalodon_lm.cli.main import main
if sys.argv[1] == "command":
    try:
        main(["--version"])
    except SystemExit:
        pass
import torch
from megalodon_lm.cli.main import KEPT_PRODUCTS
from megalodon_lm.training.memory import resident
torch.set_num_threads(1)
weight = torch.ones(256, 256, dtype=torch.bfloat16, requires_grad=True)
before = resident()
for rows in range(500, 900):
    torch.nn.functional.linear(torch.ones(rows, 256, dtype=torch.bfloat16), weight).sum().backward()
print("grown by", resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_products_of_many_shapes_are_not_kept_for_ever():
    environment = {k: v for k, v in os.environ.items() if k not in KEPT_PRODUCTS}
    grown = {}
    for way in ("command", "library"):
        done = subprocess.run(
            [sys.executable, "-c", PRODUCTS, way], capture_output=True, text=True, check=True, env=environment
        )
        grown[way] = int(done.stdout.split()[-1]) >> 20
    assert grown["command"] < 250 or grown["command"] < grown["library"] / 2, grown
