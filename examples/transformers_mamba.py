"""transformers' Mamba, sharded in place by our plan and driven by its own generate.

    torchrun --standalone --nproc-per-node 2 examples/transformers_mamba.py     # needs transformers

A tiny one with random weights, or `--model state-spaces/mamba-130m-hf`. Every rank loads the whole model,
and keeps its shard.
"""

import argparse

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from ssm_dist.parallel import TensorParallel, shard_module


def load(name: str | None) -> torch.nn.Module:
    """The whole model, on the CPU."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name).eval()
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=36, num_hidden_layers=3)).eval()


def main() -> None:
    """Shard, generate, and compare with the whole model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder or hub id of a MambaForCausalLM")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tp = TensorParallel.over_all_ranks(device.type)

    whole, model = load(options.model), load(options.model)
    shard_module(model, tp)  # the plan is found from the class

    prompt = torch.tensor([[5, 17, 42, 3]])
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 16, "do_sample": False}
    expected = whole.generate(prompt, **settings)
    settings["attention_mask"] = settings["attention_mask"].to(device)
    written = model.generate(prompt.to(device), **settings)
    if tp.rank == 0:
        held, total = (sum(p.numel() for p in m.parameters()) for m in (model, whole))
        print(f"{held} of {total} parameters on each of {tp.degree} ranks")
        print("tokens:", written[0].tolist())
        print("as in one process:", torch.equal(written.cpu(), expected))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
