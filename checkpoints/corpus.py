"""The text of the demo checkpoints, the sources of Python's standard library, and its tokenizer."""

from __future__ import annotations

import hashlib
import json
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"
"""Ends every file, id 0."""

SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "lib-dynload", "__pycache__", "test", "tests", "idle_test",
    "encodings",  # tables of character codes
    "pydoc_data",  # the language reference as one string
}  # fmt: skip

MOST_DIGITS = 0.12
"""Share of digits above which a file is a table rather than code."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "# {{ message['role'] }}: {{ message['content'] | trim | replace('\n', '\n# ') }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}\n{% endif %}"
)
"""A conversation as the comments above a piece of code: the only chat that a model of source text knows."""


@dataclass(frozen=True)
class Corpus:
    """Tokens of the training and the validation files, and what they were made of."""

    train: NDArray[np.int32]
    """(n,)"""
    validation: NDArray[np.int32]
    """(m,)"""
    bytes_per_token: float
    """UTF-8 bytes of the validation files for each of their tokens; end tokens stand for no bytes."""
    facts: dict[str, object]
    """Versions, numbers of files, bytes and tokens, for TRAINING.json."""


def is_code(text: str) -> bool:
    """Whether a file is code that people write, rather than an empty file or a table of numbers."""
    return bool(text.strip()) and sum(map(str.isdigit, text)) < MOST_DIGITS * len(text)


def standard_library() -> dict[str, str]:
    """Relative path -> text of the standard library's own modules, sorted; tests and data left out."""
    root = Path(sysconfig.get_path("stdlib"))
    texts: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        generated = relative.name.startswith(("_sysconfigdata", "_sysconfig_data"))
        if generated or SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if is_code(text):
            texts[relative.as_posix()] = text
    return texts


def held_out(path: str) -> bool:
    """Whether a file belongs to validation: one in twenty, by a hash of its path."""
    return int(hashlib.sha256(path.encode()).hexdigest(), 16) % 20 == 0


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE in the manner of GPT-2; any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, as AutoTokenizer reads them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **names,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def encode(tokenizer: Tokenizer, texts: list[str]) -> NDArray[np.int32]:
    """One (n,) array: the files one after another, each ended by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.array([token for file in encoded for token in [*file.ids, end]], dtype=np.int32)


def build_corpus(vocab_size: int, folder: Path) -> Corpus:
    """Read the standard library, train its tokenizer (training files only), save that to `folder`, encode."""
    texts = standard_library()
    parts = {
        "train": [text for path, text in texts.items() if not held_out(path)],
        "validation": [text for path, text in texts.items() if held_out(path)],
    }
    if not parts["train"] or not parts["validation"]:
        raise ValueError(
            f"no sources under {sysconfig.get_path('stdlib')}: install the standard library's .py files"
        )
    tokenizer = train_tokenizer(parts["train"], vocab_size)
    save_tokenizer(tokenizer, folder)
    tokens = {name: encode(tokenizer, files) for name, files in parts.items()}
    sizes = {name: sum(len(text.encode()) for text in files) for name, files in parts.items()}
    facts: dict[str, object] = {
        "text": f"standard library of Python {platform.python_version()}, .py files without tests and tables",
        "sha256": hashlib.sha256("\0".join(f"{p}\0{t}" for p, t in texts.items()).encode()).hexdigest(),
        "vocab_size": tokenizer.get_vocab_size(),
    }
    for name in parts:
        facts[name] = {"files": len(parts[name]), "bytes": sizes[name], "tokens": len(tokens[name])}
    return Corpus(
        tokens["train"], tokens["validation"], sizes["validation"] / len(tokens["validation"]), facts
    )
