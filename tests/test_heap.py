"""Freed memory is kept for the next step, and goes back when it is asked for."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import psutil, torch
from nested_attention.heap import give_back_freed, keep_freed
keep_freed()
held = lambda: psutil.Process().memory_info().rss / 1e6
before = held()
torch.ones(50_000_000)  # 200 MB
kept = held()
give_back_freed()
print(kept - before, held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_freed_memory_is_kept_until_it_is_asked_for() -> None:
    said = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    kept, left = map(float, said.split())
    assert kept > 180 and left < 20
