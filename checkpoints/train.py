"""Train the bundled demo checkpoints: one small model of each architecture, on Python's standard library.

    python checkpoints/train.py --out checkpoints --minutes-per-model 2
    python checkpoints/train.py --report checkpoints
    python checkpoints/train.py --out FOLDER --models mamba --hidden-size 768 --layers 14 --batch 24 \
        --learning-rate 1.5e-3 --evaluations 5 --validation-tokens 40000 --sample-tokens 8

The second command writes the results into the table of README.md; the third trains a model of 54 M
parameters, for measurements on a larger one: it is not to be committed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from corpus import Corpus, build_corpus
from demo_models import (
    CONFIGS,
    MOST_BYTES,
    VOCAB_SIZE,
    build_model,
    folder_name,
    load_checked,
    modeling_of,
    samples_of,
    save,
    scans_a_forward,
)
from fast_scan import TORCH, Core, fast_mixers, verify
from training import Settings, Training, loss_of, validation_loss

RESERVED_SECONDS = 20.0
"""Of a model's time, for the last validation, saving, checking and the samples."""
TABLE_MARKS = ("<!-- results -->", "<!-- end of results -->")


@dataclasses.dataclass(frozen=True)
class Job:
    """One training, as it is handed to its process."""

    name: str
    """Architecture."""
    size: dict[str, int]
    """Fields of its configuration that are not the demo's."""
    scan: str
    """Implementation of the scan: "triton" or "torch"."""
    failed_scans: tuple[str, ...]
    """Those that were tried before."""
    device: str
    settings: Settings
    deadline: float
    """`time.time()` at which the process should be done; a fixed number of steps may take longer."""
    tokenizer: Path
    folder: Path
    sample_tokens: int


def scan_core(scan: str) -> Core:
    """The implementation of the scan by its name."""
    if scan == "torch":
        return TORCH
    from scan_triton import TRITON  # Triton is not installed everywhere

    return TRITON


def machine(device: torch.device) -> dict[str, object]:
    """Hardware and versions that the numbers come from."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"
    modules = {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)}
    return {"hardware": name, "versions": {"python": platform.python_version(), **modules}}


def train_model(job: Job, corpus: Corpus) -> None:
    """Train one model and write its folder."""
    device = torch.device(job.device)
    torch.backends.cudnn.allow_tf32 = False  # of transformers' own convolution, in the comparisons
    model = build_model(job.name, job.size, device, job.settings.seed)
    core = scan_core(job.scan)
    errors = verify(modeling_of(model), core, device, torch.float32)
    print(f"  {type(model).__name__}, scan {job.scan}, relative errors {errors}", flush=True)
    torch.set_float32_matmul_precision("high")
    train, validation = (torch.from_numpy(x).long().to(device) for x in (corpus.train, corpus.validation))
    training = Training(model, train, validation, job.settings, job.deadline - RESERVED_SECONDS)
    with fast_mixers(modeling_of(model), core) as calls:
        loss_of(model, train[None, : job.settings.length + 1])
        if calls["scan"] != scans_a_forward(model):
            raise RuntimeError("transformers did not call the scan that was put in its place")
        training.run()
        torch.set_float32_matmul_precision("highest")
        exact = validation_loss(model, validation, job.settings)
        model.to(torch.bfloat16).to(torch.float32)
        rounded = validation_loss(model, validation, job.settings)
    save(model, job.tokenizer, job.folder)
    loaded, difference = load_checked(model, job.folder, validation[None, :64])
    record = {
        "class": type(model).__name__,
        "parameters": sum(x.numel() for x in model.parameters()),
        **results(training, exact, rounded, corpus.bytes_per_token),
        **machine(device),
        "scan": job.scan,
        "failed_scans": job.failed_scans,
        "checks": {"fast_functions_relative_error": errors, "logits_after_loading": difference},
        "corpus": corpus.facts,
        "settings": dataclasses.asdict(job.settings),
        "curve": training.curve,
        "samples": samples_of(loaded, job.folder, job.sample_tokens),
    }
    (job.folder / "TRAINING.json").write_text(json.dumps(record, indent=1) + "\n")


def results(training: Training, exact: float, rounded: float, bytes_per_token: float) -> dict[str, object]:
    """What a training reached: losses in nats a token; perplexity a token; bits a byte of UTF-8."""
    settings = training.settings
    return {
        "trained_dtype": "float32, TF32 matrix products on CUDA",
        "stored_dtype": "bfloat16",
        "steps": training.done,
        "scheduled_steps": training.steps,
        "best_step": training.best_step,
        "tokens_seen": training.done * settings.batch * settings.length,
        "training_seconds": round(training.seconds, 1),
        "train_loss": next(row["train"] for row in training.curve if row["step"] == training.best_step),
        "validation_loss_before_rounding": round(exact, 4),
        "validation_loss": round(rounded, 4),
        "perplexity": round(math.exp(rounded), 3),
        "bits_per_byte": round(rounded / math.log(2) / bytes_per_token, 4),
    }


def attempt(job: Job, corpus: Corpus) -> bool:
    """Train in a process of its own, so that no failure, even of CUDA's context, reaches the other models."""
    print(f"{job.name}: {job.deadline - time.time():.0f} s on {job.device}", flush=True)
    process = multiprocessing.get_context("spawn").Process(target=train_model, args=(job, corpus))
    process.start()
    process.join()
    size = sum(path.stat().st_size for path in job.folder.glob("*"))
    small_enough = bool(job.size) or size <= MOST_BYTES
    if process.exitcode == 0 and not small_enough:
        print(f"{job.name}: {size} bytes, more than the {MOST_BYTES} allowed", flush=True)
    elif process.exitcode != 0:
        print(f"{job.name}: failed with scan {job.scan}, exit code {process.exitcode}", flush=True)
    return process.exitcode == 0 and small_enough


