"""Gumbel noise that is a function of (seed, position, token id) and of nothing else.

The bits are SplitMix64's (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA
2014, section 5, with the mixer of Stafford's "variant 13"): a counter-based generator, whose n-th output is
a hash of seed + n * GAMMA. Two of them are chained: the token's noise is output number `token id` of the
generator seeded with output number `position` of the generator seeded with the request's seed. Integer
arithmetic modulo 2**64 gives the same bits on every device, and no counter is kept, so a row knows nothing of
its batch or its slot.
"""

import torch
from torch import Tensor


def as_int64(bits: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer, since torch computes with signed ones."""
    return bits - 2**64 if bits >= 2**63 else bits


_GAMMA = as_int64(0x9E3779B97F4A7C15)  # 2**64 / the golden ratio, odd
_MULTIPLIERS = (as_int64(0xBF58476D1CE4E5B9), as_int64(0x94D049BB133111EB))


def _shift_right(bits: Tensor, places: int) -> Tensor:
    """Shift in zeros: torch's >> repeats the sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def splitmix64(seed: Tensor, n: Tensor) -> Tensor:
    """Output number n (from 0) of the SplitMix64 generator with this seed; int64, shapes broadcast."""
    bits = seed + (n + 1) * _GAMMA
    bits = (bits ^ _shift_right(bits, 30)) * _MULTIPLIERS[0]
    bits = (bits ^ _shift_right(bits, 27)) * _MULTIPLIERS[1]
    return bits ^ _shift_right(bits, 31)


def gumbel(bits: Tensor) -> Tensor:
    """Turn int64 random bits into standard Gumbel noise, float32, always finite."""
    # 63 bits, so that a small uniform keeps a float's relative precision: it is what makes large noise, which
    # decides between unlikely tokens. The bounds keep the logarithms finite; 1 - 2**-24 is the float below 1.
    uniform = (_shift_right(bits, 1).float() * 2.0**-63).clamp(2.0**-64, 1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def gumbel_noise(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise (S, V) float32 for seeds (S,), positions (S,) and token ids (V,), all int64.

    The argmax of log-probabilities plus this noise is a sample of them (Gumbel-max trick). The ids are to be
    read from memory: Inductor (torch 2.13) folds an arange made within a compiled step into an index formula,
    whose products past 64 bits are wrong.
    """
    return gumbel(splitmix64(splitmix64(seeds, positions)[:, None], tokens))
