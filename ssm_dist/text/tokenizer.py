"""Text to token ids and back, as a checkpoint folder's `tokenizer.json` says."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from ssm_dist.errors import UserError
from ssm_dist.text.chat import render_chat


class Tokenizer:
    """A `tokenizers.Tokenizer` with what the files beside it add: end-of-sequence ids and a chat template."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        eos_ids: frozenset[int] = frozenset(),
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        # A tokenizer.json may keep the truncation and padding of its training; a prompt is taken whole.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.eos_ids = eos_ids
        self.chat_template = chat_template
        self._special_tokens = dict(special_tokens or {})
        self._special_ids = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self.byte_ids = _byte_fallback_ids(tokenizer)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer | None":
        """Read a checkpoint folder; None without a tokenizer.json. Raises UserError for broken files."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception for whatever is wrong
            raise UserError(f"{path} is not a tokenizer that `tokenizers` can read: {error}") from error
        special_tokens = _special_tokens(folder)
        return cls(
            tokenizer,
            eos_ids=read_eos_ids(folder, tokenizer.token_to_id(special_tokens.get("eos_token", ""))),
            chat_template=_chat_template(folder),
            special_tokens=special_tokens,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with the special tokens that the tokenizer's post-processor adds.

        A rendered chat template has written its own already. Raises UserError for a string that is not
        Unicode text (half of a surrogate pair).
        """
        try:
            # a batch of one, since only batches can leave out the places in the text, half of the time
            (encoded,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return encoded.ids
        except TypeError as error:
            raise UserError(f"a prompt cannot be tokenised, is it Unicode text? {error}") from error

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; special tokens, and ids that the tokenizer does not have, show nothing."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def shows(self, token_id: int) -> bool:
        """Whether `decode` takes notice of this id."""
        return token_id not in self._special_ids and bool(self._tokenizer.id_to_token(token_id))

    def apply_chat_template(self, messages: Sequence[Mapping[str, object]]) -> str:
        """The prompt that asks for an answer to these messages; encode it with add_special_tokens=False.

        Raises UserError without a template, and for messages that the template cannot render.
        """
        if self.chat_template is None:
            raise UserError(
                "this checkpoint has no (default) chat template for `messages`: give a text prompt"
            )
        return render_chat(self.chat_template, messages, self._special_tokens)


def read_eos_ids(folder: Path, eos_token_id: int | None = None) -> frozenset[int]:
    """The ids that end a sequence: generation_config.json's and the tokenizer's, else config.json's."""
    own = frozenset() if eos_token_id is None else frozenset({eos_token_id})
    return (own | _eos_ids(folder / "generation_config.json")) or _eos_ids(folder / "config.json")


def _eos_ids(path: Path) -> frozenset[int]:
    found = _read_json(path).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(token_id, int) for token_id in ids):
        raise UserError(f"{path}: `eos_token_id` must be an integer or a list of integers, not {found!r}")
    return frozenset(ids)


def _special_tokens(folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token`, ...: strings, or objects with the string under `content`."""
    raw = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    tokens = {name: value for name, value in raw.items() if name.endswith("_token")}
    contents = {
        name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()
    }
    return {name: content for name, content in contents.items() if isinstance(content, str)}


def _chat_template(folder: Path) -> str | None:
    """The file chat_template.jinja, else tokenizer_config.json's: a string, or a list with a "default"."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    found = _read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        named = (entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default")
        found = next(named, {}).get("template")
    if not isinstance(found, str | None):
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: `chat_template` must be a string or a list of them"
        )
    return found


def _byte_fallback_ids(tokenizer: tokenizers.Tokenizer) -> frozenset[int]:
    """The ids of <0x00> ... <0xFF>, if the decoder joins them to UTF-8."""
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    if "ByteFallback" not in {part.get("type") for part in (decoder, *decoder.get("decoders", ()))}:
        return frozenset()
    names = (f"<0x{value:02{case}}>" for value in range(256) for case in "Xx")
    return frozenset(token_id for name in names if (token_id := tokenizer.token_to_id(name)) is not None)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a JSON object")
    return found
