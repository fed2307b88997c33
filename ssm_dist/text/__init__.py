"""Between text and token ids: the tokenizer, chat templates, and the text of a stream of ids."""

from ssm_dist.text.stream import TextStream
from ssm_dist.text.tokenizer import Tokenizer, read_eos_ids

__all__ = ["TextStream", "Tokenizer", "read_eos_ids"]
