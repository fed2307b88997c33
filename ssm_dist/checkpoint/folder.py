"""A checkpoint folder: its configuration, its tensors by their headers, and whether a model can use it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssm_dist.checkpoint.headers import DTYPES, DamagedFile, StoredTensor, read_header
from ssm_dist.checkpoint.hub import resolve_folder
from ssm_dist.checkpoint.layouts import Layout, Shape
from ssm_dist.checkpoint.weights import WeightMap
from ssm_dist.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHOWN = 8  # problems listed before the rest is counted
_NAMED = 4  # tensors named a problem

_NOT_UNPICKLED = (
    "its weights are in {names}, which ssm-dist does not unpickle, because that can run any code. Convert it "
    "in an environment that you trust: load it with transformers (an original state-spaces checkpoint goes "
    "through its convert_mamba_ssm_checkpoint_to_pytorch.py first) and call save_pretrained(), which writes "
    'safetensors. On the hub, the converted state-spaces models have the same name with "-hf" at the end'
)


@dataclass(frozen=True)
class Stored:
    """Where one of our parameters is in a checkpoint, and how to read it."""

    tensor: StoredTensor
    layout: Layout
    copies: tuple[StoredTensor, ...]
    """The same parameter, stored again under other names; that the values agree, only reading can show."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose config.json has been parsed and whose safetensors headers have been read."""

    folder: Path
    config: dict[str, Any]
    """config.json, as it is."""
    tensors: Mapping[str, StoredTensor]
    problems: tuple[str, ...]
    """What is wrong with the files themselves; `validate` reports it with the rest."""

    def validate(self, weights: WeightMap, shapes: Mapping[str, Shape]) -> dict[str, Stored]:
        """Where every parameter is, from headers alone, so that nothing has been allocated when this fails.

        shapes: the global shape of each of the model's parameters by path, ties once. Raises one UserError
        that lists every problem: damaged or missing files, missing, unexpected and mis-shaped tensors, dtypes
        that cannot be loaded.
        """
        spell = _spelling(weights, self.tensors)
        names = {path: [spell(name) for name in weights.entries[path].names] for path in shapes}
        wanted = {
            name: weights.entries[path].layout.huggingface_shape(shape)
            for path, shape in shapes.items()
            for name in names[path]
        }
        found = {path: [self.tensors[n] for n in names[path] if n in self.tensors] for path in shapes}
        missing = [names[path][0] for path in shapes if not found[path]]
        problems = [*self.problems, *_compared(self.tensors, wanted)]
        if not self.problems:  # of damaged files, all tensors would be missing
            problems += _counted("missing", missing)
        if problems:
            raise _unusable(self.folder, problems)
        return {
            path: Stored(first, weights.entries[path].layout, tuple(copies))
            for path, (first, *copies) in found.items()
        }


def open_checkpoint(
    name_or_path: str | Path, *, downloads: bool = True, barrier: Callable[[], None] = lambda: None
) -> Checkpoint:
    """Open a Hugging Face folder or a hub id; see `resolve_folder` for `downloads` and `barrier`.

    Raises UserError if it cannot be found, has no readable config.json, or no safetensors weights. Damaged
    weight files are reported by `Checkpoint.validate`.
    """
    folder = resolve_folder(name_or_path, downloads=downloads, barrier=barrier)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(f"{folder} has no config.json; give a folder as save_pretrained() writes it")
    config = _json(config_file)
    tensors, problems = _read_tensors(folder)
    return Checkpoint(folder, config, tensors, tuple(problems))


def _read_tensors(folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors of all files by name, and what is wrong with the files."""
    if (folder / SINGLE).is_file():
        return _read_files(folder, [SINGLE])
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} cannot be loaded: {_why_no_weights(folder)}.")
    index = _json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise UserError(f'{folder / INDEX} has no "weight_map" from tensor names to file names')
    if any(Path(file).name != file for file in index.values()):
        raise UserError(f"{folder / INDEX} names files outside its folder")
    tensors, problems = _read_files(folder, sorted(set(index.values())))
    read = {tensor.file.name for tensor in tensors.values()}
    lost = [
        f"{name} ({file})"
        for name, file in index.items()
        if file in read and (name not in tensors or tensors[name].file.name != file)
    ]
    return tensors, problems + _counted("in the index, but not in the file it names", lost)


def _read_files(folder: Path, files: Iterable[str]) -> tuple[dict[str, StoredTensor], list[str]]:
    tensors: dict[str, StoredTensor] = {}
    problems = []
    for file in files:
        try:
            tensors |= read_header(folder / file)
        except FileNotFoundError:
            problems.append(f"{file} is missing, though the index names it; download it again")
        except DamagedFile as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{file} cannot be read: {error.strerror}")
    return tensors, problems


def _why_no_weights(folder: Path) -> str:
    if pickled := sorted(file.name for file in folder.glob("*.bin")):
        return _NOT_UNPICKLED.format(names=pickled[0] if len(pickled) == 1 else f"{pickled[0]}, ...")
    if files := sorted(file.name for file in folder.glob("*.safetensors")):
        return f"it has {files[0]}, but neither {SINGLE} nor {INDEX}, which says what the files hold"
    return (
        f"it has neither {SINGLE} nor {INDEX}. ssm-dist reads only safetensors; a model published as "
        "pytorch_model.bin has to be converted first, by loading it with transformers and save_pretrained()"
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{file} is not a JSON object")
    return parsed


def _spelling(weights: WeightMap, tensors: Mapping[str, StoredTensor]) -> Callable[[str], str]:
    """How this checkpoint spells a name: a bare model's goes without the prefix."""
    bare = not any(name.startswith(weights.prefix) for name in tensors)
    return lambda name: name.removeprefix(weights.prefix) if bare else name


def _compared(tensors: Mapping[str, StoredTensor], wanted: Mapping[str, Shape]) -> list[str]:
    """What is wrong with the tensors that are there."""
    unexpected = [name for name in tensors if name not in wanted]
    known = {name: tensor for name, tensor in tensors.items() if name in wanted}
    shapes = [f"{n} is {t.shape}, not {wanted[n]}" for n, t in known.items() if t.shape != wanted[n]]
    dtypes = [f"{n} {t.dtype}" for n, t in known.items() if t.dtype not in DTYPES]
    return [
        *_counted("unexpected", unexpected),
        *_counted("of another shape than config.json says", shapes),
        *_counted(f"of a dtype that cannot be loaded (only {', '.join(DTYPES)})", dtypes),
    ]


def _counted(what: str, items: list[str]) -> list[str]:
    """One line for all tensors with the same problem."""
    if not items:
        return []
    rest = f", and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return [f"{len(items)} tensor{'s' * (len(items) > 1)} {what}: {'; '.join(items[:_NAMED])}{rest}"]


def _unusable(folder: Path, problems: list[str]) -> UserError:
    lines = problems[:_SHOWN]
    if len(problems) > _SHOWN:
        lines.append(f"and {len(problems) - _SHOWN} more problems")
    return UserError("\n  - ".join([f"The checkpoint {folder} cannot be loaded:", *lines]))
