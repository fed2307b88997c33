"""`ssm-dist score`: how likely the model finds the texts given as prompts."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from ssm_dist.commands import check_place, speaks
from ssm_dist.config import Config
from ssm_dist.errors import UserError
from ssm_dist.llm import LLM
from ssm_dist.prompts_file import read_prompts
from ssm_dist.requests import Prompt
from ssm_dist.sampling.params import SamplingParams


def run(config: Config) -> None:
    """Score the prompts; with [output] file, write token ids and log-probabilities as JSONL besides."""
    options = config.generation
    if not options.prompts and options.prompts_file is None:
        raise UserError("there is nothing to score: set generation.prompts or generation.prompts_file")
    check_place(config.output.file, "[output] file")
    texts: list[Prompt] = list(options.prompts)
    if options.prompts_file is not None:
        texts = [text for text, _ in read_prompts(options.prompts_file, SamplingParams())]
    llm = LLM.from_config(config)
    scores = llm.score(texts)
    if not speaks():
        return
    table = Table("text", "tokens scored", "log-probability", "perplexity")
    for index, score in enumerate(scores):
        shown = f"{score.perplexity:.4f}" if score.log_probs else "-"
        table.add_row(str(index), str(len(score.log_probs)), f"{sum(score.log_probs):.4f}", shown)
    everything = [p for score in scores for p in score.log_probs]
    if everything:
        overall = math.exp(-sum(everything) / len(everything))
        table.add_row("all", str(len(everything)), f"{sum(everything):.4f}", f"{overall:.4f}")
    Console().print(table)
    if config.output.file is not None:
        with config.output.file.open("w", encoding="utf-8") as file:
            for index, score in enumerate(scores):
                # JSON has no NaN, which is that of a single token
                perplexity = score.perplexity if score.log_probs else None
                record = {"index": index, **asdict(score), "perplexity": perplexity}
                file.write(json.dumps(record) + "\n")
