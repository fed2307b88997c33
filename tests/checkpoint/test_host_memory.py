"""A rank's host memory grows by its share of the weights, not by the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from ssm_dist.checkpoint import save_huggingface
from ssm_dist.models.mamba import Mamba, MambaConfig
from ssm_dist.parallel import resolve_plan
from ssm_dist.parallel.plans import MAMBA_PLAN
from ssm_dist.registry import spec_for
from tests.checkpoint.ours import load_ours, tensor_parallel
from tests.ranks import run_on_ranks

MIB = 1 << 20
OVERHEAD = 64 * MIB + 64 * MIB  # the window that is mapped, and what else a first load allocates


def status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def peak_growth(folder: Path) -> tuple[int, int]:
    """How much resident memory, mapped files included, loading took at its peak; and the bytes loaded."""
    tp = tensor_parallel()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    ours = load_ours(folder, tp)
    share = sum(parameter.to_local().nbytes for parameter in ours.parameters.values())
    return status("VmHWM") - before, share


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure")
def test_host_memory_of_a_rank_stays_near_its_share(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=8192, d_model=1024, n_layers=10, d_inner=2048, dt_rank=64)
    model: nn.Module = Mamba(config)
    placements = resolve_plan(model, MAMBA_PLAN, 1).parameters
    weights = spec_for("mamba").weights(config)
    save_huggingface(model, placements, weights, config.to_huggingface(), tmp_path / "checkpoint")
    total = sum(file.stat().st_size for file in (tmp_path / "checkpoint").glob("*.safetensors"))
    del model
    for degree in (2, 4):
        for growth, share in run_on_ranks(degree, peak_growth, tmp_path / "checkpoint"):
            assert share == pytest.approx(total / degree, rel=0.05)
            assert growth < share + OVERHEAD, f"{growth / MIB:.0f} MiB for a share of {share / MIB:.0f} MiB"
