"""What the fetching warp of `gluon_layers` and `gluon_layers_few` does (Gluon, sm_90)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ssm_dist.kernels.gluon_layers_steps import FIELDS, IN, OUT
from ssm_dist.kernels.gluon_ring import WARPS, fetch, wait_for


@gluon.jit
def fetch_all(
    ring, anchor, table, layers,
    P: gl.constexpr, H: gl.constexpr, D: gl.constexpr,
    CHUNKS: gl.constexpr, SLOTS: gl.constexpr, AHEAD: gl.constexpr, SPLIT: gl.constexpr = 1,
):  # fmt: skip
    """One warp: the pieces of in_proj's x rows, its z rows and out_proj's rows, layer by layer.

    SPLIT: into so many parts, of one piece each, out_proj's width is split among neighbouring programs.
    """
    PARTS_IN: gl.constexpr = (H + 256 * CHUNKS - 1) // (256 * CHUNKS)
    PARTS_OUT: gl.constexpr = 1 if SPLIT > 1 else (D + 256 * CHUNKS - 1) // (256 * CHUNKS)
    OWN_IN: gl.constexpr = (D + P - 1) // P
    OWN_OUT: gl.constexpr = (H + P - 1) // P * SPLIT
    HALF: gl.constexpr = (OWN_IN + WARPS - 1) // WARPS * PARTS_IN
    ALL: gl.constexpr = 2 * HALF + (OWN_OUT + WARPS - 1) // WARPS * PARTS_OUT
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    base = anchor.to(gl.int64)
    program = gl.program_id(0)
    slot, phase, number = 0, 0, 0
    arrived, arrived_phase = 0, 0
    for layer in range(layers):
        inward = base + gl.load(table + (layer * FIELDS + IN)) * 4
        outward = base + gl.load(table + (layer * FIELDS + OUT)) * 4
        for piece in range(ALL):
            out = piece >= 2 * HALF
            gate = (piece >= HALF) & (piece < 2 * HALF)
            here = gl.where(out, piece - 2 * HALF, piece % HALF)
            parts, own = gl.where(out, PARTS_OUT, PARTS_IN), gl.where(out, OWN_OUT, OWN_IN)
            local = here // parts * WARPS + lane
            row = gl.where(out, program // SPLIT, program) * own + local
            exists = (local < own) & (row < gl.where(out, H, D))
            row = (row + gl.where(gate, D, 0)).to(gl.int64)
            width, begin = gl.where(out, 2 * D, 2 * H), here % parts * (CHUNKS * 512)
            if SPLIT > 1:
                begin = gl.where(out, program % SPLIT * (CHUNKS * 512), begin)
            source = gl.where(out, outward, inward) + row * width + begin
            size = gl.where(exists, gl.minimum(width - begin, CHUNKS * 512), 0)
            if number >= AHEAD:
                wait_for(ring[1] + arrived * 8, arrived_phase, lane)
                arrived_phase = gl.where(arrived == SLOTS - 1, arrived_phase ^ 1, arrived_phase)
                arrived = gl.where(arrived == SLOTS - 1, 0, arrived + 1)
            wait_for(ring[2] + slot * 8, phase ^ 1, lane)
            fetch(ring, slot, source, size, CHUNKS)
            number += 1
            phase = gl.where(slot == SLOTS - 1, phase ^ 1, phase)
            slot = gl.where(slot == SLOTS - 1, 0, slot + 1)
