"""The states' kernel by cache hints."""
import importlib.util, json, sys, time, torch, pathlib
from benchmarks.decode_kernels import random_model, step_of
from ssm_dist.kernel_benchmark.clock import Clock
from ssm_dist.kernels import backend, triton_projected_update as tpu, triton_projected_update_many as many
SRC = pathlib.Path(many.__file__).read_text()
LOAD = "before = tl.load(cells, mask=mine, other=0.0)"
STORE = "tl.store(cells, new.to(state.dtype.element_ty), mask=mine)"
assert SRC.count(LOAD) == 1 and SRC.count(STORE) == 1
def variant(name, load, store):
    path = pathlib.Path(f"/tmp/many_{name}.py")
    path.write_text(SRC.replace(LOAD, LOAD[:-1] + load + ")").replace(STORE, STORE[:-1] + store + ")"))
    spec = importlib.util.spec_from_file_location(f"many_{name}", path); m = importlib.util.module_from_spec(spec)
    sys.modules[f"many_{name}"] = m; spec.loader.exec_module(m); return m
V = {"now": many}
for n, l, s in (("lef", ', eviction_policy="evict_first"', ""), ("sef", "", ', eviction_policy="evict_first"'), ("both", ', eviction_policy="evict_first"', ', eviction_policy="evict_first"'), ("cs", "", ', cache_modifier=".cs"'), ("lefcs", ', eviction_policy="evict_first"', ', cache_modifier=".cs"'), ("cg", ', cache_modifier=".cg"', ""), ("wt", "", ', cache_modifier=".wt"')):
    V[n] = variant(n, l, s)
with torch.inference_mode():
    device = torch.device("cuda"); backend.select("triton", device); clock = Clock(device)
    end = time.monotonic() + float(sys.argv[1])
    for name, seqs in (("mamba-2.8b", (64, 256, 32)), ("falcon-mamba-7b", (64, 256))):
        model = random_model(name)
        for s in seqs:
            step = step_of(model, s)[0]
            for v, m in [*V.items(), ("now", many)]:
                if time.monotonic() > end: raise SystemExit("out of time")
                tpu.triton_projected_update_many = m
                try: print(json.dumps({"model": name, "sequences": s, "hints": v, "ms": round(1e3 * clock.seconds([step]), 4)}), flush=True)
                except Exception as e: print(v, repr(e)[:200], flush=True)
        del model, step
