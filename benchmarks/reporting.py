"""What the benchmarks of states and streams share: a preset's model, and reports as JSON and as a table."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ssm_dist.build import LoadedModel, load_model
from ssm_dist.config import Config
from ssm_dist.config_reading import build_config
from ssm_dist.flags import read_flags
from ssm_dist.provenance import command, commit
from ssm_dist.ranks import close_ranks


def parser(about: str | None) -> argparse.ArgumentParser:
    """With the options that all have; other words are the program's own flags (--compile.mode none)."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="a folder for the report")
    made.add_argument("--preset", default="mamba-2.8b")
    return made


def configuration(preset: str, flags: Sequence[str], **sections: dict[str, Any]) -> Config:
    """A job of as many ranks as torchrun started; flags lie over `sections`."""
    base = {"model": {"preset": preset}, "parallel": {"tensor": int(os.environ.get("WORLD_SIZE", "1"))}}
    given = read_flags(Config, flags)
    layers = base | sections
    return build_config(None, {name: layers.get(name, {}) | given.get(name, {}) for name in layers | given})


class Report:
    """What was found so far, on disk after every part of it."""

    def __init__(self, out: Path, preset: str, config: Config) -> None:
        """Loads the model."""
        self.loaded: LoadedModel = load_model(config)
        self._speaks = self.loaded.tp is None or self.loaded.tp.rank == 0
        self._path = out / f"{preset}_tp{config.parallel.tensor}"
        gpu = torch.cuda.is_available()
        self._found: dict[str, Any] = {
            "commit": commit(),
            "command": command(f"benchmarks/{Path(sys.argv[0]).name}", sys.argv[1:]),
            "hardware": f"{config.parallel.tensor} x {torch.cuda.get_device_name()}" if gpu else "CPU",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "kernels": self.loaded.kernels,
            "config": config.model_dump(mode="json", include={"model", "cache", "prefill", "compile"}),
        }

    def add(self, name: str, rows: list[dict[str, Any]]) -> None:
        """A table, one dictionary of equal keys a row; it is printed, and the files are written anew."""
        self._found[name] = rows
        if not self._speaks:
            return
        print(f"{name}\n{_table(rows)}\n", flush=True)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{self._path}.json").write_text(json.dumps(self._found, indent=1) + "\n")
        Path(f"{self._path}.md").write_text(self._markdown())

    def close(self) -> None:
        """Print the JSON as the last line, and leave the other ranks."""
        if self._speaks:
            print(json.dumps(self._found), flush=True)
        gc.collect()
        close_ranks()

    def _markdown(self) -> str:
        about = [str(self._found[key]) for key in ("hardware", "kernels")]
        about += [f"torch {self._found['torch']}", f"Python {self._found['python']}"]
        about += [f"commit {self._found['commit']}"]
        tables = {name: rows for name, rows in self._found.items() if isinstance(rows, list)}
        parts = [", ".join(about), f"`{self._found['command']}`"]
        parts += [part for name, rows in tables.items() for part in (f"**{name}**", _table(rows))]
        return "\n\n".join(parts) + "\n"


def agreed(late: bool) -> bool:
    """What rank 0 says, on all ranks."""
    if not dist.is_initialized():
        return late
    said = [late]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def run(main: Callable[[], Report]) -> None:
    """Run a benchmark, and end this rank with it: threads of gloo may outlive the interpreter, and abort."""
    main().close()
    sys.stdout.flush()
    if "RANK" in os.environ:
        os._exit(0)


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    return "\n".join(lines)
