"""A checkpoint's folder, from a path or from the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from ssm_dist.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""What goes along with a model to and from the hub, besides its configuration and weights."""

_PATTERNS = ["config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def resolve_folder(
    name_or_path: str | Path, *, downloads: bool = True, barrier: Callable[[], None] = lambda: None
) -> Path:
    """The folder of a checkpoint: a local path as it is, a hub id after its download.

    `downloads` is true on the one rank of each host that fetches; the others wait for it at `barrier`, which
    every rank calls exactly once, and then look in the cache. Only configuration, safetensors and tokenizer
    files are fetched, and nothing when `HF_HUB_OFFLINE` is set. Raises UserError if there is no such folder
    or model.
    """
    if not downloads:
        barrier()
        return _folder(name_or_path, cached=True)
    try:
        return _folder(name_or_path, cached=False)
    finally:
        barrier()


def _folder(name_or_path: str | Path, cached: bool) -> Path:
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{name_or_path} is a file; give the folder that holds config.json and the weights")
    if not _HUB_ID.fullmatch(str(name_or_path)):
        raise UserError(f"There is no folder {name_or_path}")
    return _snapshot(str(name_or_path), cached)


def _snapshot(name: str, cached: bool) -> Path:
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=_PATTERNS, ignore_patterns=["*/*"], local_files_only=cached
            )
        )
    except GatedRepoError:
        reason = "the model is gated: accept its terms on its hub page, then run `hf auth login`"
    except RepositoryNotFoundError:
        reason = "the hub has no such model, or it is private (then run `hf auth login`)"
    except LocalEntryNotFoundError:
        reason = "it is not in the local cache, and the hub is offline or cannot be reached (HF_HUB_OFFLINE?)"
    except HFValidationError as error:
        reason = str(error)
    except (HfHubHTTPError, OSError) as error:
        reason = f"the download failed: {error}"
    raise UserError(f"There is no folder {name}, and as a model of the Hugging Face hub: {reason}")
