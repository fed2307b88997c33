"""States of fewer bits than float32: they run, prefix reuse included, and stay close."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssm_dist import LLM, SamplingParams
from tests.engine.checkpoints import save_checkpoint

PROMPT = [(7 * i) % 90 for i in range(61)]


def logprobs(folder: Path, state_dtype: str) -> list[float]:
    cache = {"state_dtype": state_dtype, "prefix_device_bytes": 10**6, "prefix_interval": 16}
    llm = LLM.from_pretrained(folder, cache=cache, prefill={"chunk_tokens": 16})
    assert llm.cache.state.mixers[0].ssm.dtype == getattr(torch, state_dtype)
    params = SamplingParams(max_new_tokens=1, ignore_eos=True, logprobs=20)
    cold, warm = (llm.generate([PROMPT], params)[0].top_logprobs[0] for _ in range(2))
    assert warm == cold and llm.prefixes.counters.hits == 1
    return sorted(cold.values())


@pytest.mark.parametrize(("state_dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.01)])
def test_a_state_of_sixteen_bits_stays_close_to_float32(state_dtype: str, tolerance: float, tmp_path: Path):
    folder = save_checkpoint("mamba", tmp_path / "mamba")
    exact, rounded = (torch.tensor(logprobs(folder, dtype)) for dtype in ("float32", state_dtype))
    torch.testing.assert_close(rounded, exact, atol=tolerance, rtol=0)
    assert not torch.equal(rounded, exact)
