"""Swapping only the reduction in somebody else's Llama-style model: its sums travel in 8 bits a number.

    torchrun --standalone --nproc-per-node 2 examples/own_reductions.py     # needs transformers

The plan is the ordinary one of columns and rows; what is ours is how the partial sums of o_proj and down_proj
meet. The same is had for every plan at once by TensorParallel.over_all_ranks(device, Reductions(branch=...)).
"""

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from ssm_dist.parallel import (
    Adjusted,
    Colwise,
    PaddedVocabEmbedding,
    PaddedVocabHead,
    Plan,
    Replicated,
    RowwiseReduce,
    TensorParallel,
    Wire,
    shard_module,
)


def llama_plan(wire: Wire) -> Plan:
    """Columns and rows; sums travel as `wire` says."""
    return {
        "model.embed_tokens": PaddedVocabEmbedding(),
        "model.layers.*.*_layernorm": Replicated(),
        "model.layers.*.self_attn": Adjusted(
            divisible=("config.num_attention_heads", "config.num_key_value_heads")
        ),
        "model.layers.*.self_attn.q_proj": Colwise(),
        "model.layers.*.self_attn.k_proj": Colwise(),
        "model.layers.*.self_attn.v_proj": Colwise(),
        "model.layers.*.self_attn.o_proj": RowwiseReduce(wire),
        "model.layers.*.mlp.gate_proj": Colwise(),
        "model.layers.*.mlp.up_proj": Colwise(),
        "model.layers.*.mlp.down_proj": RowwiseReduce(wire),
        "model.norm": Replicated(),
        "lm_head": PaddedVocabHead(),
    }


def llama() -> LlamaForCausalLM:
    """A tiny model, the same on every rank."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=160, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def main() -> None:
    """Perplexity-like numbers of the whole model, and of shards that sum exactly and in 8 bits."""
    tp = TensorParallel.over_all_ranks("cpu")
    tokens = torch.arange(40).view(2, 20)
    whole = llama()(tokens).logits
    for wire in (Wire(), Wire("int8", group_size=32)):
        model = llama()
        shard_module(model, tp, llama_plan(wire))
        off = (model(tokens).logits - whole).norm() / whole.norm()
        if tp.rank == 0:
            print(f"reductions {wire.codec}: {off:.1e} off the whole model, relative to its logits")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
