"""What a job is: the schema of the TOML file and of the command line; `config_reading` reads the two.

The names of sections and keys are a promise: others script against them. Relative paths, in the file as
on the command line, are relative to the current directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from ssm_dist.sampling.params import SamplingParams

ALTERNATIVES = {"model": ("checkpoint", "preset"), "generation": ("prompts", "prompts_file")}
"""Pairs of keys, by section, of which a job sets one."""


class Section(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """A table of the TOML file; the docstring under a field is its help on the command line."""


class ModelConfig(Section):
    checkpoint: str | None = None
    """A Hugging Face folder, or the id of a model on the hub."""

    preset: str | None = None
    """Build this model's real shapes with random weights, without a checkpoint (mamba-2.8b, for example)."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights and activations; auto takes the checkpoint's."""

    @model_validator(mode="after")
    def _names_one_model(self) -> ModelConfig:
        if self.checkpoint is None and self.preset is None:
            raise ValueError("no model is named; set model.checkpoint (a folder or a hub id) or model.preset")
        if self.checkpoint is not None and self.preset is not None:
            raise ValueError("model.checkpoint and model.preset are both set; keep one of them")
        return self


class ParallelConfig(Section):
    tensor: int = Field(1, strict=True, ge=1)
    """Tensor-parallel degree: the number of ranks. It must divide d_inner, and a hybrid model's heads."""


class KernelsConfig(Section):
    backend: Literal["auto", "reference", "triton", "mamba_ssm"] = "auto"
    """Implementation of the ops; auto takes the fastest that works on this device."""

    fuse_layers: Literal["auto", "none"] = "auto"
    """Whether decode steps of a few sequences run many layers in one kernel; auto: where GPU, model and sums
    allow it."""


class ReductionConfig(Section):
    codec: Literal["none", "int8", "fp8", "int4"] = "none"
    """Quantisation of what crosses ranks; none sends it as it is."""

    group_size: Literal[32, 128] | None = None
    """Values that share a scale in a quantised reduction; by default 128, and 32 for int4."""

    x_proj_codec: Literal["none", "int8", "fp8", "int4"] = "none"
    """The same for x_proj's small sum, which feeds the recurrence and is best left exact."""

    embedding_codec: Literal["none", "int8", "fp8", "int4"] = "none"
    """The same for the embedding, which is exact without it."""

    algorithm: Literal["auto", "process_group", "all_reduce", "exchange", "one_shot", "two_shot", "bulk"] = (
        "auto"
    )
    """How ranks add up: auto goes by the size; process_group too, as if GPUs shared no memory."""

    feedback: bool = False
    """Error feedback: what the codec drops of a layer's branch goes into the next; over the process group."""

    table: Path | None = None
    """What auto goes by: a file that `ssm-dist calibrate` wrote; by default a table that ships."""

    timeout_seconds: float = Field(300.0, gt=0.0)
    """How long a rank waits for the others in a reduction before the job ends."""

    @property
    def feeds_back(self) -> bool:
        """Whether errors are fed back: a benchmark may take the codec out of a section that asks for it."""
        return self.feedback and self.codec != "none"

    @model_validator(mode="after")
    def _goes_together(self) -> ReductionConfig:
        if self.algorithm == "all_reduce" and self.codec != "none":
            raise ValueError(
                f"reduction.algorithm = 'all_reduce' sends numbers as they are, but reduction.codec is "
                f"{self.codec!r}; set codec = 'none', or another algorithm"
            )
        if self.feedback and self.codec == "none":
            raise ValueError(
                "reduction.feedback = true feeds back what a codec drops, but reduction.codec is 'none'; "
                "set codec, or feedback = false"
            )
        if self.feedback and self.algorithm not in ("auto", "process_group", "exchange"):
            raise ValueError(
                f"reduction.feedback = true goes over the process group, but reduction.algorithm is "
                f"{self.algorithm!r}; set algorithm = 'auto', or feedback = false"
            )
        return self


class CacheConfig(Section):
    max_sequences: int = Field(16, strict=True, ge=1)
    """State slots: sequences in flight at a time."""

    max_tokens: int = Field(32768, strict=True, ge=1)
    """Tokens of attention keys and values held at a time, over all sequences (hybrid models only)."""

    state_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the recurrent state; below float32 it drifts over long generations."""

    prefix_device_bytes: int = Field(0, strict=True, ge=0)
    """Bytes on each device for states of prompts and answers, for prompts that begin alike; 0 is off."""

    prefix_host_bytes: int = Field(0, strict=True, ge=0)
    """Bytes of host memory, for each rank, that hold what leaves the device; 0 is off."""

    prefix_folder: Path | None = None
    """A folder for what leaves the host, emptied at the end; together with prefix_folder_bytes."""

    prefix_folder_bytes: int = Field(0, strict=True, ge=0)
    """Bytes in that folder, for each rank."""

    prefix_interval: int = Field(2048, strict=True, ge=1)
    """Tokens between two states kept of a prompt; those at its end and the answer's are kept besides."""


class CompileConfig(Section):
    mode: Literal["auto", "none", "capture", "compile"] = "auto"
    """capture replays steps from CUDA graphs; compile passes the decode step through torch.compile first;
    none runs steps as they are written; auto is capture on a GPU, else none."""


CHUNK_TOKENS = 16384
"""Of a prefill step by default, on one GPU or a CPU."""


class PrefillConfig(Section):
    chunk_tokens: int | None = Field(None, strict=True, ge=1)
    """Prompt tokens in one step at most; longer prompts continue from the state. By default 16384, on GPUs
    times the largest power of two that is at most [parallel] tensor."""

    overlap_tokens: int | None = Field(None, strict=True, ge=0)
    """With several ranks, a step of so many tokens is worked on in two halves, the sums over ranks of one
    beside the compute of the other; 0 never; by default 8192, or 32768 where a codec makes sums shorter."""


