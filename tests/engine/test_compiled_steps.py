"""The decode step as one compiled function, without graph breaks, answers as the one that runs as written."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from ssm_dist import LLM, SamplingParams
from ssm_dist.errors import UserError
from tests.engine.checkpoints import save_checkpoint

PROMPTS: list[Any] = [[1, 2, 3], [4], [5] * 9, [2]]


@pytest.fixture
def _traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace steps into one graph as always, then run it as it is: generating code takes a minute here."""
    monkeypatch.setattr(torch, "compile", functools.partial(_compile, torch.compile))


def _compile(compile: Any, function: Any, **options: Any) -> Any:
    assert options["fullgraph"] is True
    return compile(function, backend="aot_eager", **options)


@pytest.mark.usefixtures("_traced_only")
def test_compiled_steps_answer_as_plain_ones(tmp_path: Path) -> None:
    folder = save_checkpoint("falcon_mamba", tmp_path / "model")
    sampling = SamplingParams(
        max_new_tokens=8, ignore_eos=True, temperature=0.8, top_p=0.9, seed=5, logprobs=2,
        repetition_penalty=1.2,
    )  # fmt: skip
    each = [SamplingParams(max_new_tokens=12, ignore_eos=True)] * 3 + [sampling]
    answers = []
    for mode in ("none", "compile"):
        llm = LLM.from_pretrained(folder, cache={"max_sequences": 3}, compile={"mode": mode})
        answers.append([c.token_ids for c in llm.generate(PROMPTS, each)])
    assert answers[0] == answers[1]
    assert "compiled whole" in llm.engine.how


@pytest.mark.usefixtures("_traced_only")
@torch._dynamo.config.patch(recompile_limit=1)
def test_more_kinds_of_sampling_than_torch_compiles_by_default_are_compiled(tmp_path: Path) -> None:
    llm = LLM.from_pretrained(save_checkpoint("mamba", tmp_path / "model"), compile={"mode": "compile"})
    for params in ({}, {"temperature": 0.8}, {"repetition_penalty": 1.2}):
        sampling = SamplingParams(max_new_tokens=2, ignore_eos=True, **params)
        assert len(llm.generate([[1, 2]], sampling)[0].token_ids) == 2


@pytest.mark.parametrize(("name", "mode"), [("mamba", "capture"), ("zamba", "compile")])
def test_a_mode_that_cannot_run_here_says_what_can(name: str, mode: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"\[compile\] mode = '{mode}' needs .*'none'.*'auto'"):
        LLM.from_pretrained(save_checkpoint(name, tmp_path / name), compile={"mode": mode})
