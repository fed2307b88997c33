"""The session: streams of requests that arrive while others run, blocking, asynchronous, and over ranks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ssm_dist import LLM, AsyncLLM, UserError
from ssm_dist.session import Session
from tests.engine.checkpoints import save_checkpoint
from tests.engine.on_ranks import (
    ENDLESS,
    PARAMS,
    PROMPTS,
    failed,
    load,
    refused_while_serving,
    served,
    served_beside_a_stream,
)
from tests.ranks import run_on_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("zamba", tmp_path_factory.mktemp("zamba"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return load(folder)


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[list[int]]:
    return [llm.generate(p, s)[0].token_ids for p, s in zip(PROMPTS, PARAMS, strict=True)]


def test_requests_submitted_while_others_run_get_the_answers_they_get_alone(llm: LLM, alone: list[list[int]]):
    with llm.session() as session:
        first = session.submit(PROMPTS[0], PARAMS[0])
        begun = next(first)
        rest = [session.submit(p, s) for p, s in zip(PROMPTS[1:], PARAMS[1:], strict=True)]
        answers = [stream.result() for stream in [first, *rest]]
    assert [a.token_ids for a in answers] == alone and begun.token_id == alone[0][0]
    assert answers[0].finish_reason == "length" and answers[0].text
    assert llm.cache.free_slots == llm.cache.max_sequences


def test_a_cancelled_request_ends_and_the_others_go_on(llm: LLM, alone: list[list[int]]):
    with llm.session() as session:
        long = session.submit("a", ENDLESS)
        other = session.submit(PROMPTS[1], PARAMS[1])
        next(long)
        long.cancel()
        assert long.result().finish_reason == "cancelled" and len(long.result().token_ids) < 400
        assert other.result().token_ids == alone[1]
    assert llm.cache.free_slots == llm.cache.max_sequences


def test_closing_a_session_cancels_what_runs_and_refuses_what_comes(llm: LLM):
    session = llm.session()
    stream = session.submit("a", ENDLESS)
    session.close()
    assert stream.result().finish_reason == "cancelled"
    with pytest.raises(UserError, match="closed"):
        session.submit("a")


def test_the_times_of_an_answer_are_those_of_its_tokens_whenever_it_is_read(llm: LLM):
    with llm.session() as session:
        submitted = time.perf_counter()
        stream, later = session.submit(PROMPTS[0], PARAMS[0]), session.submit(PROMPTS[4], PARAMS[4])
        later.result()  # the shorter one has ended by now
        time.sleep(0.3)
        waited = time.perf_counter() - submitted
        answer = stream.result()
    assert answer.seconds_to_first_token is not None and answer.seconds is not None
    assert 0 < answer.seconds_to_first_token <= answer.seconds < waited


def test_a_prompt_that_cannot_run_is_refused_at_once(llm: LLM):
    with llm.session() as session:
        with pytest.raises(UserError, match="empty"):
            session.submit("")
        with pytest.raises(UserError, match="a session is open"):
            llm.generate("a")


def test_nothing_else_runs_beside_an_open_session(llm: LLM, alone: list[list[int]], tmp_path: Path):
    llm.save_state(tmp_path / "state", "a")
    state = llm.load_state(tmp_path / "state")
    begins_later = llm.stream("a")
    calls: list[Callable[[], object]] = [
        llm.session,
        lambda: llm.serve(lambda session: None),
        lambda: llm.generate("a"),
        lambda: llm.stream("a"),
        lambda: next(begins_later),
        lambda: llm.score(["ab"]),
        lambda: llm.save_state(tmp_path / "other", "a"),
        lambda: llm.load_state(tmp_path / "state"),
        lambda: llm.forget_state(state),
        lambda: llm.prepare(["a"], [PARAMS[0]]),
        lambda: llm.prepare_lines(['{"prompt": "a"}'], PARAMS[0]),
        lambda: llm.save_pretrained(tmp_path / "folder"),
    ]
    with llm.session() as session:
        stream = session.submit(PROMPTS[0], PARAMS[0])
        for call in calls:
            with pytest.raises(UserError, match="a session is open"):
                call()
        assert stream.result().token_ids == alone[0]
    llm.forget_state(state)
    with llm.session() as again:
        assert again.submit(PROMPTS[0], PARAMS[0]).result().token_ids == alone[0]


def test_a_session_waits_for_the_end_of_a_half_read_stream(llm: LLM, alone: list[list[int]]):
    closed, read = (llm.stream(PROMPTS[0], PARAMS[0]) for _ in range(2))
    for stream, end in ((closed, lambda: closed.close()), (read, lambda: list(read))):
        next(stream)
        with pytest.raises(UserError, match="half-read"):
            llm.session()
        end()
        with llm.session() as session:
            assert session.submit(PROMPTS[0], PARAMS[0]).result().token_ids == alone[0]


def test_a_stream_whose_last_token_was_read_has_ended(llm: LLM, alone: list[list[int]]):
    stream = llm.stream(PROMPTS[0], PARAMS[0])
    while next(stream).finish_reason is None:
        pass
    with llm.session() as session:
        assert session.submit(PROMPTS[0], PARAMS[0]).result().token_ids == alone[0]
    assert list(stream) == []


def test_every_rank_refuses_to_serve_beside_a_half_read_stream(folder: Path):
    assert run_on_ranks(2, served_beside_a_stream, folder) == [("half-read", 2)] * 2


def test_what_rank_0_refuses_beside_a_session_leaves_the_others_in_step(folder: Path, alone: list[list[int]]):
    leader, other = run_on_ranks(2, refused_while_serving, folder)
    assert leader == (alone[0], alone[1]) and other == (None, alone[1])


def test_a_failure_of_the_engine_reaches_everybody_who_waits(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    def broken(step: object) -> None:
        raise ArithmeticError("broken")

    session = llm.session()
    monkeypatch.setattr(llm.engine, "launch", broken)
    stream = session.submit("a")
    with pytest.raises(RuntimeError, match="session has failed"):
        stream.result()
    with pytest.raises(RuntimeError, match="session has failed"):
        session.submit("a")
    with pytest.raises(RuntimeError, match="session has failed"):
        session.close()
    assert llm.cache.free_slots == llm.cache.max_sequences


def test_coroutines_share_the_machine_and_leaving_one_early_cancels_it(llm: LLM, alone: list[list[int]]):
    async def answer(engine: AsyncLLM, index: int) -> list[int]:
        return [
            e.token_id async for e in engine.generate(PROMPTS[index], PARAMS[index]) if e.token_id is not None
        ]

    async def main(session: Session) -> list[list[int]]:
        engine = AsyncLLM(session)
        impatient = engine.generate("a", ENDLESS)
        await anext(impatient)
        await impatient.aclose()
        return await asyncio.gather(*(answer(engine, i) for i in range(len(PROMPTS))))

    with llm.session() as session:
        assert asyncio.run(main(session)) == alone
    assert llm.cache.free_slots == llm.cache.max_sequences


@pytest.mark.parametrize("degree", [2, 4])
def test_the_other_ranks_follow_rank_0(degree: int, folder: Path, alone: list[list[int]]):
    leader, *others = run_on_ranks(degree, served, folder)
    assert leader == (alone, 3)
    assert others == [(None, 3)] * (degree - 1)


@pytest.mark.parametrize(
    ("where", "leader", "says"),
    [
        ("in main", "no more", "ValueError: no more"),
        ("in a receiver", "session has failed", "nobody listens"),
    ],
)
def test_the_other_ranks_end_at_once_when_rank_0_fails(where: str, leader: str, says: str, folder: Path):
    (message, *_), *others = results = run_on_ranks(2, failed, folder, where)
    assert leader in message
    assert all("rank 0 has ended the session" in text and says in text for text, _, _ in others)
    assert all(slots == 3 and seconds < 20 for _, slots, seconds in results)


def test_nothing_is_broadcast_out_of_a_step_that_failed(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    def broken(step: object) -> None:
        sent.append(b"step")
        raise ArithmeticError("broken")

    sent: list[bytes] = []
    session = llm.session()
    session._broadcast = sent.append
    monkeypatch.setattr(llm.engine, "launch", broken)
    with pytest.raises(RuntimeError, match="session has failed"):
        session.submit("a").result()
    session._thread.join()
    assert sent[-1] == b"step"
