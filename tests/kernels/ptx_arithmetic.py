"""What the PTX instructions that `ptx_emulator` knows do to the registers of whole warps, in numpy.

A register is an array with an element a thread, 32 neighbours being a warp; all functions here are pure. The
table is closed: an opcode that is not in it, or one with another rounding, is unsupported. Names and meaning
are those of the PTX ISA manual, section 9.7 ("Instructions").

Additions and products round as the hardware does. A fused multiply-add rounds to float64 on its way, which
moves one result in 2^29 by a unit in the last place. Approximate instructions are exact here but for their
last rounding: their errors on a GPU (2^-22 for ex2, one unit for rcp) do not show.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Lanes: TypeAlias = NDArray[Any]

TYPES: dict[str, type[np.generic]] = {
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "pred": np.bool_,
}  # fmt: skip
"""As what a function here gets and gives registers of a PTX type; bfloat16 as its bits."""


class Operation(NamedTuple):
    """An instruction from registers to registers."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    function: Callable[..., Any]
    """An array for each of `reads`, by `TYPES`, to the one of `writes`, or to a tuple of all of them."""


def _each(name: str, kinds: str, count: int, function: Callable[..., Any]) -> dict[str, Operation]:
    """An operation of `count` operands that result and operands of any of these types have in common."""
    return {name.replace("*", kind): Operation((kind,) * count, (kind,), function) for kind in kinds.split()}


def _compare(name: str, kinds: str, function: Callable[..., Any]) -> dict[str, Operation]:
    return {
        f"setp.{name}.{kind}": Operation((kind, kind), ("pred",), function) for kind in kinds.split()
    }  # fmt: skip


def _quotient(a: Lanes, b: Lanes) -> Lanes:
    """Towards zero, as C and PTX have it."""
    return (abs(a) // abs(b) * np.sign(a) * np.sign(b)).astype(a.dtype)


def _fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _flushed(a: Lanes) -> Lanes:
    """Numbers below the smallest normal one are zeros, as .ftz has it."""
    return np.where(abs(a) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), a), a)


def _shift_left(a: Lanes, by: Lanes) -> Lanes:
    bits = a.dtype.itemsize * 8
    return np.where(by < bits, a << (by % bits).astype(a.dtype), 0).astype(a.dtype)


def _shift_right(a: Lanes, by: Lanes) -> Lanes:
    """What shifts in is the sign of signed numbers; so does a shift by more bits than there are."""
    bits = a.dtype.itemsize * 8
    whole = np.minimum(by, bits - 1).astype(a.dtype)
    return np.where((by < bits) | (a < 0), a >> whole, 0).astype(a.dtype)


def _bit_field(a: Lanes, start: Lanes, length: Lanes) -> Lanes:
    """bfe.u32 for a field that lies within the register."""
    assert ((start < 32) & (length < 32)).all()
    return (a >> start) & ((np.uint32(1) << length) - np.uint32(1))


def to_bfloat16(a: Lanes) -> Lanes:
    """The bits of float32 numbers rounded to the nearest bfloat16, ties to even."""
    bits = a.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(a), 0x7FFF, rounded).astype(np.uint16)


def _to_float16(a: Lanes) -> Lanes:
    return a.astype(np.float16)


def _pair(low: Lanes, high: Lanes) -> Lanes:
    """The bits of two registers of 16 bits in one of 32."""
    return low.view(np.uint16).astype(np.uint32) | high.view(np.uint16).astype(np.uint32) << 16


def _shuffle(mode: str) -> Callable[..., Lanes]:
    """shfl.sync among all lanes of a warp, in segments by the mask and bound that `c` holds."""

    def function(value: Lanes, b: Lanes, c: Lanes, members: Lanes) -> Lanes:
        assert (members == 0xFFFFFFFF).all(), "shfl.sync among some lanes of a warp only"
        lane = np.arange(len(value)) % 32
        segment = (c >> 8).astype(np.int64) & 31
        source = lane & segment | b & ~segment & 31 if mode == "idx" else lane ^ b
        source = np.where(source <= (lane & segment | c & ~segment & 31), source, lane)
        return value[np.arange(len(value)) - lane + source]

    return function


