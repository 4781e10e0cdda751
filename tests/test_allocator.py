"""Memory that was freed is used again, without the kernel."""

import subprocess
import sys

import pytest

FAULTS = """
import ctypes
import resource
from spice_dist.allocator import keep_freed_memory
{call}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        block = libc.malloc(64 << 20)
        libc.memset(block, 1, 64 << 20)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(call: str) -> int:
    """Page faults of five blocks of 64 MB, one after another, after five others."""
    shown = subprocess.run([sys.executable, "-c", FAULTS.format(call=call)], capture_output=True, text=True, check=True)
    return int(shown.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_a_block_is_cleared_once():
    assert faults("keep_freed_memory()") < 100 < faults("pass")
