"""The tests. What is set here is set before anything imports torch, and for the commands that they run."""

import os

# Threads that wait for each other in tiny parallel regions sleep instead of spinning: where other programs use the
# processors too, spinning took seven times the processor time, and four times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from megalodon_lm.training import machine

machine.SECONDS = 0.02  # for how long every run measures the rate of products before its first step
