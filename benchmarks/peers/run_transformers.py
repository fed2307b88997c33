"""transformers' own classes and `generate`, on one GPU, with the kernels that they find.

    PYTHONPATH=. python benchmarks/peers/run_transformers.py --models zamba-7b --out outputs/hf.json

Weights are random, bfloat16, of the real shapes. The classes take mamba-ssm's and causal-conv1d's kernels
where those are installed, and loop over tokens in Python else: then most cases run out of --case-seconds.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
from contextlib import suppress

import torch
from measure import Peer, measure, new_document, parser, write

from ssm_dist.registry import preset

CASES = {
    "mamba-2.8b": ["1x16+17", "64x16+17", "1x2048+1", "1x8192+1", "8x2048+1", "64x2048+1"],
    "falcon-mamba-7b": ["1x16+17", "64x16+17", "1x2048+1", "1x8192+1"],
    "zamba-7b": ["1x16+17", "1x2048+1", "1x8192+1"],
}


def build(name: str) -> Peer:
    """A preset of ours as transformers' class of that architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields = preset(name)[1].to_huggingface()
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.to_empty(device=device)
    model.tie_weights()  # which to_empty undoes
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.normal_(std=0.02)
    asked = {"do_sample": False, "use_cache": True, "pad_token_id": 0}
    return Peer(
        name,
        lambda ids, new: model.generate(ids, max_new_tokens=new, min_new_tokens=new, **asked),
        {"forward": lambda ids: model(ids, use_cache=True, logits_to_keep=1)},
    )


def main() -> None:
    """Measure all models; the last line is the document."""
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", default=list(CASES), help="presets")
    options = arguments.parse_args()
    versions = {}
    for name in ("mamba-ssm", "causal-conv1d", "kernels"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    document = new_document("transformers", importlib.metadata.version("transformers"), **versions)
    for name in options.models:
        measure(build(name), document, options, CASES.get(name, ["1x8+3"]))
        gc.collect()
    write(document, options.out)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
