"""The model of a scheduler, on loops of a few instructions."""

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from tests.kernels.scheduler_model import LATENCY, OCCUPIED, Instruction, cycles, instruction

EXPONENTIAL = instruction("MUFU.EX2 R1, R2", 0x000E300000000800)
SUM = instruction("FADD R3, R1, R4", 0x001FE20000000000)


def test_control_bits_are_read_from_the_code() -> None:
    assert Instruction("MUFU", "special", OCCUPIED["special"], 8, 0, 7, 0) == EXPONENTIAL
    assert (SUM.pipe, SUM.stall, SUM.sets, SUM.waits) == ("fma", 1, 7, 1)
    assert instruction("LDS.128 R4, [R2]", 0).occupied == 4 * OCCUPIED["memory"]


def test_a_warp_alone_waits_for_each_result_and_many_share_the_pipe() -> None:
    assert cycles([EXPONENTIAL, SUM], warps=1) == LATENCY["MUFU"] + 1
    assert cycles([EXPONENTIAL, SUM], warps=8) == pytest.approx(8 * OCCUPIED["special"], rel=0.05)


def test_independent_exponentials_follow_each_other() -> None:
    assert cycles([EXPONENTIAL] * 4, warps=1) == pytest.approx(4 * OCCUPIED["special"], rel=0.05)
