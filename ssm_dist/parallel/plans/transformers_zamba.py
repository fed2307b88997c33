"""transformers' ZambaForCausalLM: in_proj's rows are interleaved, x_proj and dt_proj are per head.

With more ranks than Mamba heads, the ranks that share a head sum what its x_proj_weight is multiplied with.
"""

from ssm_dist.parallel.foreign_styles import (
    Adjusted,
    ChannelConv,
    Headwise,
    PackedPairs,
    PaddedVocabEmbedding,
    PaddedVocabHead,
    RowwiseReduce,
)
from ssm_dist.parallel.plan import Plan
from ssm_dist.parallel.styles import Colwise, Replicated


def _mixer(path: str) -> Plan:
    return {
        path: Headwise(
            {"x_proj_weight": 2, "dt_proj_weight": 1, "dt_proj_bias": 1, "A_log": 1, "D": 1},
            divided=("intermediate_size",),
            heads="n_mamba_heads",
            head_dim="mamba_head_dim",
            summed=("x_proj_weight",),
        ),
        f"{path}.in_proj": PackedPairs(),
        f"{path}.conv1d": ChannelConv(),
        f"{path}.out_proj": RowwiseReduce(),
    }


TRANSFORMERS_ZAMBA_PLAN: Plan = {
    "model.embed_tokens": PaddedVocabEmbedding(),
    "model.layers.*.input_layernorm": Replicated(),
    **_mixer("model.layers.*.mamba"),
    "model.layers.*.linear": Replicated(),
    "model.layers.*.mamba_decoder.input_layernorm": Replicated(),
    **_mixer("model.layers.*.mamba_decoder.mamba"),
    "model.layers.*.shared_transf.input_layernorm": Replicated(),
    "model.layers.*.shared_transf.self_attn": Adjusted(
        divisible=("config.num_attention_heads", "config.num_key_value_heads")
    ),
    "model.layers.*.shared_transf.self_attn.q_proj": Colwise(),
    "model.layers.*.shared_transf.self_attn.k_proj": Colwise(),
    "model.layers.*.shared_transf.self_attn.v_proj": Colwise(),
    "model.layers.*.shared_transf.self_attn.o_proj": RowwiseReduce(),
    "model.layers.*.shared_transf.pre_ff_layernorm": Replicated(),
    "model.layers.*.shared_transf.feed_forward.gate_proj": Colwise(),
    "model.layers.*.shared_transf.feed_forward.up_proj": Colwise(),
    "model.layers.*.shared_transf.feed_forward.down_proj": RowwiseReduce(),
    "model.final_layernorm": Replicated(),
    "lm_head": PaddedVocabHead(),
}
