"""On a GPU: the same weights as on the CPU, loaded and saved there, and estimates that hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssm_dist.checkpoint import load_parameters, open_checkpoint, random_parameters, save_huggingface
from ssm_dist.memory import estimate
from ssm_dist.models.batch import RaggedBatch
from ssm_dist.models.language_model import LanguageModel
from ssm_dist.parallel import resolve_plan
from ssm_dist.registry import preset
from ssm_dist.state_cache import StateCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PRESETS = ("mamba-tiny", "falcon-mamba-tiny", "zamba-tiny")


def meta_model(name: str) -> LanguageModel:
    spec, config = preset(name)
    with torch.device("meta"):
        return spec.build(config)


@pytest.mark.parametrize("name", PRESETS)
def test_random_weights_are_those_of_the_cpu(name: str) -> None:
    models = {device: meta_model(name) for device in ("cpu", "cuda")}
    for device, model in models.items():
        random_parameters(model, device=device, dtype=torch.bfloat16)
    for path, expected in models["cpu"].named_parameters():
        found = models["cuda"].get_parameter(path)
        assert found.is_cuda
        if path.endswith(("dt_proj.bias", "A_log")):
            torch.testing.assert_close(found.cpu(), expected)
        else:
            assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("name", PRESETS)
def test_weights_go_to_the_gpu_and_back_unchanged(tmp_path: Path, name: str) -> None:
    spec, config = preset(name)
    first, second = meta_model(name), meta_model(name)
    placements, weights = resolve_plan(first, spec.plan, 1).parameters, spec.weights(config)
    random_parameters(first, device="cuda", dtype=torch.bfloat16)
    save_huggingface(first, placements, weights, config.to_huggingface(), tmp_path / "saved")
    load_parameters(second, open_checkpoint(tmp_path / "saved"), weights, device="cuda", dtype=torch.bfloat16)
    for path, expected in first.named_parameters():
        assert torch.equal(second.get_parameter(path), expected)
        assert second.get_parameter(path).is_cuda


@pytest.mark.parametrize("name", ["mamba-130m", "falcon-mamba-7b", "zamba-7b"])
@torch.inference_mode()
def test_a_step_holds_no_more_than_was_estimated(name: str) -> None:
    device, settings = torch.device("cuda"), {"max_sequences": 16, "max_tokens": 4096}
    spec, config = preset(name)
    model = meta_model(name)
    placements = resolve_plan(model, spec.plan, 1).parameters
    types = {"dtype": torch.bfloat16, "state_dtype": torch.float32}
    need = estimate(config, model.state_shapes(), placements, chunk_tokens=2048, **settings, **types)
    before = torch.cuda.memory_allocated()
    random_parameters(model, device=device, dtype=torch.bfloat16)
    assert torch.cuda.memory_allocated() - before == pytest.approx(
        need.weights, rel=0.02
    )  # in blocks of 512 bytes and more
    cache = StateCache(model.state_shapes(), device=device, **settings, **types)
    allocated = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    slot = cache.acquire(2048)
    assert slot is not None
    slots = torch.tensor([slot], dtype=torch.int32, device=device)
    batch = RaggedBatch(
        torch.arange(2048, device=device), torch.tensor([0, 2048], dtype=torch.int32, device=device),
        slots, torch.arange(2048, device=device), pages=cache.page_table(slots),
    )  # fmt: skip
    model.head(model(batch, cache.state)[-1:])
    peak = torch.cuda.max_memory_allocated() - allocated
    assert 0.1 * need.activations < peak <= need.activations, f"{peak} of {need.activations} bytes"
