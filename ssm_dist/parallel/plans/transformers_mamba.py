"""transformers' MambaForCausalLM and FalconMambaForCausalLM, whose modules have the same names."""

from ssm_dist.parallel.foreign_styles import (
    Adjusted,
    ChannelConv,
    PackedBlocks,
    PaddedVocabEmbedding,
    PaddedVocabHead,
    RowwiseReduce,
)
from ssm_dist.parallel.plan import Plan
from ssm_dist.parallel.styles import Colwise, Replicated

TRANSFORMERS_MAMBA_PLAN: Plan = {
    "backbone.embeddings": PaddedVocabEmbedding(),
    "backbone.layers.*.norm": Replicated(),
    "backbone.layers.*.mixer": Adjusted({"A_log": 0, "D": 0}, divided=("intermediate_size",)),
    "backbone.layers.*.mixer.in_proj": PackedBlocks(),
    "backbone.layers.*.mixer.conv1d": ChannelConv(),
    "backbone.layers.*.mixer.x_proj": RowwiseReduce("x_proj"),
    "backbone.layers.*.mixer.dt_proj": Colwise(),
    "backbone.layers.*.mixer.out_proj": RowwiseReduce(),
    "backbone.norm_f": Replicated(),
    "lm_head": PaddedVocabHead(),
}
