"""transformers' JambaForCausalLM: Mamba layers, attention, and MLPs or experts split by columns."""

from ssm_dist.parallel.foreign_styles import (
    Adjusted,
    ChannelConv,
    PackedBlocks,
    PaddedVocabEmbedding,
    PaddedVocabHead,
    RowwiseReduce,
)
from ssm_dist.parallel.plan import Plan
from ssm_dist.parallel.splits import Blocks
from ssm_dist.parallel.styles import Colwise, Replicated

TRANSFORMERS_JAMBA_PLAN: Plan = {
    "model.embed_tokens": PaddedVocabEmbedding(),
    "model.layers.*.input_layernorm": Replicated(),
    "model.layers.*.pre_ff_layernorm": Replicated(),
    "model.layers.*.mamba": Adjusted({"A_log": 0, "D": 0}, divided=("intermediate_size",)),
    "model.layers.*.mamba.in_proj": PackedBlocks(),
    "model.layers.*.mamba.conv1d": ChannelConv(),
    "model.layers.*.mamba.x_proj": RowwiseReduce("x_proj"),
    "model.layers.*.mamba.dt_layernorm": Replicated(),
    "model.layers.*.mamba.b_layernorm": Replicated(),
    "model.layers.*.mamba.c_layernorm": Replicated(),
    "model.layers.*.mamba.dt_proj": Colwise(),
    "model.layers.*.mamba.out_proj": RowwiseReduce(),
    "model.final_layernorm": Replicated(),
    "lm_head": PaddedVocabHead(),
}

JAMBA_ATTENTION: Plan = {
    "model.layers.*.self_attn": Adjusted(
        divisible=("config.num_attention_heads", "config.num_key_value_heads")
    ),
    "model.layers.*.self_attn.q_proj": Colwise(),
    "model.layers.*.self_attn.k_proj": Colwise(),
    "model.layers.*.self_attn.v_proj": Colwise(),
    "model.layers.*.self_attn.o_proj": RowwiseReduce(),
}

JAMBA_MLP: Plan = {
    "model.layers.*.feed_forward.gate_proj": Colwise(),
    "model.layers.*.feed_forward.up_proj": Colwise(),
    "model.layers.*.feed_forward.down_proj": RowwiseReduce(),
}

JAMBA_EXPERTS: Plan = {
    "model.layers.*.feed_forward.router": Replicated(),
    "model.layers.*.feed_forward.experts": Adjusted(
        {"gate_up_proj": Blocks(1), "down_proj": 2}, divided=("intermediate_dim",), reduced="branch"
    ),
}
