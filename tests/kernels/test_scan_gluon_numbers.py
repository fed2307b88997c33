"""The Gluon selective scan gives the numbers of its definition: its PTX for Hopper, run on the CPU.

The host's code runs as it is, with the launch replaced: the variant that the JIT would pick is compiled ahead
of time, and runs in `ptx_emulator`, which says what this cannot show.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import naive
from tests.kernels.inputs import scan_inputs
from tests.kernels.ptx_emulator import Kernel

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)  # fmt: skip

STATE = 8
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
ERROR = {torch.bfloat16: 2**-9 + 1.6e-4, torch.float16: 3.2e-4, torch.float32: 1e-6}
"""Of a tensor, against its norm: rounding, 2^-9 at most in bfloat16, 2e-4 in float16; tf32 adds 1.6e-4."""
STREAMED = 6e-6
"""Of a float32 state, where dt x of bfloat16 enters in two parts: 2.5e-6 of it is lost on average."""

Compiler = Callable[[str], Kernel]


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    """Compiles requests to `ahead_of_time`, in a process that does not interpret."""
    command = [sys.executable, "-m", "tests.kernels.ahead_of_time", "ptx"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        questions, answers = process.stdin, process.stdout
        assert questions is not None and answers is not None

        @cache
        def kernel(request: str) -> Kernel:
            print(request, file=questions, flush=True)
            answer = answers.readline()
            assert answer, "the compiler ended; what it said is above"
            return Kernel(json.loads(answer))

        yield kernel
        questions.close()


class Emulated:
    """Takes the place of `gluon_scan.scan_kernel`."""

    def __init__(self, kernel: Any, compiler: Compiler) -> None:
        self.kernel, self.compiler = kernel, compiler

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return partial(self.launch, grid[0])

    def launch(self, blocks: int, *arguments: Tensor | int, enable_fp_fusion: bool, **given: Any) -> None:
        """With types and divisibility as the JIT finds them in the arguments."""
        assert enable_fp_fusion
        unaligned = []
        for name, value in zip(self.kernel.arg_names, arguments, strict=False):
            place = value.data_ptr() if isinstance(value, Tensor) else value
            if place % 16:
                unaligned.append(name)
            if isinstance(value, Tensor):
                given[name] = POINTERS[value.dtype]
        request = {"kernel": "gluon", "given": given, "unaligned": unaligned}
        self.compiler(json.dumps(request, sort_keys=True)).launch(blocks, arguments)


def error(found: Tensor, expected: Tensor) -> float:
    """Against the norm of what is expected; 0 where there is nothing."""
    return ((found.double() - expected).norm() / expected.norm()).item() if expected.numel() else 0.0


@pytest.fixture(autouse=True)
def emulated(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`gluon_scan` launches its kernel on the CPU, and fresh memory is full of NaN."""
    from ssm_dist.kernels import gluon_scan

    monkeypatch.setattr(gluon_scan, "scan_kernel", Emulated(gluon_scan.scan_kernel, compiler))
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def scan(form: tuple[int | None, ...], inputs: list[Any]) -> Tensor:
    """In a form (chunk, warps, depth, extra, stages, registers, cut)."""
    from ssm_dist.kernels import gluon_form, gluon_scan

    read = (inputs[0], inputs[1], inputs[6], inputs[3], inputs[4])
    assert gluon_form.serves(*read)
    assert len(form) < 5 or gluon_form.streams(*read)
    return gluon_scan.scan(*[*inputs, gluon_form.Form(*form)])


