"""Floor 2: the mesh, the styles, the plans and the reductions. Knows modules by their path only."""

from ssm_dist.parallel.mesh import TensorParallel
from ssm_dist.parallel.plan import (
    ParameterPlacement,
    Plan,
    ResolvedPlan,
    apply_plan,
    localise,
    resolve_plan,
)
from ssm_dist.parallel.styles import (
    Colwise,
    HeadwiseReduce,
    PackedColwise,
    ReduceAdd,
    ReduceAddNorm,
    Replicated,
    Rowwise,
    Sharded,
    Style,
    VocabParallelEmbedding,
    VocabParallelHead,
)

__all__ = [
    "Colwise",
    "HeadwiseReduce",
    "PackedColwise",
    "ParameterPlacement",
    "Plan",
    "ReduceAdd",
    "ReduceAddNorm",
    "Replicated",
    "ResolvedPlan",
    "Rowwise",
    "Sharded",
    "Style",
    "TensorParallel",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "apply_plan",
    "localise",
    "resolve_plan",
]
