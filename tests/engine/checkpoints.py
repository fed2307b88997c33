"""Small checkpoints with a tokenizer, for tests that go through the whole program."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.oracle import random_model

EOS = 96


def byte_tokenizer(size: int) -> Tokenizer:
    """Byte-level, without merges, of the first `size` bytes in printable order; ids are the vocabulary's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:size]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save_checkpoint(name: str, folder: Path, *, with_tokenizer: bool = True) -> Path:
    """The oracle's model of that name, with a tokenizer of printable ASCII."""
    random_model(name).save_pretrained(folder)
    generation = folder / "generation_config.json"
    settings = json.loads(generation.read_text()) if generation.exists() else {}
    generation.write_text(json.dumps(settings | {"eos_token_id": EOS}))
    if with_tokenizer:
        byte_tokenizer(94).save(str(folder / "tokenizer.json"))
    return folder
