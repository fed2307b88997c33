"""Error feedback: a stream lacks what its last sum dropped, and a model is nearer to the exact one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ssm_dist.benchmark.program import named
from ssm_dist.build import reductions_of
from ssm_dist.config import Config, ReductionConfig
from ssm_dist.config_reading import load_config
from ssm_dist.errors import UserError
from ssm_dist.memory import estimate
from ssm_dist.parallel import resolve_plan
from ssm_dist.parallel.collectives import Reductions, Wire
from ssm_dist.registry import preset
from tests.kernels.codec_bounds import QUANTISED
from tests.parallel.feedback_on_ranks import (
    bytes_of_errors,
    scores,
    seams_that_feed_back,
    stream_of_many_sums,
    wrong_sums_on_cpus,
)
from tests.parallel.reductions_on_ranks import Case
from tests.ranks import run_on_ranks

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
INT4 = {"codec": "int4", "algorithm": "exchange"}
FED_BACK = {**INT4, "feedback": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "degree"), [(5, 2), (5, 3), (1, 3), (7, 4)])
@pytest.mark.parametrize(("codec", "group_size"), QUANTISED, ids=str)
def test_a_stream_lacks_what_its_last_sum_dropped(
    codec: str, group_size: int, rows: int, degree: int, dtype: torch.dtype
) -> None:
    """Nothing else: neither what earlier ones did, nor the rounding of sums to the dtype."""
    case, layers = Case("normal", rows, 70, dtype, codec, group_size), 30
    found = run_on_ranks(degree, stream_of_many_sums, case, layers, True)
    stream, exact = found[0][:2]
    assert all(torch.equal(other[0], stream) for other in found)
    of_parts = torch.stack([of_part.double() for _, _, of_part, _ in found]).sum(0)
    of_sums = torch.cat([of_sum.double() for _, _, _, of_sum in found])[:rows]
    lacking = exact - stream
    # errors themselves are rounded to the dtype, each by half a unit in its last place
    largest = torch.stack([of_part.abs().max() for _, _, of_part, _ in found]).max() + of_sums.abs().max()
    tolerance = layers * (2.0**-20 + (degree + 1) * torch.finfo(dtype).eps * float(largest))
    torch.testing.assert_close(lacking, of_parts + of_sums, rtol=0, atol=tolerance)
    plain = run_on_ranks(degree, stream_of_many_sums, case, layers, False)[0][0]
    assert lacking.square().mean() < 0.1 * (exact - plain).square().mean()


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize(("codec", "group_size"), QUANTISED, ids=str)
def test_sums_in_a_row_have_the_bits_of_the_codec_ops(codec: str, group_size: int, degree: int) -> None:
    case = Case("normal", 6, 70, torch.bfloat16, codec, group_size)
    assert run_on_ranks(degree, wrong_sums_on_cpus, case, 4) == [0] * degree


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("name", ["mamba", "falcon-mamba", "zamba"])
def test_a_trained_model_is_nearer_to_the_exact_one(name: str, degree: int) -> None:
    folder = CHECKPOINTS / f"{name}-tiny-python"
    (exact, _, _), *_ = run_on_ranks(degree, scores, folder, {})
    (plain, said, _), *_ = run_on_ranks(degree, scores, folder, INT4)
    fed_back = run_on_ranks(degree, scores, folder, FED_BACK)
    assert all(torch.equal(other, fed_back[0][0]) for other, _, _ in fed_back)
    assert all(held == 0 for _, _, held in fed_back), "errors of streams that are gone"
    assert fed_back[0][1] == f"{said}, with error feedback over the process group"
    assert 0 < (fed_back[0][0] - exact).square().mean() < 0.75 * (plain - exact).square().mean()


@pytest.mark.parametrize("width", [768, 2560, 4096])
def test_a_branch_is_fed_back_where_it_would_be_encoded_and_nowhere_else(width: int) -> None:
    """Over shared memory, sums with a norm stay exact up to other lengths than sums alone."""
    lengths = [1, 300, 600, 900, 1100, 2000, 2900, 5000]
    for found in run_on_ranks(2, seams_that_feed_back, width, lengths):
        assert all(encoded == fed_back for encoded, fed_back in found)
        assert {fed_back for _, fed_back in found} == {True, False}


@pytest.mark.parametrize(("name", "sets"), [("mamba-tiny", 2), ("zamba-tiny", 3)])
@pytest.mark.parametrize("degree", [2, 4])
def test_memory_for_the_errors_is_reckoned_with(degree: int, name: str, sets: int) -> None:
    """Those of two layers, and in hybrid layers those of a norm beside the stream."""
    spec, config = preset(name)
    with torch.device("meta"):
        model = spec.build(config)
    shapes, placements = model.state_shapes(), resolve_plan(model, spec.plan, degree).parameters
    settings = {"state_dtype": torch.float32, "max_sequences": 2, "max_tokens": 64, "chunk_tokens": 301}
    without, needed = (
        estimate(config, shapes, placements, dtype=torch.bfloat16, feedback=feedback, **settings).activations
        for feedback in (False, True)
    )
    held = run_on_ranks(degree, bytes_of_errors, 301, config.d_model, torch.bfloat16)
    assert all(0 < sets * errors == needed - without for errors in held)


@pytest.mark.parametrize(
    ("options", "wire"),
    [
        ({"codec": "int4"}, Wire("int4", 32)),
        ({"codec": "int8", "algorithm": "exchange"}, Wire("int8", 128, "exchange")),
    ],
)
def test_the_configuration_asks_for_it(options: dict[str, Any], wire: Wire) -> None:
    reductions = reductions_of(ReductionConfig(**options, feedback=True))
    assert reductions == Reductions(branch=wire, x_proj=reductions.x_proj, embedding=reductions.embedding,
                                    timeout_seconds=300.0, feedback=True)  # fmt: skip
    assert reductions.x_proj.codec == reductions.embedding.codec == "none"


def test_a_benchmark_names_it_and_runs_without_a_codec_too() -> None:
    section = ReductionConfig(codec="int4", feedback=True)
    config = Config(model={"preset": "mamba-2.8b"}, parallel={"tensor": 2}, reduction=section)
    assert named(config)["codec"] == "int4 with feedback"
    assert not reductions_of(section.model_copy(update={"codec": "none"})).feedback


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"feedback = true feeds back what a codec drops, but reduction\.codec is 'none'"),
        (
            ["--reduction.codec", "int4", "--reduction.algorithm", "bulk"],
            r"goes over the process group, but reduction\.algorithm is 'bulk'; set algorithm = 'auto'",
        ),
        (
            ["--reduction.codec", "int4", "--compile.mode", "compile"],
            r"feedback = true is not for compiled steps; set compile\.mode = 'capture'",
        ),
    ],
)
def test_what_cannot_feed_back_is_a_mistake(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, ["--model.preset", "a", "--reduction.feedback", "true", *words])


@pytest.mark.parametrize("wire", [Wire(), Wire("int4", 32, "bulk")])
def test_reductions_that_cannot_feed_back_are_refused(wire: Wire) -> None:
    with pytest.raises(ValueError, match=r"nothing to feed back|not by bulk"):
        Reductions(branch=wire, feedback=True)
