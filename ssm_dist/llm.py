"""The Python API: a loaded model that generates, streams and scores."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import torch
from typing_extensions import Self

from ssm_dist.build import LoadedModel, load_model
from ssm_dist.capture import start_engine
from ssm_dist.checkpoint.save import save_huggingface
from ssm_dist.config import Config
from ssm_dist.config_reading import build_config
from ssm_dist.errors import UserError
from ssm_dist.generation import NO_ROOM, Collector, Completion, Run, TokenEvent
from ssm_dist.models.language_model import LanguageModel
from ssm_dist.parallel.collectives import broadcast_bytes, carrier
from ssm_dist.prefix_cache import PrefixCache
from ssm_dist.prefix_limits import prefix_limits
from ssm_dist.preparation import Preparer
from ssm_dist.requests import Prompt, Request
from ssm_dist.sampling.params import SamplingParams
from ssm_dist.saved_states import SavedState, load_state, save_state
from ssm_dist.score import Score, score_tokens
from ssm_dist.session import Session
from ssm_dist.state_cache import StateCache
from ssm_dist.state_sizes import slot_bytes
from ssm_dist.step_plans import follow
from ssm_dist.text import Tokenizer

Result = TypeVar("Result")


class LLM:
    """A model on this rank, with its state cache. Under torchrun every rank makes the same calls.

    The prompts of rank 0 count, and every rank returns the same results.
    """

    def __init__(self, loaded: LoadedModel, config: Config) -> None:
        self.config = config
        self.loaded = loaded
        self.model: LanguageModel = loaded.model
        """This rank's shard; an ordinary module of local tensors."""
        self.tokenizer: Tokenizer | None = loaded.tokenizer
        shapes, asked = self.model.state_shapes(), config.cache
        slot = slot_bytes(shapes, loaded.dtype, loaded.state_dtype)
        self.cache = StateCache(
            shapes,
            max_sequences=config.cache.max_sequences,
            max_tokens=config.cache.max_tokens,
            dtype=loaded.dtype,
            state_dtype=loaded.state_dtype,
            device=loaded.device,
            snapshots=asked.prefix_device_bytes // slot,
        )
        self.prefixes = PrefixCache(self.cache, prefix_limits(config.cache, loaded.chunk_tokens))
        self._preparer = Preparer(loaded, self.cache)
        self._session: Session | None = None
        self._streamed: list[Run] = []
        """Of streams that somebody reads."""
        self.engine = start_engine(loaded, self.cache, config)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters that this rank holds."""
        return sum(p.nbytes for p in self.model.parameters())

    @property
    def reduction(self) -> str:
        """Which reduction runs between ranks, for people."""
        if self.loaded.tp is None:
            return "none (one rank)"
        wire = self.loaded.tp.reductions.branch
        codec = wire.codec if wire.codec == "none" else f"{wire.codec} in groups of {wire.group_size}"
        codec += ", with error feedback over the process group" if self.loaded.tp.reductions.feedback else ""
        return f"{carrier(self.loaded.tp.group)}, algorithm {wire.algorithm}, codec {codec}"

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """Load what a configuration names; see `load_model` for the errors."""
        return cls(load_model(config), config)

    @classmethod
    def from_pretrained(
        cls, checkpoint: str | Path, *, tensor_parallel: int | None = None, **sections: dict[str, Any]
    ) -> Self:
        """Load a Hugging Face folder or hub id.

        tensor_parallel: the degree; by default the number of ranks that torchrun started. Sections of the
        configuration are given as dictionaries: from_pretrained(folder, cache={"max_sequences": 64}). Raises
        `UserError` for keys and values that are none, and as `load_model`.
        """
        degree = int(os.environ.get("WORLD_SIZE", "1")) if tensor_parallel is None else tensor_parallel
        for name, section in sections.items():
            if not isinstance(section, dict):
                raise UserError(
                    f"from_pretrained: {name} = {section!r} is not a section; write a dictionary of keys, "
                    'as in cache={"max_sequences": 64}'
                )
        model = {"checkpoint": str(checkpoint)} | sections.pop("model", {})
        given = {"model": model, "parallel": {"tensor": degree}, **sections}
        return cls.from_config(build_config(None, given, given_by="from_pretrained"))

    def generate(
        self,
        prompts: Prompt | list[Prompt],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        after: SavedState | None = None,
    ) -> list[Completion]:
        """Answer all prompts; the completions are in their order.

        params: one for all, or one a prompt. after: a state (`load_state`) that every prompt continues, with
        "" for nothing more. Raises `UserError` for the first prompt that cannot run, before any of them does;
        while a session is open, and where half-read streams leave no room.
        """
        self._require_no_session()
        history = None if after is None else after.token_ids
        requests = self._preparer.runnable(prompts, params, history)
        collector = Collector(requests, with_text=self.tokenizer is not None)
        for event in self.run(requests):
            collector.add(event)
        return collector.completions

    def stream(
        self, prompts: Prompt | list[Prompt], params: SamplingParams | list[SamplingParams] | None = None
    ) -> Generator[TokenEvent, None, None]:
        """Answer all prompts, yielding each token as it is sampled; ranks iterate alike.

        Raises as `generate`, at once; what comes up later, such as a session, at the next token, which ends
        the stream. One that is half-read holds its slots: read it to its end, or `close` it.
        """
        self._require_no_session()
        return self.run(self._preparer.runnable(prompts, params))

    def session(self) -> Session:
        """Take requests while others run: `session.submit(prompt, params)`; close it, or use it in a `with`.

        On rank 0 only, while every other rank is in `follow`. Nothing else may run on this model meanwhile.
        Raises `UserError` while another one is open, or a stream is half-read.
        """
        self._require_no_session()
        self._require_no_stream()
        tp, device = self.loaded.tp, self.loaded.device
        assert tp is None or tp.rank == 0, "the session is rank 0's; the other ranks call follow()"
        hosts = None if tp is None else tp.host_group()
        self._session = Session(
            self._new_run(),
            self._preparer.one,
            broadcast=lambda data: hosts and broadcast_bytes(data, hosts, torch.device("cpu")),
            enter_thread=lambda: torch.cuda.set_device(device) if device.type == "cuda" else None,
            with_text=self.tokenizer is not None,
        )
        return self._session

    def follow(self) -> None:
        """On ranks other than 0: take part in rank 0's session until it is closed.

        Raises `UserError` while a stream is half-read, as `session` on rank 0.
        """
        self._require_no_stream()
        tp = self.loaded.tp
        assert tp is not None and tp.rank > 0, "rank 0 leads: it opens a session"
        hosts = tp.host_group()
        follow(self._new_run(), lambda: broadcast_bytes(b"", hosts, torch.device("cpu")))

    def serve(self, main: Callable[[Session], Result]) -> Result | None:
        """main(session) on rank 0; the other ranks follow it to its end, and return None."""
        if self.loaded.tp is not None and self.loaded.tp.rank > 0:
            self.follow()
            return None
        with self.session() as session:
            return main(session)

    def score(self, texts: Prompt | list[Prompt]) -> list[Score]:
        """Log-probabilities and perplexity of each text, or token ids. Raises `UserError` as `generate`."""
        self._require_no_session()
        requests = self._preparer.runnable(texts, SamplingParams(max_new_tokens=1))
        if not all(self.cache.has_room(len(request.token_ids)) for request in requests):
            raise UserError(NO_ROOM)
        chunk, vocab_size = self.loaded.chunk_tokens, self.loaded.config.vocab_size
        return [
            score_tokens(self.engine, self.loaded.tp, request.token_ids, vocab_size, chunk)
            for request in requests
        ]

    def save_state(self, file: str | Path, prompt: Prompt) -> SavedState:
        """Write the state after a prompt, for `load_state` under any degree; ranks call it alike.

        A conversation is saved by its token ids: completion.prompt_token_ids + completion.token_ids.
        Raises `UserError` when the file cannot be written, or as `generate`.
        """
        self._require_no_session()
        (request,) = self._preparer.runnable([prompt], SamplingParams(max_new_tokens=1))
        return save_state(
            self.loaded, self.engine, self.prefixes, request.token_ids, Path(file),
            self.loaded.chunk_tokens,
        )  # fmt: skip

    def load_state(self, file: str | Path) -> SavedState:
        """Hold a saved state: prompts that begin with its tokens resume from it. Ranks call it alike.

        It stays in host memory until `forget_state`. Raises `UserError` for a damaged file, or one of another
        model or dtype, and while a session is open.
        """
        self._require_no_session()
        return load_state(self.loaded, self.prefixes, Path(file))

    def forget_state(self, state: SavedState) -> None:
        """Let go of a state that `load_state` returned. Raises `UserError` while a session is open."""
        self._require_no_session()
        self.prefixes.remove(state.token_ids[:-1])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole model as a Hugging Face folder that transformers loads; ranks call it alike.

        Raises `UserError` when the folder exists and is not empty, when the disk is too full, and while a
        session is open.
        """
        self._require_no_session()
        loaded = self.loaded
        save_huggingface(
            self.model,
            loaded.plan.parameters,
            loaded.spec.weights(loaded.config),
            loaded.config.to_huggingface(),
            folder,
            mesh=None if loaded.tp is None else loaded.tp.mesh,
            tokenizer_source=None if loaded.checkpoint is None else loaded.checkpoint.folder,
        )

    def prepare_lines(self, lines: list[str], base: SamplingParams) -> list[Request]:
        """Requests of a prompts file's lines; one that cannot run carries its `error`."""
        self._require_no_session()
        return self._preparer.lines(lines, base)

    def prepare(self, prompts: list[Prompt], params: list[SamplingParams]) -> list[Request]:
        """Requests of prompts; one that cannot run carries its `error`."""
        self._require_no_session()
        return self._preparer.every(prompts, params)

    def run(
        self, requests: list[Request], on_prompt: Callable[[int, int], None] = lambda index, tokens: None
    ) -> Generator[TokenEvent, None, None]:
        """Run prepared requests to their end, yielding tokens as they are sampled; ranks iterate alike.

        on_prompt(request, tokens) is told how much of a prompt has been read, step by step. Raises
        `UserError` while a session is open.
        """
        self._require_no_session()
        return self._events(requests, on_prompt)

    def _events(
        self, requests: list[Request], on_prompt: Callable[[int, int], None]
    ) -> Generator[TokenEvent, None, None]:
        """`run`, from the moment when the first token is asked for."""
        self._require_no_session()  # one may have been opened since
        run = self._new_run()
        self._streamed.append(run)
        try:
            yield from run.events(requests, on_prompt)
        finally:
            self._streamed.remove(run)

    def _require_no_session(self) -> None:
        """Before anything else that takes all ranks: the others may be in `follow`, and the engine busy."""
        if self._session is not None and not self._session.closed:
            raise UserError("a session is open on this model; submit prompts to it, or close it first")

    def _require_no_stream(self) -> None:
        if not all(run.ended for run in self._streamed):
            raise UserError("a stream of this model is half-read; read it to its end, or close it first")

    def _new_run(self) -> Run:
        return Run(
            self.engine,
            self.prefixes,
            self.tokenizer,
            self.loaded.eos_ids,
            self.loaded.chunk_tokens,
        )
