"""The Python API, on one rank and on several: what users see."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ssm_dist import LLM, Completion, SamplingParams, UserError
from ssm_dist.models.mixer import HeadwiseProjection
from ssm_dist.sampling.params import SamplingParams as Params
from tests.engine import on_ranks
from tests.engine.checkpoints import EOS, save_checkpoint
from tests.oracle import greedy, logits, random_model
from tests.ranks import run_on_ranks

NAMES = ["mamba", "falcon_mamba", "zamba"]
PROMPTS = ["def", "import os", "x", "for i in range(3):"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_checkpoint(name, tmp_path_factory.mktemp(name)) for name in NAMES}


@pytest.fixture(scope="module")
def llm(folders: dict[str, Path]) -> LLM:
    return load(folders["mamba"])


def load(folder: Path, **sections: dict[str, object]) -> LLM:
    settings = {"cache": {"max_sequences": 3, "max_tokens": 4096}, "prefill": {"chunk_tokens": 8}} | sections
    return LLM.from_pretrained(folder, **settings)


def answers(folder: Path, prompts: list[str], params: list[Params]) -> list[Completion]:
    return load(folder).generate(prompts, params)


def ids(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


MIXED = [
    SamplingParams(max_new_tokens=9, ignore_eos=True),
    SamplingParams(max_new_tokens=7, temperature=0.8, top_p=0.9, seed=3, ignore_eos=True),
    SamplingParams(max_new_tokens=12, temperature=1.0, top_k=5, seed=4, ignore_eos=True),
    SamplingParams(max_new_tokens=5, repetition_penalty=1.3, ignore_eos=True),
]


@pytest.mark.parametrize("name", NAMES)
def test_x_proj_is_stored_as_decode_steps_read_it(name: str, folders: dict[str, Path]):
    projections = [m for m in load(folders[name]).model.modules() if isinstance(m, HeadwiseProjection)]
    assert projections and all(module.weight.T.is_contiguous() for module in projections)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_generation_is_that_of_transformers(name: str, folders: dict[str, Path]):
    model = load(folders[name])
    completion = model.generate("def f(x):", SamplingParams(max_new_tokens=40, ignore_eos=True))[0]
    assert completion.token_ids == greedy(random_model(name), completion.prompt_token_ids, 40)
    assert completion.finish_reason == "length"


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_every_rank_returns_what_one_rank_alone_does(name: str, degree: int, folders: dict[str, Path]):
    alone = answers(folders[name], PROMPTS, MIXED)
    for completions in run_on_ranks(degree, answers, folders[name], PROMPTS, MIXED):
        assert ids(completions) == ids(alone)
        assert [c.text for c in completions] == [c.text for c in alone]


def test_a_request_does_not_depend_on_its_company(llm: LLM):
    together = llm.generate(PROMPTS, MIXED)
    for prompt, params, shared in zip(PROMPTS, MIXED, together, strict=True):
        assert llm.generate(prompt, params)[0].token_ids == shared.token_ids


def test_more_prompts_than_slots_are_answered_in_order(llm: LLM):
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    completions = llm.generate([f"prompt {i}" for i in range(10)], params)
    assert [c.index for c in completions] == list(range(10))
    assert all(len(c.token_ids) == 3 for c in completions)
    assert llm.cache.free_slots == llm.cache.max_sequences


def test_the_pieces_of_a_stream_are_the_text(llm: LLM):
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    whole = llm.generate("abc", params)[0]
    events = list(llm.stream("abc", params))
    assert "".join(event.text for event in events) == whole.text
    assert [event.token_id for event in events] == whole.token_ids
    assert [event.finish_reason for event in events] == [None] * 19 + ["length"]


def test_a_stream_left_early_gives_back_its_slots(llm: LLM):
    stream = llm.stream(PROMPTS, SamplingParams(max_new_tokens=50))
    next(stream)
    assert llm.cache.free_slots == 0
    stream.close()
    assert llm.cache.free_slots == llm.cache.max_sequences
    assert llm.generate("x", SamplingParams(max_new_tokens=2, ignore_eos=True))[0].finish_reason == "length"


@pytest.mark.parametrize("name", ["mamba", "zamba"])
def test_what_half_read_streams_leave_no_room_for_is_refused_and_runs_after_them(
    name: str, folders: dict[str, Path], tmp_path: Path
):
    slots = 1 if name == "mamba" else 3  # of Zamba, the pages are what is short
    model = load(folders[name], cache={"max_sequences": slots, "max_tokens": 64})
    short, long = [1, 2], list(range(1, 21))
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    wanted = model.generate([long], params)[0].token_ids, model.score(long)
    stream = model.stream([short], params)
    next(stream)
    calls: list[Callable[[], object]] = [
        lambda: model.generate([long], params),
        lambda: next(model.stream([long], params)),
        lambda: model.score(long),
        lambda: model.save_state(tmp_path / "state", long),
    ]
    for call in calls:
        with pytest.raises(UserError, match="half-read"):
            call()
    assert len(list(stream)) == 39
    assert (model.generate([long], params)[0].token_ids, model.score(long)) == wanted
    assert model.cache.free_slots == slots


def test_requests_beside_a_half_read_stream_take_turns_in_the_slots_that_it_leaves(llm: LLM):
    alone = ids(llm.generate(PROMPTS, MIXED))
    stream = llm.stream(PROMPTS[:2], SamplingParams(max_new_tokens=20, ignore_eos=True))
    next(stream)
    assert ids(llm.generate(PROMPTS, MIXED)) == alone
    assert len(list(stream)) == 39


def test_a_stream_of_what_cannot_run_is_refused_before_it_is_read(llm: LLM):
    with pytest.raises(UserError, match="empty"):
        llm.stream("")


def test_a_stop_string_cuts_the_text_before_it(llm: LLM):
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    text = llm.generate("abc", params)[0].text
    assert text is not None
    stop = text[8:11]
    stopped = llm.generate("abc", params.model_copy(update={"stop": (stop,)}))[0]
    assert stopped.finish_reason == "stop" and stopped.text == text[: text.index(stop)]


def test_the_end_of_sequence_token_ends_a_sequence(folders: dict[str, Path], tmp_path: Path):
    folder = save_checkpoint("mamba", tmp_path / "biased")
    model = load(folder)
    free = model.generate("ab", SamplingParams(max_new_tokens=12, ignore_eos=True))[0]
    first = free.token_ids[4]
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [{first}, {EOS}]}}')
    ended = load(folder).generate("ab", SamplingParams(max_new_tokens=12))[0]
    assert ended.token_ids == free.token_ids[: free.token_ids.index(first) + 1]
    assert ended.finish_reason == "stop"


def test_log_probabilities_are_those_of_transformers(llm: LLM):
    params = SamplingParams(max_new_tokens=4, logprobs=3, ignore_eos=True)
    completion = llm.generate("def", params)[0]
    tokens = completion.prompt_token_ids + completion.token_ids
    wanted = logits(random_model("mamba"), tokens).log_softmax(-1)[len(completion.prompt_token_ids) - 1 : -1]
    chosen = wanted.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.logprobs), chosen, atol=1e-4, rtol=0)
    for row, likely in zip(wanted, completion.top_logprobs, strict=True):
        assert list(likely) == row.topk(3).indices.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_log_softmax_of_transformers(name: str, folders: dict[str, Path]):
    score = load(folders[name]).score(["for i in range(10): print(i)"])[0]
    wanted = logits(random_model(name), score.token_ids).log_softmax(-1)[:-1]
    chosen = wanted.gather(1, torch.tensor(score.token_ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(score.log_probs), chosen, atol=1e-4, rtol=0)
    assert score.perplexity == pytest.approx(math.exp(-chosen.mean()), rel=1e-4)


def test_one_text_is_scored_as_a_list_of_one_is(llm: LLM):
    assert llm.tokenizer is not None
    listed = llm.score(["import os\n"])
    assert llm.score("import os\n") == llm.score(llm.tokenizer.encode("import os\n")) == listed
    with pytest.raises(UserError, match=r"prompt 0: .*chat template"):
        llm.score({"messages": [{"role": "user", "content": "hi"}]})


def scored(folder: Path, texts: list[str]) -> list[list[float]]:
    return [score.log_probs for score in load(folder).score(texts)]


def test_scores_do_not_depend_on_the_degree(folders: dict[str, Path]):
    alone = torch.tensor(scored(folders["zamba"], ["import os, sys"]))
    for degree in (2, 4):
        for scores in run_on_ranks(degree, scored, folders["zamba"], ["import os, sys"]):
            torch.testing.assert_close(torch.tensor(scores), alone, atol=1e-4, rtol=0)


def saved(folder: Path, target: Path) -> None:
    load(folder).save_pretrained(target)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_saved_from_two_ranks_is_loaded_by_transformers(
    name: str, folders: dict[str, Path], tmp_path: Path
):
    run_on_ranks(2, saved, folders[name], tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    tokens = list(range(1, 40))
    torch.testing.assert_close(
        logits(again, tokens), logits(random_model(name), tokens), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "empty"),
        ([], "empty"),
        ([1, 97], "out of range"),
        ([-1], "out of range"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "chat template"),
    ],
    ids=["empty text", "no ids", "id past the vocabulary", "negative id", "messages without template"],
)
def test_a_prompt_that_cannot_run_is_refused_with_a_reason(prompt: object, says: str, llm: LLM):
    with pytest.raises(UserError, match=says):
        llm.generate([prompt])


@pytest.mark.parametrize(
    "prompt", [None, 5.0, (1, 2), np.array([1, 2])], ids=["None", "number", "tuple", "array"]
)
def test_a_prompt_of_another_type_is_refused_with_the_forms_there_are(prompt: object, llm: LLM):
    for prompts in (prompt, [prompt], ["a", prompt]):
        with pytest.raises(
            UserError, match=r'text, a list of token ids, or \{"messages".*not (None|float|tuple|nd)'
        ):
            llm.generate(prompts)


def test_a_dictionary_that_is_no_conversation_is_refused(llm: LLM):
    with pytest.raises(UserError, match='has no "messages"'):
        llm.generate({"prompt": "hi"})


def test_the_parameters_of_a_configuration_serve_on_every_rank(folders: dict[str, Path]):
    first, other = run_on_ranks(2, on_ranks.answered_as_configured, folders["mamba"])
    assert first == other and len(first) == 5


@pytest.mark.parametrize(
    "params",
    [{"max_new_tokens": 3}, {}, (Params(),), [None], 5],
    ids=["dict", "empty", "tuple", "list", "number"],
)
def test_params_of_another_type_are_refused(params: object, llm: LLM):
    with pytest.raises(UserError, match="params must be SamplingParams"):
        llm.generate(["a"], params)


@pytest.mark.parametrize("case", on_ranks.NO_CALLS)
def test_a_call_that_rank_0_cannot_prepare_fails_on_every_rank_and_the_next_one_is_answered(
    case: str, folders: dict[str, Path]
):
    (said, answers), *others = run_on_ranks(2, on_ranks.after_a_bad_call, folders["mamba"], case)
    assert answers == ids(on_ranks.load(folders["mamba"]).generate(on_ranks.PROMPTS, on_ranks.PARAMS))
    assert all(again == answers and said in text for text, again in others)


def test_without_a_tokenizer_token_ids_work_and_text_is_none(tmp_path: Path):
    model = load(save_checkpoint("mamba", tmp_path / "bare", with_tokenizer=False))
    completion = model.generate([5, 6, 7], SamplingParams(max_new_tokens=3, ignore_eos=True))[0]
    assert len(completion.token_ids) == 3 and completion.text is None
    with pytest.raises(UserError, match="tokenizer"):
        model.generate("text")
    with pytest.raises(UserError, match="stop strings"):
        model.generate([5], SamplingParams(stop=("x",)))


def test_a_prompt_longer_than_the_pages_is_refused_before_it_starts(folders: dict[str, Path]):
    model = load(folders["zamba"], cache={"max_sequences": 2, "max_tokens": 32})
    with pytest.raises(UserError, match="max_tokens"):
        model.generate([list(range(1, 30))], SamplingParams(max_new_tokens=8))
    assert len(model.generate([list(range(1, 30))], SamplingParams(max_new_tokens=2))[0].token_ids) > 0


def test_a_wrong_key_names_the_nearest_one(folders: dict[str, Path]):
    with pytest.raises(UserError, match=r"cache\.max_seq; the nearest valid one is cache\.max_sequences"):
        LLM.from_pretrained(folders["mamba"], cache={"max_seq": 64})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"cache": 3}, "cache = 3 is not a section"),
        ({"model": "float32"}, "model = 'float32' is not a section"),
        ({"dtype": "float32"}, "dtype = 'float32' is not a section"),
        ({"tensor_parallel": 0}, "parallel.tensor = 0: it must be greater than or equal to 1"),
    ],
)
def test_what_is_no_section_and_no_degree_is_refused(
    given: dict[str, Any], says: str, folders: dict[str, Path]
):
    with pytest.raises(UserError, match=re.escape(f"from_pretrained: {says}")):
        LLM.from_pretrained(folders["mamba"], **given)
