import functools, torch, triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from ssm_dist.kernels.triton_shares import COUNTERS, counters

@gluon.jit
def last_to_finish(counter, programs):
    gl.thread_barrier()
    last = gl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
    if last:
        gl.store(counter, 0)
    return last

@gluon.jit
def expect(bar, BYTES: gl.constexpr, pred):
    mbarrier.expect(bar, BYTES, pred)

@gluon.jit
def fetch_w(w1, w2, W1, W2, bar, first, at, stage, pred, P1: gl.constexpr, P2: gl.constexpr):
    tma.async_copy_global_to_shared(w1, [first, at], bar, W1.index(stage), pred)
    if P2 > 0:
        tma.async_copy_global_to_shared(w2, [first + P1, at], bar, W2.index(stage), pred)

@gluon.jit
def finish(total, y, parts, first, columns, tokens, share, last, SHARES: gl.constexpr, STORE: gl.constexpr, P: gl.constexpr, ACC: gl.constexpr):
    n = first + gl.arange(0, P, gl.SliceLayout(0, ACC))
    t = gl.arange(0, 64, gl.SliceLayout(1, ACC))
    cell = t.to(gl.int64)[:, None] * columns + n[None, :]
    inside = (t < tokens)[:, None] & (n < columns)[None, :]
    size = tokens.to(gl.int64) * columns
    if STORE:
        gl.store(parts + share * size + cell, total, mask=inside)
    else:
        if SHARES > 1:
            loaded = ()
            for other in gl.static_range(SHARES):
                loaded += (gl.load(parts + other * size + cell, mask=inside, other=0.0, cache_modifier=".cg"),)
            total = loaded[0]
            for other in gl.static_range(1, SHARES):
                total += loaded[other]
        gl.store(y + cell, total.to(y.dtype.element_ty), mask=inside)

@gluon.jit(do_not_specialize=["tokens","steps","span"])
def skinny(w1, w2, xd, y, parts, counters, tokens, columns, steps, span,
           P1: gl.constexpr, P2: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
           SHARES: gl.constexpr, PDL: gl.constexpr, WITH_X: gl.constexpr):
    X_BYTES: gl.constexpr = 64 * BLOCK_K * 2 if WITH_X else 0
    BYTES: gl.constexpr = (P1 + P2) * BLOCK_K * 2 + X_BYTES
    if PDL:
        gdc_launch_dependents()
    tile = gl.program_id(0) // SHARES
    share = gl.program_id(0) % SHARES
    begin = share * span
    count = gl.minimum(span, steps - begin)
    first = tile * (P1 + P2)
    W1 = gl.allocate_shared_memory(w1.dtype, [STAGES, P1, BLOCK_K], w1.layout)
    W2 = W1
    if P2 > 0:
        W2 = gl.allocate_shared_memory(w2.dtype, [STAGES, P2, BLOCK_K], w2.layout)
    X = gl.allocate_shared_memory(w1.dtype, [STAGES, 64, BLOCK_K], xd.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bars.index(s), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.expect(bars.index(s), BYTES, s < count)
        fetch_w(w1, w2, W1, W2, bars.index(s), first, (begin + s) * BLOCK_K, s, s < count, P1, P2)
    if PDL:
        gdc_wait()
    if WITH_X:
        for s in gl.static_range(STAGES):
            tma.async_copy_global_to_shared(xd, [0, (begin + s) * BLOCK_K], bars.index(s), X.index(s), s < count)
    ACC1: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, P1, 16])
    ACC2: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, P2 if P2 > 0 else P1, 16])
    acc1 = gl.zeros([64, P1], gl.float32, ACC1)
    acc2 = acc1
    if P2 > 0:
        acc2 = gl.zeros([64, P2], gl.float32, ACC2)
    for i in range(count):
        stage = i % STAGES
        mbarrier.wait(bars.index(stage), (i // STAGES) & 1)
        acc1 = warpgroup_mma(X.index(stage), W1.index(stage).permute((1, 0)), acc1, is_async=True)
        if P2 > 0:
            acc2 = warpgroup_mma(X.index(stage), W2.index(stage).permute((1, 0)), acc2, is_async=True)
            acc1, acc2 = warpgroup_mma_wait(2, deps=[acc1, acc2])
        else:
            acc1 = warpgroup_mma_wait(1, deps=[acc1])
        following = i - 1 + STAGES
        more = (i > 0) & (following < count)
        old = (i + STAGES - 1) % STAGES
        at = (begin + following) * BLOCK_K
        mbarrier.expect(bars.index(old), BYTES, more)
        fetch_w(w1, w2, W1, W2, bars.index(old), first, at, old, more, P1, P2)
        if WITH_X:
            tma.async_copy_global_to_shared(xd, [0, at], bars.index(old), X.index(old), more)
    if P2 > 0:
        acc1, acc2 = warpgroup_mma_wait(0, deps=[acc1, acc2])
    else:
        acc1 = warpgroup_mma_wait(0, deps=[acc1])
    for s in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(s))
    if SHARES > 1:
        finish(acc1, y, parts, first, columns, tokens, share, True, SHARES, True, P1, ACC1)
        if P2 > 0:
            finish(acc2, y, parts, first + P1, columns, tokens, share, True, SHARES, True, P2, ACC2)
        if last_to_finish(counters + tile, SHARES):
            finish(acc1, y, parts, first, columns, tokens, share, True, SHARES, False, P1, ACC1)
            if P2 > 0:
                finish(acc2, y, parts, first + P1, columns, tokens, share, True, SHARES, False, P2, ACC2)
    else:
        finish(acc1, y, parts, first, columns, tokens, share, True, 1, False, P1, ACC1)
        if P2 > 0:
            finish(acc2, y, parts, first + P1, columns, tokens, share, True, 1, False, P2, ACC2)

@functools.cache
def layout(*block):
    return gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)

def describe(t, block):
    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(block), layout(*block))

def linear(x, weight, P1, P2, BLOCK_K, STAGES, SHARES, pdl=True, with_x=True):
    (tokens, width), columns = x.shape, weight.shape[0]
    y = x.new_empty((tokens, columns))
    steps = triton.cdiv(width, BLOCK_K)
    tiles = triton.cdiv(columns, P1 + P2)
    span = triton.cdiv(steps, SHARES)
    assert triton.cdiv(steps, span) == SHARES and tiles <= COUNTERS
    parts = y if SHARES == 1 else x.new_empty((SHARES, tokens, columns), dtype=torch.float32)
    w1 = describe(weight, (P1, BLOCK_K))
    skinny[(tiles * SHARES,)](w1, describe(weight, (P2, BLOCK_K)) if P2 else w1, describe(x, (64, BLOCK_K)), y, parts, counters(x.device),
        tokens, columns, steps, span, P1=P1, P2=P2, BLOCK_K=BLOCK_K, STAGES=STAGES,
        SHARES=SHARES, PDL=pdl, WITH_X=with_x, num_warps=4, launch_pdl=pdl)
    return y