def _product(*registers: Lanes) -> tuple[Lanes, ...]:
    """mma.sync.aligned.m16n8k8 in tf32: registers of a (4), b (2) and c (4) to those of a b + c.

    Lane 4 g + i holds a[g, i], a[g + 8, i], a[g, i + 4], a[g + 8, i + 4]; b[i, g], b[i + 4, g]; and of c
    the columns 2 i and 2 i + 1 of the rows g and g + 8. The last 13 bits of factors are dropped, which the
    manual leaves open and the kernels rely on; the sum is rounded once, where a GPU also drops bits within.
    """
    factors = [(r & np.uint32(0xFFFFE000)).view(np.float32).reshape(-1, 8, 4) for r in registers[:6]]
    a = np.block([[factors[0], factors[2]], [factors[1], factors[3]]]).astype(np.float64)
    b = np.concatenate([f.transpose(0, 2, 1) for f in factors[4:]], axis=1).astype(np.float64)
    d = np.empty((len(a), 16, 8))
    places = [np.s_[:, half : half + 8, column::2] for half in (0, 8) for column in (0, 1)]
    for place, c in zip(places, registers[6:], strict=True):
        d[place] = c.reshape(-1, 8, 4)
    d = (d + a @ b).astype(np.float32)
    return tuple(d[place].reshape(-1) for place in places)


def _pair_product(*registers: Lanes) -> tuple[Lanes, ...]:
    """mma.sync.aligned.m16n8k8 in bfloat16: registers of a (2), b (1) and c (4) to those of a b + c.

    Lane 4 g + i holds, in pairs, a[g, 2 i : 2 i + 2], a[g + 8, 2 i : 2 i + 2] and b[2 i : 2 i + 2, g]; c is
    as in `_product`, and so is the rounding.
    """
    pairs = [
        np.stack([(r << np.uint32(16)).view(np.float32), (r & np.uint32(0xFFFF0000)).view(np.float32)], -1)
        for r in registers[:3]
    ]
    rows = [p.reshape(-1, 8, 8).astype(np.float64) for p in pairs]
    d = np.concatenate(rows[:2], axis=1) @ rows[2].transpose(0, 2, 1)
    places = [np.s_[:, half : half + 8, column::2] for half in (0, 8) for column in (0, 1)]
    return tuple(
        (d[place] + c.reshape(-1, 8, 4)).astype(np.float32).reshape(-1)
        for place, c in zip(places, registers[3:], strict=True)
    )


