"""The sampler: its noise, its filters against transformers', and what a row may depend on."""

import math
import shutil

import pytest
import torch
from pydantic import ValidationError
from torch._inductor import config as inductor_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ssm_dist.sampling import SamplingParams
from ssm_dist.sampling.noise import gumbel, gumbel_noise, splitmix64
from ssm_dist.sampling.sampler import Sampler, Work, within_rank

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
MIXED = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=7),
    SamplingParams(temperature=0.7, top_k=5, seed=2**64 - 1),
    SamplingParams(temperature=1.5, top_p=0.8, seed=3),
    SamplingParams(temperature=1.0, min_p=0.1, seed=2**40),
    SamplingParams(repetition_penalty=1.7),
    SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2, seed=5),
    SamplingParams(temperature=1.0, seed=7, logprobs=3),
]


def chi_square_is_plausible(counts: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """Pearson's statistic within 5 standard deviations of its mean, given enough counts in every cell."""
    expected = counts.sum() * probabilities.double()
    cells = probabilities > 0
    freedom = int(cells.sum()) - 1
    statistic = ((counts.double() - expected)[cells] ** 2 / expected[cells]).sum().item()
    return bool((counts[~cells] == 0).all()) and abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


def rows(values: list[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor(values, device=device)


def frequencies(params: SamplingParams, logits: torch.Tensor, draws: int) -> torch.Tensor:
    """How often each token is sampled from logits (V,) at `draws` positions of one request."""
    sampler = Sampler(1, len(logits), "cpu")
    sampler.admit(0, params, [])
    ids = sampler.sample(logits.expand(draws, -1), rows([0] * draws), torch.arange(draws)).ids
    return ids.bincount(minlength=len(logits))


# --- parameters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": 1e-7},
        {"temperature": "0.5"},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_k": True},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"seed": 2**64},
        {"stop": ["a", ""]},
        {"logprobs": 21},
        {"beams": 2},
    ],
    ids=str,
)
def test_parameters_out_of_range_are_errors(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        SamplingParams.model_validate(wrong)


def test_a_single_stop_string_is_accepted() -> None:
    assert SamplingParams.model_validate({"stop": "END"}).stop == ("END",)
    assert SamplingParams.model_validate({"stop": ["a", "b"]}).stop == ("a", "b")


# --- noise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_bits_are_those_of_splitmix64(device: str) -> None:
    """First outputs for seed 1234567, as published with other implementations of the generator."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    bits = splitmix64(rows([1234567], device), torch.arange(5, device=device))
    assert [value % 2**64 for value in bits.tolist()] == published


@pytest.mark.parametrize("axis", ["seed", "position", "token"])
def test_noise_is_uniform_and_independent_along(axis: str) -> None:
    """Adjacent values of one coordinate give independent bits: 16 x 16 cells, high and low nibbles."""
    count = torch.arange(2**16)
    zeros = torch.zeros_like(count)
    seeds, positions, tokens = (
        count if axis == name else zeros + 3 for name in ("seed", "position", "token")
    )
    bits = splitmix64(splitmix64(seeds, positions), tokens)
    for nibble in ((bits >> 60) & 15, bits & 15):
        assert chi_square_is_plausible(nibble.bincount(minlength=16), torch.full((16,), 1 / 16))
        pairs = nibble[:-1] * 16 + nibble[1:]
        assert chi_square_is_plausible(pairs.bincount(minlength=256), torch.full((256,), 1 / 256))
    changed = bits[:-1] ^ bits[1:]
    flips = torch.stack([(changed >> place) & 1 for place in range(64)]).double().mean(dim=1)
    assert (flips - 0.5).abs().max() < 5 * 0.5 / 2**8  # standard error of 2**16 coin flips


def test_noise_has_the_moments_and_the_tail_of_a_gumbel() -> None:
    noise = gumbel_noise(torch.arange(64), torch.arange(64), torch.arange(2**14)).double()
    draws = noise.numel()
    assert abs(noise.mean() - 0.5772156649) < 5 * math.sqrt(math.pi**2 / 6 / draws)
    assert abs(noise.var() / (math.pi**2 / 6) - 1) < 0.01
    for threshold in (2.0, 6.0, 9.0):
        tail = -math.expm1(-math.exp(-threshold))
        assert abs((noise > threshold).double().mean() - tail) < 5 * math.sqrt(tail / draws)


def test_noise_is_finite_for_all_zeros_and_all_ones() -> None:
    assert gumbel(rows([0, -1, 2**63 - 1, -(2**63)])).isfinite().all()


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_noise_has_the_same_bits(device: str) -> None:
    sampler = Sampler(1, 1003, device)
    inputs = rows([0, -1, 2**62], device), rows([0, 5, 2**33], device), sampler._tokens
    with inductor_config.patch(compile_threads=1):  # not a process a core, for one kernel
        ours = torch.compile(gumbel_noise, fullgraph=True)(*inputs)
    torch.testing.assert_close(ours, gumbel_noise(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_noise_on_a_gpu_is_that_of_the_cpu() -> None:
    inputs = rows([0, -1, 2**62]), rows([0, 5, 2**33]), torch.arange(50_000)
    ours = gumbel_noise(*(tensor.cuda() for tensor in inputs)).cpu()
    torch.testing.assert_close(ours, gumbel_noise(*inputs), rtol=1e-5, atol=1e-6)


# --- distributions and filters ------------------------------------------------------------------------------

PARAMETERS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.5, seed=2**63),
    SamplingParams(temperature=2.0, top_k=4, seed=1),
    SamplingParams(temperature=1.0, top_p=0.75, seed=2),
    SamplingParams(temperature=1.3, min_p=0.2, seed=3),
    SamplingParams(temperature=1.5, top_k=9, top_p=0.9, min_p=0.05, seed=4),
]


def reference_distribution(params: SamplingParams, logits: torch.Tensor) -> torch.Tensor:
    """Probabilities (V,) after transformers' warpers, in transformers' order."""
    warpers = [
        TemperatureLogitsWarper(params.temperature),
        TopKLogitsWarper(params.top_k or len(logits)),
        TopPLogitsWarper(params.top_p),
        MinPLogitsWarper(params.min_p),
    ]
    scores = logits[None]
    for warper in warpers:
        scores = warper(torch.zeros(1, 0, dtype=torch.int64), scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("params", PARAMETERS, ids=str)
def test_frequencies_are_those_of_transformers_distribution(params: SamplingParams) -> None:
    logits = torch.randn(24, generator=torch.Generator().manual_seed(1)) * 1.5
    counts = frequencies(params, logits, draws=40_000)
    assert chi_square_is_plausible(counts, reference_distribution(params, logits))


@pytest.mark.parametrize("grid", [None, 0.5], ids=["distinct", "ties"])
@pytest.mark.parametrize("top_k,top_p", [(0, 0.9), (3, 1.0), (40, 0.7), (1, 0.5), (10_000, 0.999), (0, 1e-6)])
def test_top_k_and_top_p_keep_what_transformers_keeps(grid: float | None, top_k: int, top_p: float) -> None:
    scores = torch.randn(64, 257, generator=torch.Generator().manual_seed(2)) * 2
    if grid is not None:
        scores = (scores / grid).round() * grid
    scores = scores - scores.amax(dim=-1, keepdim=True)
    k = min(top_k or 257, 257)
    kept = within_rank(scores, torch.full((64, 1), k), torch.full((64, 1), top_p, dtype=torch.float64))
    nothing = torch.zeros(64, 0, dtype=torch.int64)
    theirs = TopKLogitsWarper(k)(nothing, scores)
    theirs = TopPLogitsWarper(top_p)(nothing, theirs).isfinite()
    if grid is None:
        assert torch.equal(kept, theirs)
        return
    # Which of several equal tokens top-p drops is arbitrary with them; the kept scores are the same.
    assert torch.equal(kept.sum(-1), theirs.sum(-1))
    minus_infinity = torch.full_like(scores, -math.inf)
    ours_sorted = torch.where(kept, scores, minus_infinity).sort(-1).values
    assert torch.equal(ours_sorted, torch.where(theirs, scores, minus_infinity).sort(-1).values)


def test_top_p_keeps_the_lowest_ids_among_equals() -> None:
    kept = within_rank(torch.zeros(1, 10), rows([[10]]), torch.tensor([[0.35]], dtype=torch.float64))
    assert kept[0].tolist() == [True] * 4 + [False] * 6


def test_top_k_keeps_everything_tied_with_the_last() -> None:
    scores = torch.tensor([[0.0, -1.0, -1.0, -1.0, -2.0]])
    kept = within_rank(scores, rows([[2]]), torch.ones(1, 1, dtype=torch.float64))
    assert kept[0].tolist() == [True, True, True, True, False]


def test_repetition_penalty_is_transformers_on_prompt_and_generated_tokens() -> None:
    generator = torch.Generator().manual_seed(3)
    sampler = Sampler(2, 11, "cpu")
    history = [4, 4, 9]
    sampler.admit(1, SamplingParams(repetition_penalty=1.8), history)
    penalty = RepetitionPenaltyLogitsProcessor(1.8)
    for position in range(3, 40):
        logits = torch.randn(1, 11, generator=generator)
        expected = penalty(torch.tensor([history]), logits).argmax(-1)
        ids = sampler.sample(logits, rows([1]), rows([position])).ids
        assert torch.equal(ids, expected)
        history.append(int(ids))


def test_repetition_penalty_enters_the_sampled_distribution() -> None:
    logits, seen, draws = torch.tensor([1.0, 2.0, -1.0, 0.5, -0.5]), [1, 2], 500
    params = SamplingParams(temperature=1.0, repetition_penalty=2.0)
    ids = []
    for position in range(draws):  # a fresh sampler, since what it samples is penalised from then on
        sampler = Sampler(1, 5, "cpu")
        sampler.admit(0, params, seen)
        ids.append(int(sampler.sample(logits[None], rows([0]), rows([position])).ids))
    expected = RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([seen]), logits[None])[0].softmax(-1)
    assert chi_square_is_plausible(torch.tensor(ids).bincount(minlength=5), expected)


# --- greedy and odd logits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab_size", [3, 1000, 50_277])
def test_greedy_takes_the_lowest_id_on_ties(device: str, vocab_size: int) -> None:
    sampler = Sampler(1, vocab_size, device)
    sampler.admit(0, SamplingParams(), [])
    logits = torch.zeros(1, vocab_size, device=device)
    logits[0, [1, vocab_size // 2, vocab_size - 1]] = 2.0
    assert sampler.sample(logits, rows([0], device), rows([0], device)).ids.tolist() == [1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("params", [p for p in MIXED if p.repetition_penalty == 1.0], ids=str)
def test_rows_that_are_not_finite_are_sampled_greedily(device: str, params: SamplingParams) -> None:
    inf, nan = math.inf, math.nan
    logits = [[1.0, nan, inf, nan], [0.0, 1.0, inf, inf], [-inf] * 4, [-inf, -inf, 0.0, -inf]]
    sampler = Sampler(1, 4, device)
    sampler.admit(0, params, [])
    out = sampler.sample(
        torch.tensor(logits, device=device), rows([0] * 4, device), torch.arange(4, device=device)
    )
    assert out.ids.tolist() == [1, 2, 0, 2]


def test_masked_tokens_are_never_sampled() -> None:
    logits = torch.zeros(2000, 50).index_fill(1, torch.arange(0, 50, 2), -math.inf)
    for params in MIXED[1:5]:
        sampler = Sampler(1, 50, "cpu")
        sampler.admit(0, params, [])
        assert (sampler.sample(logits, rows([0] * 2000), torch.arange(2000)).ids % 2 == 1).all()


def test_one_kept_token_wins_against_any_noise() -> None:
    counts = frequencies(SamplingParams(temperature=1.0, top_k=1), torch.arange(300.0), draws=2000)
    assert counts[-1] == 2000


# --- what a row depends on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numbers_of_sixteen_bits_are_sampled_as_in_float32(dtype: torch.dtype, device: str) -> None:
    narrow = torch.randn(len(MIXED), 1003, generator=torch.Generator().manual_seed(7)).to(dtype).to(device)
    slots, positions = torch.arange(len(MIXED), device=device), rows([9] * len(MIXED), device)
    for requests in ([SamplingParams()] * len(MIXED), MIXED):  # greedy ones alone take them as they are
        outcomes = []
        for logits in (narrow, narrow.float()):
            sampler = Sampler(len(MIXED), 1003, device)
            for slot, params in enumerate(requests):
                sampler.admit(slot, params, [1, 2])
            outcomes.append(sampler.sample(logits, slots, positions))
        for ours, theirs in zip(*outcomes, strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_depends_on_no_neighbour_and_no_slot(device: str) -> None:
    """Alone in slot 0, and among all the others in a shuffled order of slots: the same tokens."""
    vocab_size, steps, prompt = 1003, 12, [1, 2, 3]
    logits = torch.randn(steps, len(MIXED), vocab_size, generator=torch.Generator().manual_seed(4)).to(device)
    slots = rows([5, 2, 9, 0, 7, 1, 8, 3], device)
    together = Sampler(10, vocab_size, device)
    for slot, params in zip(slots.tolist(), MIXED, strict=True):
        together.admit(slot, params, prompt)
    batched = []
    for step in range(steps):
        order = torch.randperm(len(MIXED), generator=torch.Generator().manual_seed(step)).to(device)
        ids = together.sample(logits[step][order], slots[order].int(), torch.full_like(order, 3 + step)).ids
        batched.append(ids[order.argsort()].tolist())
    for row, params in enumerate(MIXED):
        alone = Sampler(1, vocab_size, device)
        alone.admit(0, params, prompt)
        ids = [
            alone.sample(logits[step, row][None], rows([0], device), rows([3 + step], device)).ids.item()
            for step in range(steps)
        ]
        assert ids == [step_ids[row] for step_ids in batched]


def test_the_same_seed_samples_the_same_and_another_does_not() -> None:
    logits = torch.zeros(64, 1000)
    outcomes = []
    for seed in (1, 1, 2, 1 + 2**63):
        sampler = Sampler(1, 1000, "cpu")
        sampler.admit(0, SamplingParams(temperature=1.0, seed=seed), [])
        outcomes.append(sampler.sample(logits, rows([0] * 64), torch.arange(64)).ids)
    assert torch.equal(outcomes[0], outcomes[1])
    for other in outcomes[2:]:
        assert (outcomes[0] != other).sum() > 60


def test_a_slot_that_is_taken_again_forgets_the_request_before() -> None:
    sampler = Sampler(1, 4, "cpu")
    logits = torch.tensor([[1.0, 0.9, 0.8, 0.7]])
    sampler.admit(0, SamplingParams(repetition_penalty=10.0), [])
    assert [int(sampler.sample(logits, rows([0]), rows([p])).ids) for p in range(3)] == [0, 1, 2]
    sampler.release(0)
    sampler.admit(0, SamplingParams(), [0])
    assert int(sampler.sample(logits, rows([0]), rows([0])).ids) == 0
    sampler.release(0)
    sampler.admit(0, SamplingParams(repetition_penalty=10.0), [0])
    assert int(sampler.sample(logits, rows([0]), rows([1])).ids) == 1


# --- log-probabilities --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_unprocessed_distribution(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(5)).to(dtype)
    sampler = Sampler(2, 30, "cpu")
    sampler.admit(
        0, SamplingParams(temperature=0.3, top_k=2, repetition_penalty=3.0, logprobs=4), list(range(30))
    )
    sampler.admit(1, SamplingParams(logprobs=0), [])
    out = sampler.sample(logits, rows([0, 1]), rows([9, 9]))
    expected = logits.float().log_softmax(-1)
    assert out.logprobs is not None and out.top_ids is not None and out.top_logprobs is not None
    torch.testing.assert_close(out.logprobs, expected.gather(-1, out.ids[:, None]).squeeze(-1))
    top, top_ids = expected.topk(4)
    torch.testing.assert_close(out.top_logprobs, top)
    if dtype == torch.float32:  # no ties
        assert torch.equal(out.top_ids, top_ids)


def test_logprobs_are_not_computed_for_nobody() -> None:
    sampler = Sampler(1, 5, "cpu")
    sampler.admit(0, SamplingParams(), [])
    assert sampler.sample(torch.zeros(1, 5), rows([0]), rows([0]))[1:] == (None, None, None)


# --- the work of a step -------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Records the names of the ATen operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_work_follows_the_requests_admitted() -> None:
    sampler = Sampler(4, 50, "cpu")
    sampler.admit(0, SamplingParams(top_k=5), [])
    assert sampler.work == Work()
    sampler.admit(1, SamplingParams(temperature=1.0, min_p=0.5), [])
    assert sampler.work == Work(draw=True)
    sampler.admit(2, SamplingParams(temperature=1.0, top_p=0.5, logprobs=2), [])
    sampler.admit(3, SamplingParams(repetition_penalty=2.0, logprobs=5), [])
    assert sampler.work == Work(penalise=True, draw=True, rank=True, logprobs=5)
    for slot in (1, 2, 3):
        sampler.release(slot)
    assert sampler.work == Work()


def test_greedy_requests_pay_for_no_sorting_and_no_noise() -> None:
    sampler = Sampler(1, 50, "cpu")
    sampler.admit(0, SamplingParams(), [])
    logits, slots, positions = torch.zeros(1, 50, dtype=torch.bfloat16), rows([0]), rows([0])
    with Operations() as operations:
        sampler.sample(logits, slots, positions)
    assert operations.names == {"max"}


def test_a_step_never_asks_the_host_and_compiles_whole() -> None:
    sampler = Sampler(len(MIXED), 50, "cpu")
    for slot, params in enumerate(MIXED):
        sampler.admit(slot, params, [1, 2])
    logits = torch.randn(len(MIXED), 50, generator=torch.Generator().manual_seed(6))
    slots, positions = torch.arange(len(MIXED)), torch.full((len(MIXED),), 9)
    seen = sampler._seen.clone()
    with Operations() as operations:
        eager = sampler.sample(logits, slots, positions)
    assert "sort" in operations.names
    assert not operations.names & {"_local_scalar_dense", "nonzero", "masked_select", "unique2", "equal"}
    sampler._seen.copy_(seen)
    compiled = torch.compile(sampler.sample, fullgraph=True, backend="eager")(logits, slots, positions)
    for ours, theirs in zip(eager, compiled, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_replays_with_other_parameters() -> None:
    """A CUDA graph of a step reads the slots' parameters of the moment, not those at capture."""
    sampler, vocab_size = Sampler(len(MIXED), 1003, "cuda"), 1003
    logits = torch.randn(len(MIXED), vocab_size, device="cuda")
    slots, positions = (
        torch.arange(len(MIXED), device="cuda"),
        torch.zeros(len(MIXED), dtype=torch.int64).cuda(),
    )
    for slot, params in enumerate(MIXED):
        sampler.admit(slot, params, [1, 2])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sampler.sample(logits, slots, positions)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sampler.sample(logits, slots, positions)
    for slot, params in enumerate(MIXED):
        sampler.release(slot)
        sampler.admit(slot, params.model_copy(update={"seed": 11}), [5])
    positions += 3
    graph.replay()
    replayed = captured.ids.clone()
    for slot, params in enumerate(MIXED):
        sampler.release(slot)
        sampler.admit(slot, params.model_copy(update={"seed": 11}), [5])
    assert torch.equal(replayed, sampler.sample(logits, slots, positions).ids)
