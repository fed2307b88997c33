"""Mamba: channels split everywhere, two reductions a layer (x_proj's small one, and one at the next norm)."""

from ssm_dist.parallel.plan import Plan
from ssm_dist.parallel.styles import (
    ColwiseBeforeScan,
    HeadwiseReduce,
    PackedColwise,
    ReduceAddNorm,
    Rowwise,
    Sharded,
)
from ssm_dist.parallel.vocabulary import VocabParallelEmbedding, VocabParallelHead

MIXER_PLAN: Plan = {
    "layers.*.mixer": Sharded({"A_log": 0, "D": 0}),
    "layers.*.mixer.in_proj": PackedColwise(),
    "layers.*.mixer.conv": Sharded({"weight": 0, "bias": 0}),
    "layers.*.mixer.x_proj": HeadwiseReduce(),
    "layers.*.mixer.dt_proj": ColwiseBeforeScan(),
    "layers.*.mixer.out_proj": Rowwise(before_norm=True),
}

MAMBA_PLAN: Plan = {
    "embedding": VocabParallelEmbedding(),
    "layers.*.norm": ReduceAddNorm(may_split=True),
    **MIXER_PLAN,
    "final_norm": ReduceAddNorm(may_split=True),
    "head": VocabParallelHead(),
}
