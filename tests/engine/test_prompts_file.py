"""Files of prompts: what is a line, and what a line that cannot be read is answered with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssm_dist.errors import UserError
from ssm_dist.prompts_file import parse_line, read_lines, read_prompts
from ssm_dist.requests import prepare
from ssm_dist.sampling.params import SamplingParams

BASE = SamplingParams(seed=5)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prompts.jsonl"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"], ids=ascii)
def test_separators_that_json_allows_in_a_string_end_no_line(file: Path, separator: str) -> None:
    text = f"a{separator}b"
    file.write_text(json.dumps({"prompt": text}, ensure_ascii=False) + '\n{"prompt": "c"}\n', "utf-8")
    assert read_prompts(file, BASE) == [(text, BASE), ("c", BASE)]


@pytest.mark.parametrize("separator", ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"], ids=ascii)
def test_a_control_character_in_a_string_is_the_mistake_of_one_line(file: Path, separator: str) -> None:
    file.write_bytes(f'{{"prompt": "a{separator}b"}}\n{{"prompt": "c"}}\n'.encode())
    first, second = read_lines(file)
    with pytest.raises(UserError, match="not valid JSON: Invalid control character at: column 14"):
        parse_line(first, SamplingParams())
    assert parse_line(second, SamplingParams())[0] == "c"


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(file: Path) -> None:
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n')
    assert read_prompts(file, BASE) == [("a", BASE), ("b", BASE)]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt_token_ids": [' + 5001 * "1" + "]}", "too many digits"),
        (100_000 * "[", "nested too deeply"),
        ("{]", "not valid JSON: .*: column 2"),
        ('{"prompt": "x", "temprature": 1}', "temprature: .* the nearest valid one is temperature"),
    ],
    ids=["digits", "nested", "malformed", "unknown key"],
)
def test_what_cannot_be_read_is_a_users_mistake(line: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_line(line, SamplingParams())


def test_where_all_lines_are_needed_the_wrong_one_is_named_by_file_and_number(file: Path) -> None:
    file.write_text('{"prompt": "a"}\n\n  \nnot json\n')
    with pytest.raises(UserError) as caught:
        read_prompts(file, BASE)
    assert str(caught.value).startswith(f"{file}, line 4: not valid JSON: ")


def test_a_text_without_a_tokenizer_is_answered_with_where_token_ids_go() -> None:
    with pytest.raises(UserError, match=r"generation\.prompts_file: \{\"prompt_token_ids\": \[\.\.\.\]\}"):
        prepare("a", SamplingParams(), 0, None, 50)
