"""Floor 2: the mesh, the styles, the plans and the reductions. Knows modules by their path only."""

from ssm_dist.parallel.checking import check_plan
from ssm_dist.parallel.collectives import Reductions, Wire
from ssm_dist.parallel.foreign import shard_module
from ssm_dist.parallel.foreign_styles import (
    Adjusted,
    ChannelConv,
    Headwise,
    PackedBlocks,
    PackedPairs,
    PaddedVocabEmbedding,
    PaddedVocabHead,
    RowwiseReduce,
)
from ssm_dist.parallel.mesh import TensorParallel
from ssm_dist.parallel.plan import (
    ParameterPlacement,
    Plan,
    ResolvedPlan,
    apply_plan,
    localise,
    resolve_plan,
)
from ssm_dist.parallel.plans.ready import plan_for
from ssm_dist.parallel.splits import Along, Blocks, Groups, WithinHeads
from ssm_dist.parallel.styles import (
    Colwise,
    ColwiseBeforeScan,
    HeadwiseReduce,
    PackedColwise,
    ReduceAddNorm,
    Replicated,
    Rowwise,
    Sharded,
    Style,
)
from ssm_dist.parallel.vocabulary import VocabParallelEmbedding, VocabParallelHead

__all__ = [
    "Adjusted",
    "Along",
    "Blocks",
    "ChannelConv",
    "Colwise",
    "ColwiseBeforeScan",
    "Groups",
    "Headwise",
    "HeadwiseReduce",
    "PackedBlocks",
    "PackedColwise",
    "PackedPairs",
    "PaddedVocabEmbedding",
    "PaddedVocabHead",
    "ParameterPlacement",
    "Plan",
    "ReduceAddNorm",
    "Reductions",
    "Replicated",
    "ResolvedPlan",
    "Rowwise",
    "RowwiseReduce",
    "Sharded",
    "Style",
    "TensorParallel",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "Wire",
    "WithinHeads",
    "apply_plan",
    "check_plan",
    "localise",
    "plan_for",
    "resolve_plan",
    "shard_module",
]
