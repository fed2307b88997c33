"""`ssm-dist calibrate`: measure the reductions on this host, and write the table that `auto` then goes by."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ssm_dist.build import device_type, open_source, reductions_of
from ssm_dist.calibration import Timing, calibrate, table_of
from ssm_dist.commands import CalibrationJob, check_place
from ssm_dist.errors import UserError
from ssm_dist.kernels import backend
from ssm_dist.parallel import TensorParallel
from ssm_dist.parallel.collectives.tables import table_to_json
from ssm_dist.ranks import init_ranks


def run(config: CalibrationJob) -> None:
    """Time all algorithms at the model's width, and write [calibration] file. Every rank runs this."""
    if config.parallel.tensor < 2:
        raise UserError("a single rank reduces nothing: set parallel.tensor, and start as many ranks")
    options = config.calibration
    check_place(options.file, "[calibration] file")
    ranks = init_ranks(config.parallel.tensor, device_type())
    kernels = backend.select(config.kernels.backend, ranks.device)
    source = open_source(config, ranks.device.type, ranks)
    tp = TensorParallel.over_all_ranks(ranks.device.type, reductions_of(config.reduction))
    width, tokens = source.config.d_model, config.chunk_tokens(ranks.device.type)
    if ranks.device.type == "cuda" and kernels != "reference":
        tp.share_memory(tokens, width, source.dtype, ranks.device)
    timings = calibrate(tp, width, source.dtype, ranks.device, tokens, options.repeats)
    if tp.rank > 0:
        return
    options.file.write_text(table_to_json(table_of(timings, tp.degree)), encoding="utf-8")
    Console().print(_shown(timings))
    print(f"written to {options.file}; use it with --reduction.table {options.file}")


def _shown(timings: list[Timing]) -> Table:
    """Microseconds of every algorithm, a row for each size and codec."""
    names = list(dict.fromkeys(timing.algorithm for timing in timings))
    rows: dict[tuple[int, str], dict[str, float]] = {}
    for timing in timings:
        rows.setdefault((timing.message_bytes, timing.codec), {})[timing.algorithm] = timing.seconds
    table = Table("bytes", "codec", *names, title="Reductions, us", title_justify="left", box=SIMPLE)
    for (size, codec), seconds in rows.items():
        cells = [f"{1e6 * seconds[name]:.1f}" if name in seconds else "-" for name in names]
        table.add_row(str(size), codec, *cells)
    return table
