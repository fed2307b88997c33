"""The PTX emulator itself, on programs of a few lines."""

from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.kernels.ptx_arithmetic import OPERATIONS, to_bfloat16
from tests.kernels.ptx_emulator import Kernel, Unsupported


def kernel(body: str, threads: int = 32) -> Kernel:
    """A kernel with a pointer `a` in %rd1, and %rd2 at the thread's own element of four bytes."""
    head = """
        ld.param.b64 %rd1, [k_param_0];
        mov.u32 %r1, %tid.x;
        mad.wide.s32 %rd2, %r1, 4, %rd1;"""
    entry = f".visible .entry k(\n\t.param .u64 .ptr .global .align 1 k_param_0\n)\n.reqntid {threads}\n"
    return Kernel(f"{entry}{{\n{head}\n{body}\n\tret;\n\n}}\n")


def test_every_thread_of_every_block_works_on_its_element() -> None:
    a = torch.zeros(3 * 64, dtype=torch.int32)
    body = """
        mov.u32 %r2, %ctaid.x;
        mad.lo.s32 %r3, %r2, 64, %r1;
        mad.wide.s32 %rd3, %r3, 4, %rd1;
        st.global.b32 [ %rd3 + 0 ], { %r3 };"""
    kernel(body, threads=64).launch(3, [a])
    assert torch.equal(a, torch.arange(192, dtype=torch.int32))


def test_warps_part_at_a_branch_and_lanes_may_not() -> None:
    body = """
        setp.lt.s32 %p1, %r1, {limit};
        @!%p1 bra $L_end;
        st.global.b32 [ %rd2 + 0 ], 7;
$L_end:"""
    a = torch.zeros(96, dtype=torch.int32)
    kernel(body.format(limit=64), threads=96).launch(1, [a])
    assert a.tolist() == [7] * 64 + [0] * 32
    with pytest.raises(Unsupported, match="lanes of a warp part"):
        kernel(body.format(limit=40), threads=96).launch(1, [a])


def test_lanes_under_a_guard_neither_read_nor_write() -> None:
    body = """
        setp.lt.s32 %p1, %r1, 5;
        mov.u32 %r2, -1;
        @%p1 ld.global.b32 { %r2 }, [ %rd2 + 0 ];
        add.s32 %r3, %r2, 1;
        @%p1 st.global.b32 [ %rd2 + 0 ], { %r3 };"""
    a = torch.arange(5, dtype=torch.int32)
    kernel(body).launch(1, [a])
    assert a.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("a", "offset", "said"),
    [(torch.zeros(31), 0, "outside"), (torch.zeros(40), -4, "outside"), (torch.zeros(40), 2, "multiple")],
)
def test_stray_addresses_raise(a: Tensor, offset: int, said: str) -> None:
    with pytest.raises(IndexError, match=said):
        kernel(f"ld.global.b32 {{ %r2 }}, [ %rd2 + {offset} ];").launch(1, [a])


@pytest.mark.parametrize(
    "line",
    ["bar.arrive 0, 32;", "sin.approx.f32 %r2, %r1;", "add.rz.f32 %r2, %r1, %r1;",
     "st.shared.b32 [ %r1 ], %r1;",
     "ld.global.v2.b32 { %r2, %r3 }, [ %rd2 ];", "ld.global.b32 { %r2, %r3 }, [ %rd2 ];"],
)  # fmt: skip
def test_what_is_unknown_raises_before_anything_runs(line: str) -> None:
    with pytest.raises(Unsupported, match=line.split()[0].replace(".", r"\.")):
        kernel(line)


def test_registers_that_were_never_written_raise() -> None:
    with pytest.raises(Unsupported, match="%r9"):
        kernel("add.s32 %r2, %r9, 1;").launch(1, [torch.zeros(1)])


def test_a_product_of_the_tensor_cores() -> None:
    """Lane by lane from the manual's figures, in small whole numbers, which tf32 holds."""
    a, b, c = (torch.randint(-9, 9, size).float() for size in ((16, 8), (8, 8), (16, 8)))
    group, i = torch.arange(32) // 4, torch.arange(32) % 4
    factors = [
        a[group, i],
        a[group + 8, i],
        a[group, i + 4],
        a[group + 8, i + 4],
        b[i, group],
        b[i + 4, group],
    ]

    def spread(d: Tensor) -> list[Tensor]:
        return [d[group, 2 * i], d[group, 2 * i + 1], d[group + 8, 2 * i], d[group + 8, 2 * i + 1]]

    operation = OPERATIONS["mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"]
    bits = [f.view(torch.int32).numpy().view("uint32") for f in factors]
    found = operation.function(*bits, *(part.numpy() for part in spread(c)))
    for part, expected in zip(found, spread(a @ b + c), strict=True):
        assert part.tolist() == expected.tolist()


