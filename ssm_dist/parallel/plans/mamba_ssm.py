"""mamba-ssm's MambaLMHeadModel with Mamba-1 mixers, as of its release 2.3.

Its fused path takes whole weights and no reduction, hence use_fast_path=False. It sizes its cache by
d_model * expand, and uses d_model for nothing else, so the mixer's d_model becomes the rank's part.
"""

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

MAMBA_SSM_PLAN: Plan = {
    "backbone.embedding": PaddedVocabEmbedding(),
    "backbone.layers.*.norm": Replicated(),
    "backbone.layers.*.mixer": Adjusted(
        {"A_log": 0, "D": 0}, divided=("d_inner", "d_model"), values={"use_fast_path": False}
    ),
    "backbone.layers.*.mixer.in_proj": PackedBlocks(),
    "backbone.layers.*.mixer.conv1d": ChannelConv(),
    "backbone.layers.*.mixer.x_proj": RowwiseReduce("x_proj"),
    "backbone.layers.*.mixer.dt_proj": Colwise(),
    "backbone.layers.*.mixer.out_proj": RowwiseReduce(),
    "backbone.norm_f": Replicated(),
    "lm_head": PaddedVocabHead(),
}

MAMBA_SSM_MLP: Plan = {
    "backbone.layers.*.norm2": Replicated(),
    "backbone.layers.*.mlp.fc1": PackedBlocks(),
    "backbone.layers.*.mlp.fc2": RowwiseReduce(),
}
