"""What a warp of the selective scan needs for an item, a run of tokens of one sequence (Gluon, for sm_90)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ssm_dist.kernels.gluon_stream import open_tiles, stream
from ssm_dist.kernels.gluon_warp import LOG2_E, advance, lanes


@gluon.jit
def load_states(pointer, wanted, N: gl.constexpr):
    """A lane's states of its two channels, by channel, tile and column; pointer: its first."""
    H: gl.constexpr = N // 8
    s = ()
    for k in gl.static_range(4 * H):
        at = pointer + (k // (2 * H) * N + k % 2 * H + k // 2 % H)
        s += (gl.load(at, mask=wanted, other=0.0).to(gl.float32),)
    return s


@gluon.jit
def store_states(pointer, s, wanted, N: gl.constexpr):
    """The other way round."""
    H: gl.constexpr = N // 8
    for k in gl.static_range(4 * H):
        at = pointer + (k // (2 * H) * N + k % 2 * H + k // 2 % H)
        gl.store(at, s[k].to(pointer.dtype.element_ty), mask=wanted)


@gluon.jit
def item_at(
    x, dt, z, A_log, B, C, skip, dt_bias, y, token, block, channels, group_channels, group_blocks,
    x_row, dt_row, z_row, B_row, B_group, C_row, C_group,
    N: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Of a program's channels, from a token on: lane, first channel, parameters, sources, rows, output.

    lane: g, i, the program's first channel in its group, whether the lane has channels. parameters: A in
    units of log2, dt's bias, D. sources, rows: of x, dt, z, B, C, and their strides; of the first token and
    group with STAGES, otherwise of what the lane loads first.
    """
    thread = gl.arange(0, 32 * WARPS, lanes(WARPS))
    g = thread % 8
    i = thread // 8 % 4
    group = block // group_blocks
    start = block % group_blocks * (16 * WARPS)
    within = start + thread // 32 * 16 + 2 * g
    inside = within < group_channels
    channel = group * group_channels + within
    rows = (x_row, dt_row, z_row, B_row, C_row)
    sources = (
        x + token * x_row + group * group_channels,
        dt + token * dt_row + group * group_channels,
        z + token * z_row + group * group_channels,
        B + token * B_row + group * B_group,
        C + token * C_row + group * C_group,
    )
    if not STAGES:
        sources = (
            x + token * x_row + (i * x_row + channel),
            dt + token * dt_row + (i * dt_row + channel),
            z + token * z_row + (i * z_row + channel),
            B + token * B_row + group * B_group + (i * B_row + N // 8 * g),
            C + token * C_row + group * C_group + ((g // 2 + g % 2 * 4) * C_row + N // 4 * i),
        )
    bias = (
        gl.load(dt_bias + channel, mask=inside, other=0.0).to(gl.float32),
        gl.load(dt_bias + channel + 1, mask=inside, other=0.0).to(gl.float32),
    )
    through = (
        gl.load(skip + channel, mask=inside, other=0.0).to(gl.float32),
        gl.load(skip + channel + 1, mask=inside, other=0.0).to(gl.float32),
    )
    logarithms = load_states(A_log + channel * N + i * (N // 4), inside, N)
    A = ()
    for k in gl.static_range(N // 2):
        A += (gl.exp(logarithms[k]) * -LOG2_E,)
    output = y + token * channels + (i * channels + channel)
    return (g, i, start, inside), channel, (A, bias, through), sources, rows, output


@gluon.jit
def opened(
    lane, sources, rows, group_channels, tokens, STAGES: gl.constexpr, OUTPUT: gl.constexpr
):  # fmt: skip
    """Copies of the first tokens that are under way; nothing where they are loaded into registers."""
    return open_tiles(sources, rows, lane[2], group_channels, tokens, STAGES, OUTPUT) if STAGES else ()


@gluon.jit
def scanned(
    s, ahead, lane, parameters, sources, rows, output, y_row, tokens, N: gl.constexpr, HALF: gl.constexpr,
    DEPTH: gl.constexpr, EXTRA: gl.constexpr, STAGES: gl.constexpr, OUTPUT: gl.constexpr,
):  # fmt: skip
    """The states after an item, whose output is stored with OUTPUT, and otherwise sums of dt as `advance`'s.

    ahead: what `opened` gave.
    """
    A, bias, through = parameters
    if STAGES:
        s, passed = stream(
            s, ahead, A, output, y_row, bias, through, lane, tokens, HALF, STAGES, EXTRA, OUTPUT
        )
    else:
        s, passed = advance(
            s, A, sources, rows, output, y_row, bias, through, lane, tokens, N, HALF, DEPTH, EXTRA, OUTPUT
        )
    return s, passed