def test_a_product_of_bfloat16_pairs() -> None:
    """From the manual's figures: two neighbouring columns of a, or rows of b, in each register."""
    a, b, c = (torch.randint(-9, 9, size).float() for size in ((16, 8), (8, 8), (16, 8)))
    group, i = torch.arange(32) // 4, torch.arange(32) % 4

    def paired(low: Tensor, high: Tensor) -> NDArray[Any]:
        return torch.stack([low, high], 1).bfloat16().view(torch.int32)[:, 0].numpy().view("uint32")

    factors = [
        paired(a[group, 2 * i], a[group, 2 * i + 1]),
        paired(a[group + 8, 2 * i], a[group + 8, 2 * i + 1]),
        paired(b[2 * i, group], b[2 * i + 1, group]),
    ]

    def spread(d: Tensor) -> list[Tensor]:
        return [d[group, 2 * i], d[group, 2 * i + 1], d[group + 8, 2 * i], d[group + 8, 2 * i + 1]]

    operation = OPERATIONS["mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32"]
    found = operation.function(*factors, *(part.numpy() for part in spread(c)))
    for part, expected in zip(found, spread(a @ b + c), strict=True):
        assert part.tolist() == expected.tolist()


def test_bytes_are_picked_by_number() -> None:
    a, b = (torch.tensor([v], dtype=torch.int64).numpy().astype("uint32") for v in (0x33221100, 0x77665544))
    selector = torch.tensor([0x7610], dtype=torch.int64).numpy().astype("uint32")
    assert OPERATIONS["prmt.b32"].function(a, b, selector).tolist() == [0x77661100]


COPY = """
        shl.b32 %r2, %r1, 2;
        mov.b32 %r3, {given};
        cp.async.ca.shared.global [ %r2 + 0 ], [ %rd2 + 0 ], 0x4, %r3;
        cp.async.commit_group;
        cp.async.wait_group {pending};
        bar.sync 0;
        ld.shared.b32 %r4, [%r2];
        st.global.b32 [ %rd2 + 128 ], {{ %r4 }};"""


def test_copies_land_when_they_are_waited_for_and_not_before() -> None:
    a = torch.arange(64, dtype=torch.int32)
    kernel(COPY.format(given=4, pending=0)).launch(1, [a])
    assert torch.equal(a[32:], a[:32])
    with pytest.raises(IndexError, match="before it is written"):
        kernel(COPY.format(given=4, pending=1)).launch(1, [a])


def test_a_copy_of_nothing_reads_nothing_and_writes_zeros() -> None:
    a = torch.arange(64, dtype=torch.int32)
    body = "mov.b64 %rd2, 0;" + COPY.format(given=0, pending=0).replace("[ %rd2 + 128 ]", "[ %rd4 + 128 ]")
    kernel("mad.wide.s32 %rd4, %r1, 4, %rd1;" + body).launch(1, [a])
    assert not a[32:].any()


def test_shared_memory_is_for_blocks_of_one_warp() -> None:
    with pytest.raises(Unsupported, match="several warps"):
        kernel(COPY.format(given=4, pending=0), threads=64).launch(1, [torch.zeros(96)])


def test_shuffles_stay_in_their_quad() -> None:
    body = """
        shfl.sync.{}.b32 %r2, %r1, {}, 0x1c03, 0xffffffff;
        st.global.b32 [ %rd2 + 0 ], {{ %r2 }};"""
    lane, a = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    kernel(body.format("idx", 2)).launch(1, [a])
    assert torch.equal(a, lane // 4 * 4 + 2)
    kernel(body.format("bfly", 1)).launch(1, [a])
    assert torch.equal(a, lane ^ 1)


def test_bfloat16_rounds_as_torch_does() -> None:
    a = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, torch.inf, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38])])
    assert to_bfloat16(a.numpy()).tolist() == (a.bfloat16().view(torch.int16).int() & 0xFFFF).tolist()


@pytest.mark.parametrize("by", [0, 5, 31, 32, 40])
def test_shifts_by_more_bits_than_there_are(by: int) -> None:
    a = torch.tensor([-7, 12, 2**31 - 1, -(2**31)], dtype=torch.int32)
    count = torch.full((4,), by).numpy().astype("uint32")
    left = OPERATIONS["shl.b32"].function(a.numpy().view("uint32"), count)
    assert left.tolist() == [(v << by) % 2**32 for v in a.tolist()]
    assert OPERATIONS["shr.s32"].function(a.numpy(), count).tolist() == [v >> by for v in a.tolist()]
