"""The selective scan with sequences handed from program to program (Gluon, for sm_90, 16 states).

A warp of `gluon_scan` that has a whole sequence stays with its scheduler to the end. Where there are 2.4 warps
a scheduler, some have two and some three, and those with three take as long as if all had three. Here each
sequence is cut into pieces, and programs, as many as fit evenly, draw pieces from a common counter: first all
first pieces, then all second ones. Which programs share a scheduler then changes from piece to piece, and
sequences get on at about the same pace.

The state goes along in global memory: a program that has done a piece stores it and marks the piece done; the
one with the next piece has asked for its inputs already, and waits for the mark. Pieces are drawn in order,
by programs that run, so that the earliest piece that is not done is never waited for: programs need not run
at once. The order of sums does not depend on who does what.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ssm_dist.kernels.carveout import let_others_beside
from ssm_dist.kernels.gluon_form import SCHEDULERS, Form
from ssm_dist.kernels.gluon_item import item_at, load_states, opened, scanned, store_states

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # Triton 3.6 has the latter


@gluon.jit(do_not_specialize=["sequences", "items", "pieces", "piece_tokens", "group_blocks"])
def relay_kernel(
    x, dt, z, A_log, B, C, skip, dt_bias, y, state, seq_offsets, slots, between, progress,
    sequences, items, pieces, piece_tokens, channels, group_channels, group_blocks,
    x_row, dt_row, z_row, B_row, B_group, C_row, C_group, state_slot,
    N: gl.constexpr, EXTRA: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program: pieces of 16 channels of a sequence, until none of `items` is left.

    A sequence's last piece goes to its end, however far that is. between: (sequences, D, N), states;
    progress: zeros, how many pieces are done of each sequence's blocks of channels, then the next item.
    """
    HALF: gl.constexpr = y.dtype.element_ty == gl.float16
    blocks = group_blocks * (channels // group_channels)
    chains = sequences * blocks
    item = gl.atomic_add(progress + chains, 1, sem="relaxed")
    while item < items:
        piece = item // chains
        chain = item % chains
        sequence = chain // blocks
        first = gl.load(seq_offsets + sequence)
        last = gl.load(seq_offsets + sequence + 1)
        begin = first + piece * piece_tokens
        end = gl.where(piece == pieces - 1, last, gl.minimum(begin + piece_tokens, last))
        item = gl.atomic_add(progress + chains, 1, sem="relaxed")
        if begin < end:
            tokens = end - begin
            lane, channel, parameters, sources, rows, output = item_at(
                x, dt, z, A_log, B, C, skip, dt_bias, y, begin.to(gl.int64), chain % blocks,
                channels, group_channels, group_blocks,
                x_row, dt_row, z_row, B_row, B_group, C_row, C_group, N, 1, STAGES,
            )  # fmt: skip
            inside = lane[3]
            ahead = opened(lane, sources, rows, group_channels, tokens, STAGES, True)
            cell = channel * N + lane[1] * (N // 4)
            kept = state + (gl.load(slots + sequence).to(gl.int64) * state_slot + cell)
            handed = between + (sequence.to(gl.int64) * channels * N + cell)
            s = load_states(kept, inside & (piece == 0), N)
            if piece > 0:
                while gl.atomic_add(progress + chain, 0, sem="acquire") < piece:
                    pass
                s = load_states(handed, inside, N)
            s, _ = scanned(
                s, ahead, lane, parameters, sources, rows, output, channels, tokens,
                N, HALF, 1, EXTRA, STAGES, True,
            )  # fmt: skip
            async_copy.wait_group(0)  # what is under way beyond the end
            if end == last:
                store_states(kept, s, inside, N)
            else:
                store_states(handed, s, inside, N)
                _barrier()
                gl.atomic_add(progress + chain, 1, sem="release")


def relay(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    state: Tensor, seq_offsets: Tensor, slots: Tensor, form: Form,
) -> Tensor:  # fmt: skip
    """`selective_scan` in a form with pieces, for inputs that it `streams`."""
    (tokens, channels), (_, groups, states), sequences = x.shape, B.shape, slots.shape[0]
    y = x.new_empty(tokens, channels)
    if not tokens:
        return y
    group_blocks = -(-(channels // groups) // 16)
    chains = sequences * groups * group_blocks
    piece_tokens = 8 * -(-tokens // (8 * sequences * form.pieces))
    between = state.new_empty((sequences, channels, states), dtype=torch.float32)
    progress = slots.new_zeros(chains + 1)
    with torch.cuda.device_of(x):
        launched = relay_kernel[(min(chains * form.pieces, SCHEDULERS * -(-chains // SCHEDULERS)),)](
            x, dt, z, A_log, B, C, D, dt_bias, y, state, seq_offsets, slots, between, progress,
            sequences, chains * form.pieces, form.pieces, piece_tokens, channels, channels // groups, group_blocks,
            x.stride(0), dt.stride(0), z.stride(0), B.stride(0), B.stride(1), C.stride(0), C.stride(1),
            state.stride(0), N=states, EXTRA=form.extra, STAGES=form.stages,
            num_warps=1, maxnreg=form.registers, enable_fp_fusion=True,
        )  # fmt: skip
    let_others_beside(launched)
    return y
