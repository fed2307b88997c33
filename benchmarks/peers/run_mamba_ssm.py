"""mamba-ssm's own generation, on one GPU: decode from its CUDA graphs, prefill by its kernels.

    PYTHONPATH=. python benchmarks/peers/run_mamba_ssm.py --out outputs/mamba_ssm.json

Weights are random, bfloat16, of the real shapes. It keeps bfloat16 states where ours are float32. Needs
mamba-ssm and causal-conv1d (see build.sh), einops and transformers.
"""

from __future__ import annotations

import importlib.metadata
import json

import torch
from measure import Peer, measure, new_document, parser, write

from ssm_dist.registry import preset

CASES = ["1x16+129", "64x16+65", "256x16+33", "1x2048+1", "1x8192+1", "1x32768+1", "8x2048+1", "256x128+1"]
CASES += ["64x2048+128"]


def build(name: str) -> Peer:
    """A preset of ours as `MambaLMHeadModel`."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    sizes = preset(name)[1]
    config = MambaConfig(d_model=sizes.d_model, n_layer=sizes.n_layers, vocab_size=sizes.vocab_size)
    model = MambaLMHeadModel(config, device="cuda", dtype=torch.bfloat16).eval()
    shape = None

    def generate(ids: torch.Tensor, new_tokens: int) -> None:
        nonlocal shape
        if shape != ids.shape:  # its states are of the batch that they were made for
            model._decoding_cache, shape = None, ids.shape
        model.generate(ids, max_length=ids.shape[1] + new_tokens, cg=True)

    return Peer(name, generate, {"forward without states": lambda ids: model(ids, num_last_tokens=1)})


def main() -> None:
    """Measure all cases; the last line is the document."""
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="mamba-2.8b", help="a Mamba preset")
    options = arguments.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("causal-conv1d", "triton")}
    document = new_document("mamba-ssm", importlib.metadata.version("mamba-ssm"), **versions)
    measure(build(options.model), document, options, CASES)
    write(document, options.out)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
