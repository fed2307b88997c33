"""Steps by what is fetched ahead."""
import itertools, json, sys, time, torch
from benchmarks.decode_kernels import random_model, step_of
from ssm_dist.kernel_benchmark.clock import Clock
from ssm_dist.kernels import backend
from ssm_dist.kernels.dependent_launch import EXPERIMENT
M=10**6
def main(model_name, seqs, seconds):
    device=torch.device("cuda"); backend.select("triton",device); clock=Clock(device)
    model=random_model(model_name); end=time.monotonic()+seconds
    cases=[dict(),
      dict(conv=8*M),dict(conv=16*M),dict(conv=27*M),dict(conv=27*M,after=False),
      dict(norm=4*M),dict(norm=8*M),dict(norm=16*M),dict(norm=8*M,after=False),dict(norm=16*M,after=False),
      dict(update=8*M),dict(update=16*M),dict(update=27*M),dict(update=27*M,after=False),
      dict(conv=16*M,norm=8*M),dict(conv=27*M,norm=16*M),dict(conv=16*M,update=27*M,norm=8*M),dict(conv=40*M, norm=24*M),dict(conv=16*M,norm=8*M,after=False),dict(conv=27*M,norm=16*M,after=False),dict()]
    for s in seqs:
        step=step_of(model,s)[0]
        for c in cases:
            if time.monotonic()>end: print("out of time"); return
            EXPERIMENT.update({"conv":0,"norm":0,"update":0,"after":True,"spare":132}); EXPERIMENT.update(c)
            print(json.dumps({"model":model_name,"sequences":s,**c,"ms":round(1e3*clock.seconds([step]),4)}),flush=True)
with torch.inference_mode(): main(sys.argv[1],[int(a) for a in sys.argv[3:]],float(sys.argv[2]))
