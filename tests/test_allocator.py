"""Freed memory is kept: a step that repeats needs no new pages."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys, torch
from gpt2.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def step():
    torch.ones(24, 2**20).sum()  # 96 MiB, 24,576 pages
for _ in range(8):  # until the heap has the holes that a step needs
    step()
faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for _ in range(8):
    step()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(min(b - a for a, b in zip(faults, faults[1:])))  # a busy machine's kernel may take pages away meanwhile
"""


def page_faults(how: str) -> int:
    # Huge pages would hide what is measured.
    env = dict(os.environ, OMP_NUM_THREADS="1", THP_MEM_ALLOC_ENABLE="0")
    done = subprocess.run([sys.executable, "-c", STEPS, how], env=env, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_repeated_steps_map_no_new_pages() -> None:
    assert page_faults("kept") < 1000
    assert page_faults("given back") > 10_000  # else the test above shows nothing


VARYING = """
import random, torch
from gpt2.allocator import giving_back_memory, keep_freed_memory
assert keep_freed_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
dice = random.Random(0)
grown = []
with giving_back_memory(on=True):
    for batch in range(200):  # chunks of sizes that seldom repeat, three alive at a time, and a small one that stays
        chunks = [torch.ones(dice.randint(2**18, 2**22)) for _ in range(3)]
        grown.append((torch.ones(100), resident()))
early, late = (max(size for _, size in part) for part in (grown[:100], grown[100:]))
assert late < 1.5 * early, (early, late)
faults = []
import resource
for _ in range(16):
    torch.ones(24, 2**20).sum()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
assert min(b - a for a, b in zip(faults[8:], faults[9:])) < 1000  # training keeps its pages again
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_is_bounded_where_sizes_vary() -> None:
    env = dict(os.environ, OMP_NUM_THREADS="1", THP_MEM_ALLOC_ENABLE="0")
    done = subprocess.run([sys.executable, "-c", VARYING], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
