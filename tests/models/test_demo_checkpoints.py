"""The bundled trained checkpoints: logits and greedy tokens of transformers, at degrees 1, 2 and 4."""

from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from torch import Tensor
from torch.testing import assert_close

from tests import oracle
from tests.models.running import on_rank
from tests.ranks import run_on_ranks

FOLDERS = sorted((Path(__file__).parents[2] / "checkpoints").glob("*-tiny-python"))
TEXTS = ["import os\n", "def read_lines(path):\n    with open(path) as file:\n        for line in"]
GREEDY = 64


@cache
def expected(folder: Path) -> tuple[list[list[int]], Tensor, list[list[int]]]:
    """Prompts, the logits of the last one, and what greedy decoding writes after each."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in TEXTS]
    model = oracle.trained_model(folder)
    written = [oracle.greedy(model, prompt, GREEDY) for prompt in prompts]
    return prompts, oracle.logits(model, prompts[-1]), written


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_trained_model_writes_what_transformers_writes(folder: Path, degree: int) -> None:
    prompts, logits, written = expected(folder)
    for outputs in run_on_ranks(degree, on_rank, folder, prompts, GREEDY, 7):
        assert_close(outputs.at_once, logits, rtol=0, atol=1e-4)
        assert_close(outputs.in_chunks, logits, rtol=0, atol=1e-4)
        assert outputs.greedy == written
