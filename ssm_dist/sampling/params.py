"""What one request asks of the sampler."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, Field, field_validator

MAX_LOGPROBS = 20
SMALLEST_TEMPERATURE = 1e-5


def _one_string_is_a_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class SamplingParams(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """How tokens are chosen, and when a request ends. Values out of range raise pydantic's ValidationError.

    Filters apply in this order: repetition penalty, temperature, top-k, top-p, min-p.
    """

    max_new_tokens: int = Field(128, strict=True, ge=1)
    """Tokens to generate at most."""

    temperature: float = Field(0.0, strict=True, ge=0.0, allow_inf_nan=False)
    """Divides the logits; 0 is greedy (the most likely token, the lowest id on ties)."""

    top_k: int = Field(0, strict=True, ge=0)
    """Sample from the k most likely tokens (and those tied with the last of them); 0 is off."""

    top_p: float = Field(1.0, strict=True, gt=0.0, le=1.0)
    """Sample from the fewest tokens whose probabilities add up to top_p; 1 is off."""

    min_p: float = Field(0.0, strict=True, ge=0.0, le=1.0)
    """Sample from the tokens at least min_p times as likely as the most likely one; 0 is off."""

    repetition_penalty: float = Field(1.0, strict=True, gt=0.0, allow_inf_nan=False)
    """Divides positive and multiplies negative logits of tokens in the prompt or generated; 1 is off."""

    seed: int = Field(0, strict=True, ge=0, lt=2**64)
    """With the position and the token id, the only source of randomness of this request."""

    stop: Annotated[tuple[str, ...], BeforeValidator(_one_string_is_a_tuple)] = ()
    """Strings that end the generation; the text is cut before the first one met."""

    ignore_eos: bool = Field(False, strict=True)
    """Go on after an end-of-sequence token."""

    logprobs: int | None = Field(None, strict=True, ge=0, le=MAX_LOGPROBS)
    """Report the log-probability of each sampled token and of this many most likely ones; off by default."""

    @field_validator("temperature")
    @classmethod
    def _is_zero_or_divides(cls, value: float) -> float:
        if 0.0 < value < SMALLEST_TEMPERATURE:
            raise ValueError(
                f"{value} is too small to divide by; use 0 (greedy) or at least {SMALLEST_TEMPERATURE}"
            )
        return value

    @field_validator("stop")
    @classmethod
    def _is_not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("a stop string is empty, so it would stop every text at once; remove it")
        return value

    @classmethod
    def of(cls, section: BaseModel) -> "SamplingParams":
        """Those of a section of the configuration, which has these keys among others."""
        return SamplingParams(**{name: getattr(section, name) for name in SamplingParams.model_fields})

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0.0

    @property
    def filters_by_rank(self) -> bool:
        """Whether the tokens have to be sorted by probability: top-k or top-p, when not greedy."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1.0)