def _permute(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
    """prmt.b32 without its sign mode: each byte of the result by number, of the eight of a and b."""
    assert not (selector & 0x8888).any()
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for byte in range(4):
        which = (selector >> np.uint32(4 * byte) & np.uint32(7)).astype(np.uint64)
        found = (both >> which * np.uint64(8) & np.uint64(0xFF)).astype(np.uint32)
        result |= found << np.uint32(8 * byte)
    return result


def _halves(a: Lanes) -> tuple[Lanes, Lanes]:
    return a.astype(np.uint16), (a >> 16).astype(np.uint16)


def _exp2(a: Lanes) -> Lanes:
    return np.exp2(a.astype(np.float64)).astype(np.float32)


def _cast(kind: str) -> Callable[..., Lanes]:
    return lambda a: a.astype(TYPES[kind])


WIDE = "s32 u32 s64 u64"
OPERATIONS: dict[str, Operation] = {
    **_each("mov.*", "b16 u16 b32 u32 s32 f32 b64 u64 s64 pred", 1, lambda a: a),
    "mov.b32 pack": Operation(("b16", "b16"), ("b32",), _pair),
    "mov.b32 unpack": Operation(("b32",), ("b16", "b16"), _halves),
    **_each("add.*", WIDE + " f32", 2, np.add),
    **_each("sub.*", WIDE + " f32", 2, np.subtract),
    **_each("mul.lo.*", WIDE, 2, np.multiply),
    **_each("mad.lo.*", WIDE, 3, lambda a, b, c: a * b + c),
    "mul.wide.s32": Operation(("s32", "s32"), ("s64",), lambda a, b: a.astype(np.int64) * b),
    "mul.wide.u32": Operation(("u32", "u32"), ("u64",), lambda a, b: a.astype(np.uint64) * b),
    "mad.wide.s32": Operation(("s32", "s32", "s64"), ("s64",), lambda a, b, c: a.astype(np.int64) * b + c),
    "mad.wide.u32": Operation(("u32", "u32", "u64"), ("u64",), lambda a, b, c: a.astype(np.uint64) * b + c),
    **_each("div.*", "s32 u32", 2, _quotient),
    **_each("rem.*", "s32 u32", 2, lambda a, b: a - _quotient(a, b) * b),
    **_each("min.*", WIDE, 2, np.minimum),
    **_each("max.*", WIDE, 2, np.maximum),
    **_each("neg.*", "s32 s64 f32", 1, np.negative),
    **_each("and.*", "b16 b32 b64 pred", 2, np.bitwise_and),
    **_each("or.*", "b16 b32 b64 pred", 2, np.bitwise_or),
    **_each("xor.*", "b16 b32 b64 pred", 2, np.bitwise_xor),
    **_each("not.*", "b16 b32 b64 pred", 1, np.invert),
    **{f"shl.{k}": Operation((k, "u32"), (k,), _shift_left) for k in ("b32", "b64")},
    **{f"shr.{k}": Operation((k, "u32"), (k,), _shift_right) for k in WIDE.split()},
    "bfe.u32": Operation(("u32", "u32", "u32"), ("u32",), _bit_field),
    **_compare("eq", "b32 b64 s32 u32 s64 u64", np.equal),
    **_compare("ne", "b32 b64 s32 u32 s64 u64", np.not_equal),
    **_compare("lt", WIDE + " f32", np.less),
    **_compare("le", WIDE + " f32", np.less_equal),
    **_compare("gt", WIDE + " f32", np.greater),
    **_compare("ge", WIDE + " f32", np.greater_equal),
    **{
        f"selp.{k}": Operation((k, k, "pred"), (k,), lambda a, b, p: np.where(p, a, b))
        for k in ("b16", "b32", "b64", "s32", "u32", "s64", "u64", "f32")
    },
    **_each("mul.*", "f32", 2, np.multiply),
    **_each("fma.rn.*", "f32", 3, _fma),
    **_each("abs.*", "f32", 1, abs),
    **_each("min.*", "f32", 2, np.fmin),
    **_each("max.*", "f32", 2, np.fmax),
    **_each("ex2.approx.*", "f32", 1, _exp2),
    **_each("ex2.approx.ftz.*", "f32", 1, lambda a: _flushed(_exp2(a))),
    **_each("rcp.approx.ftz.*", "f32", 1, lambda a: _flushed(np.float32(1) / _flushed(a))),
    "cvt.s64.s32": Operation(("s32",), ("s64",), _cast("s64")),
    "cvt.u64.u32": Operation(("u32",), ("u64",), _cast("u64")),
    "cvt.u32.u64": Operation(("u64",), ("u32",), _cast("u32")),
    "cvt.s32.s64": Operation(("s64",), ("s32",), _cast("s32")),
    "cvt.u16.u32": Operation(("u32",), ("u16",), _cast("u16")),
    "cvt.u32.u16": Operation(("u16",), ("u32",), _cast("u32")),
    "cvt.f32.f16": Operation(("f16",), ("f32",), _cast("f32")),
    "cvt.f32.bf16": Operation(("b16",), ("b32",), lambda a: a.astype(np.uint32) << 16),
    "cvt.rn.f16.f32": Operation(("f32",), ("f16",), _to_float16),
    "cvt.rn.bf16.f32": Operation(("f32",), ("bf16",), to_bfloat16),
    "cvt.rn.f16x2.f32": Operation(
        ("f32", "f32"), ("b32",), lambda high, low: _pair(_to_float16(low), _to_float16(high))
    ),
    "cvt.rn.bf16x2.f32": Operation(
        ("f32", "f32"), ("b32",), lambda high, low: _pair(to_bfloat16(low), to_bfloat16(high))
    ),
    "shfl.sync.idx.b32": Operation(("b32", "u32", "u32", "b32"), ("b32",), _shuffle("idx")),
    "shfl.sync.bfly.b32": Operation(("b32", "u32", "u32", "b32"), ("b32",), _shuffle("bfly")),
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": Operation(
        ("b32",) * 6 + ("f32",) * 4, ("f32",) * 4, _product
    ),
    "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32": Operation(
        ("b32",) * 3 + ("f32",) * 4, ("f32",) * 4, _pair_product
    ),
    "prmt.b32": Operation(("b32", "b32", "u32"), ("b32",), _permute),
}  # fmt: skip
