"""Reports that grow: what several calls of a benchmark measured, in one report.json and report.md.

Nothing here imports torch, which takes many seconds on some hosts.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ssm_dist.provenance import command, commit

Run = dict[str, Any]
IDENTITY = ("case", "degree", "hardware")
"""What a new run must share with an old one to take its place."""


def circumstances(packages: Sequence[str]) -> dict[str, Any]:
    """Hardware, versions, commit, and the call that makes a run, without the folder that it writes to."""
    call = command(f"python benchmarks/{Path(sys.argv[0]).name}", sys.argv[1:])
    return {"hardware": _hardware(), "versions": _versions(packages), "commit": commit(), "call": call}


def join(folder: Path, run: Run, columns: Mapping[str, str], introduction: str) -> None:
    """Add a run to the folder's report, in the place of an older one of the same case, degree and hardware.

    A run that failed takes no place of one that did not. columns: heading -> key of a run.
    """
    file = folder / "report.json"
    runs: list[Run] = json.loads(file.read_text())["runs"] if file.exists() else []
    same = [old for old in runs if all(old.get(key) == run.get(key) for key in IDENTITY)]
    if "error" not in run or all("error" in old for old in same):
        runs = [old for old in runs if old not in same] + [run]
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    (folder / "report.md").write_text(_markdown(runs, columns, introduction))


def _hardware() -> str:
    """The GPUs of this host, or its processor."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")
        if names[0].strip():
            return f"{len([name for name in names if name.strip()])} x {names[0].strip()}"
    return f"CPU, {platform.machine()}"


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _markdown(runs: Sequence[Run], columns: Mapping[str, str], introduction: str) -> str:
    """A table for each hardware with its versions, under the calls that filled it."""
    lines = [introduction]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
        groups.setdefault(f"{run['hardware']}; {versions}", []).append(run)
    for title, members in groups.items():
        lines += ["", f"## {title}", ""]
        calls = dict.fromkeys((run["call"], run["commit"]) for run in members)
        lines += [f"`{call}` at commit {made_of}  " for call, made_of in calls]
        lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        done = [run for run in members if "error" not in run]
        lines += ["| " + " | ".join(_cell(run, key) for key in columns.values()) + " |" for run in done]
        lines += [""] if len(done) < len(members) else []
        lines += [
            f"- {run['case']} at degree {run['degree']} failed: {run['error'].strip().splitlines()[-1]}"
            for run in members
            if "error" in run
        ]
    return "\n".join(lines) + "\n"


def _cell(run: Run, key: str) -> str:
    return str(run.get(key, "-")).replace("|", "\\|")
