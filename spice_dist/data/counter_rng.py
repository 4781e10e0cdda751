"""Random numbers as a function of (seed, time, stream, index): no state to save, the same on any number of workers.

SplitMix64 (Steele, Lea and Flood 2014) hashes the counter, in whole numbers, so every device draws the same. Where a
draw decides what is computed, it is made on the CPU: nothing then waits for the device to say which sample drew what.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(value: int) -> int:
    """Return the same 64 bits as a two's complement integer, the only kind that torch holds."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's >> repeats the sign bit; a hash needs zeros


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX[0])
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX[1])
    return x ^ _shift_right(x, 31)


def _mix_int(x: int) -> int:
    x &= _MASK
    x = (x ^ (x >> 30)) * _MIX[0] & _MASK
    x = (x ^ (x >> 27)) * _MIX[1] & _MASK
    return x ^ (x >> 31)


def uniform(key: tuple[int, ...], index: Int[Tensor, " B"], count: int) -> Float[Tensor, "B count"]:
    """Draw `count` numbers in [0, 1) for every index, on its device.

    `key` is (seed, epoch or step, stream, ...), any integers.
    Two calls agree exactly where key and index agree, whatever else is in the batch.
    """
    state = 0
    for part in key:
        state = _mix_int(state + _GOLDEN + int(part))
    rows = _mix(index.long() * _signed(_GOLDEN) + _signed(state))
    counters = torch.arange(1, count + 1, device=index.device) * _signed(_GOLDEN)
    bits = _mix(rows[:, None] + counters[None, :])
    return _shift_right(bits, 40).float() * 2.0**-24
