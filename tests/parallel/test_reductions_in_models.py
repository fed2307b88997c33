"""A codec chosen in the configuration, through the whole program: near the exact sums, alike on all ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssm_dist.build import reductions_of
from ssm_dist.config import ReductionConfig
from ssm_dist.config_reading import load_config
from ssm_dist.errors import UserError
from ssm_dist.parallel.collectives import Wire
from tests.engine.checkpoints import save_checkpoint
from tests.parallel.reductions_on_ranks import logits_by_products, logits_of
from tests.ranks import run_on_ranks

ROOT = Path(__file__).parents[2]
NEAR = {("int8", 32): 0.1, ("int8", 128): 0.1, ("fp8", 128): 0.5, ("int4", 32): 1.0}
"""Largest root-mean-square change of log-probabilities that vary by 1.1 to 1.6: random weights amplify it."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: save_checkpoint(name, tmp_path_factory.mktemp(name))
        for name in ("mamba", "falcon_mamba", "zamba")
    }


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "zamba"])
def test_a_quantised_model_stays_near_the_exact_one(name: str, degree: int, folders: dict[str, Path]) -> None:
    exact = run_on_ranks(degree, logits_of, folders[name], "none", 128)
    assert all(torch.equal(scores, exact[0]) for scores in exact)
    for (codec, group_size), near in NEAR.items():
        quantised = run_on_ranks(degree, logits_of, folders[name], codec, group_size)
        assert all(torch.equal(scores, quantised[0]) for scores in quantised)
        change = (quantised[0] - exact[0]).square().mean().sqrt()
        assert 0 < change < near, (codec, group_size, change)


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "zamba"])
def test_linear_layers_that_are_one_with_their_sums_change_nothing(
    name: str, degree: int, folders: dict[str, Path]
) -> None:
    """Norms of more columns and heads that ranks share included, both Zamba's."""
    exact = run_on_ranks(degree, logits_of, folders[name], "none", 128)[0]
    for scores, plain, normed in run_on_ranks(degree, logits_by_products, folders[name]):
        assert torch.equal(scores, exact)
        assert plain > 0 and normed > 0


def test_the_program_runs_quantised_and_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [
            *launcher, ROOT / "infer.py", "--parallel.tensor", "2", "--model.checkpoint", folders["mamba"],
            "--reduction.codec", "int8", "--generation.prompts", "abc", "--generation.max_new_tokens", "5",
            "--output.file", tmp_path / "out.jsonl",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "gloo, algorithm auto, codec int8 in groups of 128" in done.stdout
    assert "torchao" not in done.stderr, "an unused extension of torchao is no news"
    assert len(json.loads((tmp_path / "out.jsonl").read_text())["token_ids"]) == 5


@pytest.mark.parametrize(
    ("options", "branch"),
    [
        ({}, Wire("none", 128)),
        ({"codec": "int8"}, Wire("int8", 128)),
        ({"codec": "int4"}, Wire("int4", 32)),
        ({"codec": "int4", "group_size": 128}, Wire("int4", 128)),
        ({"codec": "fp8", "group_size": 32, "algorithm": "exchange"}, Wire("fp8", 32, "exchange")),
    ],
)
def test_a_codec_is_for_the_branches_alone(options: dict[str, object], branch: Wire) -> None:
    reductions = reductions_of(ReductionConfig(**options))
    assert reductions.branch == branch
    assert reductions.x_proj.codec == reductions.embedding.codec == "none"


def test_other_kinds_of_reduction_can_ask_for_a_codec() -> None:
    reductions = reductions_of(
        ReductionConfig(x_proj_codec="int8", embedding_codec="int4", timeout_seconds=7)
    )
    assert (reductions.branch, reductions.x_proj) == (Wire(), Wire("int8", 128))
    assert (reductions.embedding, reductions.timeout_seconds) == (Wire("int4", 32), 7.0)


def test_a_codec_that_the_algorithm_would_ignore_is_a_mistake() -> None:
    words = ["--model.preset", "a", "--reduction.codec", "int8", "--reduction.algorithm", "all_reduce"]
    with pytest.raises(UserError, match=r"reduction\.codec is 'int8'; set codec = 'none'"):
        load_config(None, words)