def train_all(options: argparse.Namespace, corpus: Corpus, tokenizer: Path) -> list[str]:
    """Train one model after another; where Triton fails, again in plain torch. Returns those that failed."""
    seconds = 60 * options.minutes_per_model
    scans = [options.scan] if options.scan == "torch" else [options.scan, "torch"]
    names = ["batch", "length", "steps", "learning_rate", "weight_decay", "validation_tokens", "seed"]
    settings = Settings(**{name: getattr(options, name) for name in [*names, "evaluations"]})
    given = {"hidden_size": options.hidden_size, "num_hidden_layers": options.layers}
    size = {name: value for name, value in given.items() if value is not None}
    failed = []
    for name in options.models:
        started, folder = time.time(), options.out / folder_name(name, size)
        for i, scan in enumerate(scans):
            deadline = max(started + seconds, time.time() + seconds / 2)
            job = Job(
                name, size, scan, tuple(scans[:i]), options.device, settings, deadline, tokenizer, folder,
                options.sample_tokens,
            )  # fmt: skip
            if attempt(job, corpus):
                break
        else:
            failed.append(name)
        print(f"{name}: {time.time() - started:.0f} s in all", flush=True)
    return failed


def table(folder: Path) -> str:
    """Markdown table of the TRAINING.json files below `folder`."""
    head = "checkpoint|kept of steps|tokens until then|seconds in all|train loss|validation loss|perplexity"
    rows = [f"{head}|bits a byte".split("|"), ["---"] * 8]
    for path in sorted(folder.glob("*/TRAINING.json")):
        run: dict[str, Any] = json.loads(path.read_text())
        names = ("training_seconds", "train_loss", "validation_loss", "perplexity", "bits_per_byte")
        tokens = run["best_step"] * run["settings"]["batch"] * run["settings"]["length"]
        steps = f"{run['best_step']:,} of {run['steps']:,}"
        rows.append([path.parent.name, steps, f"{tokens:,}", *(str(run[name]) for name in names)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def report(folder: Path) -> None:
    """Write the table between the marks of README.md in `folder`."""
    readme = folder / "README.md"
    before, _, rest = readme.read_text().partition(TABLE_MARKS[0])
    _, _, after = rest.partition(TABLE_MARKS[1])
    readme.write_text(f"{before}{TABLE_MARKS[0]}\n{table(folder)}\n{TABLE_MARKS[1]}{after}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder of the checkpoint folders"
    )
    parser.add_argument("--models", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument(
        "--minutes-per-model", type=float, default=2.0, help="all of it, start and saving included"
    )
    parser.add_argument("--steps", type=int, help="train so many steps, whatever time they take")
    parser.add_argument("--hidden-size", type=int, help="of a model larger than the demo's")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, default=64, help="windows a step")
    parser.add_argument("--length", type=int, default=512, help="tokens a window")
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--weight-decay", type=float, default=Settings.weight_decay)
    parser.add_argument("--validation-tokens", type=int, help="for a quick trial: so many tokens, not all")
    parser.add_argument("--evaluations", type=int, default=Settings.evaluations, help="on the way")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--sample-tokens", type=int, default=120, help="length of the sample continuations")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--scan", choices=["triton", "torch"], default="triton" if cuda else "torch")
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="only write the table of FOLDER/README.md"
    )
    return parser.parse_args()


def main() -> int:
    """Train the models that were asked for, or report. Exit code 1 where one failed."""
    options = parse_arguments()
    if options.report:
        report(options.report)
        return 0
    with tempfile.TemporaryDirectory() as tokenizer:
        started = time.monotonic()
        corpus = build_corpus(VOCAB_SIZE, Path(tokenizer))
        print(f"{json.dumps(corpus.facts)} in {time.monotonic() - started:.0f} s", flush=True)
        options.out.mkdir(parents=True, exist_ok=True)
        failed = train_all(options, corpus, Path(tokenizer))
    print(table(options.out), flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
