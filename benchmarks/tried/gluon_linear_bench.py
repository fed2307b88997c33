import sys, json, time, torch, functools
sys.path.insert(0, "benchmarks/tried")
import torch.nn.functional as F
import gluon_linear as sk
from benchmarks.decode_kernels import random_model, step_of
from ssm_dist import kernels
from ssm_dist.kernels import backend, tuning, triton_linear
from ssm_dist.kernel_benchmark.clock import Clock
end = time.monotonic() + float(sys.argv[1])
device = torch.device("cuda"); backend.select("triton", device); clock = Clock(device)
torch.manual_seed(0)
def time_of(make, weights):
    return 1e6 * clock.seconds([functools.partial(make, w) for w in weights])
def weights_of(N, K):
    return [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(max(2, round(300e6 / (2 * N * K))))]
CASES = [(10240, 2560), (2560, 5120), (192, 5120)]
CONF = {
 (10240, 2560): [(64,16,64,12,1),(64,16,64,6,1),(64,0,64,6,1),(128,0,64,8,1),(128,32,64,7,2),(64,16,128,6,1),(64,16,128,3,1)],
 (2560, 5120): [(64,0,64,12,3),(64,0,64,6,3),(32,8,64,16,2),(32,8,64,8,2),(64,16,64,12,4),(64,16,64,5,4),(32,0,64,8,3),(64,0,128,6,3)],
 (192, 5120): [(16,0,64,8,10),(8,0,64,16,5),(16,0,64,16,5),(32,0,64,5,16),(16,0,64,4,20),(64,0,64,4,20),(64,0,64,8,10)],
}
best = {}
with torch.inference_mode():
    for rows in (64, 16):
        for N, K in CASES:
            weights = weights_of(N, K)
            x = torch.randn(rows, K, device="cuda", dtype=torch.bfloat16)
            base = {"N": N, "K": K, "rows": rows, "torch": time_of(lambda w: F.linear(x, w), weights)}
            base["now"] = time_of(lambda w: kernels.linear(x, w), weights)
            print(json.dumps(base), flush=True)
            found = []
            for c in CONF[(N, K)]:
                if time.monotonic() > end: print("out of time"); sys.exit()
                call = lambda w, **k: sk.linear(x, w, *c, **k)
                try:
                    y = call(weights[0]); exact = x.double() @ weights[0].double().T
                    err = ((y - exact).norm() / exact.norm()).item()
                    r = {"config": c, "err": round(err, 5), "us": round(time_of(call, weights), 2)}
                    found.append((r["us"], c))
                    r["no_pdl"] = round(time_of(functools.partial(call, pdl=False), weights), 2)
                    if rows == 64:
                        r["no_x"] = round(time_of(functools.partial(call, with_x=False), weights), 2)
                except Exception as e:
                    r = {"config": c, "failed": repr(e)[:300]}
                print(json.dumps(r), flush=True)
            best[rows, N, K] = [c for _, c in sorted(found)]
    # whole steps
    model = random_model("mamba-2.8b")
    real = triton_linear.linear
    use = {}
    def linear(x, weight, bias):
        c = use.get(tuple(weight.shape)) if x.dim() == 2 and x.shape[0] <= 64 and x.stride(1) == 1 and weight.is_contiguous() else None
        return real(x, weight, bias) if c is None or bias is not None else sk.linear(x, weight, *c)
    backend.register("linear", "triton")(linear)
    IN, OUT, XP, HEAD = (10240, 2560), (2560, 5120), (192, 5120), (50280, 2560)
    for s in (64, 16, 32, 8):
        rows = 16 if s < 32 else 64
        step = step_of(model, s)[0]
        b = {k: best[rows, *k] for k in (IN, OUT, XP)}
        combos = [("now", {})] + [(f"in {c}", {IN: c}) for c in b[IN][:4]] + [(f"out {c}", {OUT: c}) for c in b[OUT][:4]] + [(f"x {c}", {XP: c}) for c in b[XP][:2]]
        combos += [("in out", {IN: b[IN][0], OUT: b[OUT][0]}), ("all", {k: b[k][0] for k in (IN, OUT, XP)}), ("head too", {**{k: b[k][0] for k in (IN, OUT, XP)}, HEAD: (128, 0, 64, 8, 1)}), ("now", {})]
        for name, config in combos:
            if time.monotonic() > end: print("out of time"); sys.exit()
            use.clear(); use.update(config)
            print(json.dumps({"sequences": s, "with": name, "ms": round(1e3 * clock.seconds([step]), 4)}), flush=True)