class GenerationConfig(SamplingParams, Section):
    prompts: tuple[str, ...] = ()
    """Texts to continue."""

    prompts_file: Path | None = None
    """JSONL: {"prompt": "..."}, {"prompt_token_ids": [...]} or {"messages": [...]} a line, any generation
    option beside it."""

    @model_validator(mode="after")
    def _has_one_source_of_prompts(self) -> GenerationConfig:
        if self.prompts and self.prompts_file is not None:
            raise ValueError("generation.prompts and generation.prompts_file are both set; keep one of them")
        return self


class OutputConfig(Section):
    file: Path | None = None
    """Write the results here as JSONL, one line a prompt in the order of the prompts."""


class BenchmarkConfig(Section):
    batches: tuple[int, ...] = ()
    """Sequences that run together; naming any, or any cases, turns the job into a benchmark."""

    prompt_tokens: tuple[int, ...] = (2048,)
    """Lengths of the prompts, of random tokens; every batch is run with each."""

    new_tokens: tuple[int, ...] = (128,)
    """Tokens generated after each prompt; every batch and length is run with each. 1 is prefill alone."""

    cases: tuple[str, ...] = ()
    """Cases besides that grid, written BxP+G: "64x2048+128" is 64 prompts of 2048 tokens, 128 new each."""

    models: tuple[str, ...] = ()
    """Presets to run one after the other, in place of the one of [model]."""

    codecs: tuple[Literal["none", "int8", "fp8", "int4"], ...] = ()
    """The same for reduction.codec."""

    backends: tuple[Literal["auto", "reference", "triton", "mamba_ssm"], ...] = ()
    """The same for kernels.backend."""

    repeats: int = Field(3, strict=True, ge=1)
    """Measured runs of a case; medians are reported."""

    warmup: int = Field(2, strict=True, ge=0)
    """Runs of a case before those; a prompt's step is captured when its shape comes for the second time."""

    breakdown: bool = True
    """Profile every case once more after all are timed: launches, time in kernels and in reductions."""

    profile: Path | None = None
    """Write a trace of the first case here, its prefill and some decode steps on rank 0, for Perfetto."""

    folder: Path | None = None
    """Write report.json and report.md here, with plots; report.json after every case already."""

    @field_validator("new_tokens", mode="before")
    @classmethod
    def _takes_one_number_for_many(cls, value: Any) -> Any:
        return (value,) if type(value) is int else value

    @field_validator("batches", "prompt_tokens", "new_tokens")
    @classmethod
    def _counts_from_one(cls, counts: tuple[int, ...]) -> tuple[int, ...]:
        if min(counts, default=1) < 1:
            raise ValueError("every number must be at least 1")
        return counts

    @property
    def wanted(self) -> bool:
        """Whether the job is a benchmark."""
        return bool(self.batches or self.cases)


class Config(Section):
    """Everything that a job needs to know."""

    model: ModelConfig
    """Which model runs: a checkpoint or a preset, one of the two."""

    parallel: ParallelConfig = ParallelConfig()
    """How the model is spread over ranks."""

    kernels: KernelsConfig = KernelsConfig()
    """Which kernels run."""

    reduction: ReductionConfig = ReductionConfig()
    """How ranks add up their partial sums."""

    cache: CacheConfig = CacheConfig()
    """What is held for the sequences in flight."""

    compile: CompileConfig = CompileConfig()
    """Compilation of the decode step."""

    prefill: PrefillConfig = PrefillConfig()
    """How prompts are read."""

    generation: GenerationConfig = GenerationConfig()
    """What is generated, and how tokens are chosen."""

    benchmark: BenchmarkConfig = BenchmarkConfig()
    """A grid of cases to time, in place of prompts to answer."""

    output: OutputConfig = OutputConfig()
    """Where results go, besides the terminal."""

    @model_validator(mode="before")
    @classmethod
    def _runs_the_benchmarks_models(cls, sections: Any) -> Any:
        """A benchmark that names models needs no other: the first of them takes the place of [model]'s."""
        if not isinstance(sections, dict):
            return sections
        model, benchmark = (sections.get(name, {}) for name in ("model", "benchmark"))
        if not isinstance(model, dict) or not isinstance(benchmark, dict):
            return sections
        models, measures = benchmark.get("models"), benchmark.get("batches") or benchmark.get("cases")
        if not measures or not isinstance(models, (tuple, list)) or not models:
            return sections
        if not isinstance(models[0], str) or set(ALTERNATIVES["model"]) & model.keys():
            return sections
        return sections | {"model": model | {"preset": models[0]}}

    @model_validator(mode="after")
    def _feeds_back_in_eager_steps(self) -> Config:
        if self.reduction.feedback and self.compile.mode == "compile":
            raise ValueError(
                "reduction.feedback = true is not for compiled steps; set compile.mode = 'capture', or "
                "feedback = false"
            )
        return self

    def chunk_tokens(self, device_type: str) -> int:
        """Of a prefill step at most, on "cuda" or "cpu": by default enough to keep each GPU busy."""
        if self.prefill.chunk_tokens is not None:
            return self.prefill.chunk_tokens
        tokens, interval = CHUNK_TOKENS, self.cache.prefix_interval
        if device_type == "cuda":
            tokens <<= self.parallel.tensor.bit_length() - 1
        while tokens > CHUNK_TOKENS and interval > tokens and interval % tokens:
            tokens //= 2  # an interval longer than a chunk consists of whole ones
        return tokens