def assert_exact(
    form: tuple[int | None, ...], lengths: list[int], channels: int, states: int = 16, groups: int = 1,
    dtype: torch.dtype = torch.bfloat16, state_dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Output and named slots, in no order, are as defined; the others hold NaN here, and still do after."""
    inputs = scan_inputs(lengths, channels, states, groups, dtype)
    inputs[STATE] = inputs[STATE].to(state_dtype)
    named = inputs[-1].long()
    unnamed = torch.ones(len(inputs[STATE]), dtype=torch.bool).index_fill(0, named, False)
    inputs[STATE][unnamed] = torch.nan
    expected, expected_state = naive.selective_scan(*inputs)
    y = scan(form, inputs)
    assert y.dtype == dtype and inputs[STATE][unnamed].isnan().all()
    assert error(y, expected) < ERROR[dtype]
    most = STREAMED if len(form) > 4 and state_dtype == torch.float32 else ERROR[state_dtype]
    assert error(inputs[STATE][named], expected_state[named]) < most


def test_whole_sequences_as_they_are_served() -> None:
    """Blocks of four warps, the last of each group in part beyond its channels."""
    assert_exact((0, 4, 1, 1), [13, 0, 1, 8, 2], channels=160, groups=2)


def test_half_precision_two_loads_ahead_at_odd_strides() -> None:
    half = torch.float16
    assert_exact((0, 2, 2, 2), [17, 1, 0, 9], channels=36, groups=2, dtype=half, state_dtype=half)


@pytest.mark.parametrize("lengths", [[16, 17, 0, 1, 15, 33, 32, 7], [170]], ids=str)
def test_chunks_in_two_passes(lengths: list[int]) -> None:
    """Sequences that end before, on and after a chunk; and one of more chunks than are folded at once."""
    assert_exact((16, 1, 1, 1), lengths, channels=20, state_dtype=torch.bfloat16)


def test_streamed_sequences_that_end_within_a_tile() -> None:
    assert_exact((0, 1, 1, 0, 4), [13, 0, 1, 8, 2, 40], channels=160, groups=2)


def test_streamed_half_precision_with_the_polynomial() -> None:
    half = torch.float16
    assert_exact((0, 1, 1, 1, 4), [17, 1, 0, 9], channels=48, groups=2, dtype=half, state_dtype=half)


@pytest.mark.parametrize("lengths", [[16, 17, 0, 1, 15, 33, 32, 7], [170]], ids=str)
def test_streamed_chunks_in_two_passes(lengths: list[int]) -> None:
    assert_exact((16, 1, 1, 0, 4), lengths, channels=24)
    assert_exact((16, 1, 1, 0, 4, None, 3), lengths, channels=40)


def test_first_chunks_that_are_shorter_than_their_sequences_by_nothing_or_by_all() -> None:
    assert_exact((32, 1, 1, 0, 4, None, 8), [3, 0, 24, 25, 9], channels=96, groups=2)


def test_32_states() -> None:
    assert_exact((0, 1, 1, 0), [9, 0, 1], channels=48, states=32, groups=3)


@pytest.mark.parametrize("form", [(0, 4, 1, 1), (0, 1, 1, 0, 4)], ids=str)
def test_nan_stays_in_its_channel_and_near_its_token(form: tuple[int, ...]) -> None:
    """It spoils up to three tokens before it, of its channel and sequence, and all that come after there."""
    inputs = scan_inputs([5, 21, 5], 160, 16, 2, torch.bfloat16)
    inputs[0][20, 37] = torch.nan
    y = scan(form, inputs)
    spoilt = torch.zeros_like(y, dtype=torch.bool)
    spoilt[17:26, 37] = True
    assert torch.equal(y.isnan(), spoilt)
    ends = inputs[STATE][inputs[-1].long()]
    spoilt = torch.zeros_like(ends, dtype=torch.bool)
    spoilt[1, 37] = True
    assert torch.equal(ends.isnan(), spoilt)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("chunk", [0, 32])
def test_every_type(chunk: int, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    assert_exact((chunk, 1, 1, 1), [70, 1, 0, 33], channels=16, dtype=dtype, state_dtype=state_dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [(0, 4, 1, 1), (0, 1, 2, 0), (112, 2, 2, 2), (256, 4, 1, 1), (16, 1, 1, 3), (0, 1, 1, 0, 4),
     (112, 1, 1, 1, 5), (64, 1, 1, 1, 4, None, 8)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(("channels", "groups"), [(128, 1), (96, 3), (80, 2)])
def test_every_form(form: tuple[int | None, ...], channels: int, groups: int) -> None:
    assert_exact(form, [300, 0, 1, 63, 2, 0, 3, 277, 4, 31], channels=channels, groups=groups)


@pytest.mark.slow
@pytest.mark.parametrize("states", [16, 32, 64])
@pytest.mark.parametrize("form", [(0, 4, 1, 1), (32, 4, 1, 1)], ids=str)
def test_every_size_of_state(form: tuple[int, ...], states: int) -> None:
    assert_exact(form, [70, 1, 0, 9], channels=64, states=states)


@pytest.mark.slow
def test_errors_do_not_grow_over_a_thousand_tokens() -> None:
    assert_exact((0, 1, 1, 1), [1000], channels=16)
    assert_exact((112, 1, 1, 2), [1000], channels=16)
    assert_exact((0, 1, 1, 0, 4), [1000], channels=16)
