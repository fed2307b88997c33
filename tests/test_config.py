"""The configuration: layers, types, and what a mistake in it is answered with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from ssm_dist.config import Config, ModelConfig, Section
from ssm_dist.config_reading import load_config
from ssm_dist.errors import UserError
from ssm_dist.sampling.params import SamplingParams

ROOT = Path(__file__).parents[1]
KEYS = [
    "model.checkpoint model.preset model.dtype parallel.tensor kernels.backend reduction.codec",
    "reduction.group_size cache.max_sequences cache.max_tokens cache.state_dtype compile.mode",
    "prefill.chunk_tokens generation.prompts generation.prompts_file generation.max_new_tokens",
    "generation.temperature generation.top_k generation.top_p generation.min_p generation.seed",
    "generation.repetition_penalty generation.stop output.file",
]


@pytest.fixture
def job(tmp_path):
    """Writes a TOML file; returns its path."""

    def write(text: str) -> Path:
        path = tmp_path / "job.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def mistake(path: Path | None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, list(overrides))
    return str(caught.value)


def test_the_names_that_others_script_against_exist():
    known = {
        f"{name}.{key}"
        for name, field in Config.model_fields.items()
        for key in field.annotation.model_fields
    }
    assert set(" ".join(KEYS).split()) <= known


def test_every_section_and_key_explains_itself():
    for section, field in Config.model_fields.items():
        unexplained = [key for key, of in field.annotation.model_fields.items() if not of.description]
        assert field.description and not unexplained, (section, unexplained)


@pytest.mark.parametrize(
    ("degree", "asked", "interval", "gpus", "cpus"),
    [
        (1, None, 2048, 16384, 16384), (2, None, 2048, 32768, 16384), (3, None, 2048, 32768, 16384),
        (4, None, 2048, 65536, 16384), (4, 100, 2048, 100, 100), (2, None, 49152, 16384, 16384),
        (4, None, 131072, 65536, 16384),
    ],
)  # fmt: skip
def test_prefill_steps_grow_with_the_degree_on_gpus(degree, asked, interval, gpus, cpus):
    """Unless asked otherwise, and by no more than goes into the interval between kept states."""
    overrides = [f"--parallel.tensor={degree}", f"--cache.prefix_interval={interval}", "--model.preset=a"]
    config = load_config(None, overrides + [f"--prefill.chunk_tokens={asked}"] * (asked is not None))
    assert (config.chunk_tokens("cuda"), config.chunk_tokens("cpu")) == (gpus, cpus)


def test_command_line_wins_over_file_over_default(job):
    path = job('[model]\npreset = "a"\n[prefill]\nchunk_tokens = 7\n[cache]\nmax_sequences = 3')
    config = load_config(path, ["--prefill.chunk_tokens", "9"])
    assert (config.prefill.chunk_tokens, config.cache.max_sequences, config.cache.max_tokens) == (9, 3, 32768)


def test_a_flag_set_to_the_default_still_wins_over_the_file(job):
    path = job('[model]\npreset = "a"\n[parallel]\ntensor = 4')
    assert load_config(path, ["--parallel.tensor", "1"]).parallel.tensor == 1


@pytest.mark.parametrize(
    ("words", "read"),
    [
        (["--prefill.chunk-tokens", "5"], lambda config: config.prefill.chunk_tokens == 5),
        (["--prefill.chunk_tokens=5"], lambda config: config.prefill.chunk_tokens == 5),
        (["--generation.prompts", "a b", "c"], lambda config: config.generation.prompts == ("a b", "c")),
        (["--generation.stop", "\n\n"], lambda config: config.generation.stop == ("\n\n",)),
        (["--generation.ignore_eos", "true"], lambda config: config.generation.ignore_eos),
        (["--generation.temperature", "1"], lambda config: config.generation.temperature == 1.0),
        (["--output.file", "out.jsonl"], lambda config: config.output.file == Path("out.jsonl")),
        (["--reduction.group_size", "32"], lambda config: config.reduction.group_size == 32),
    ],
)
def test_every_kind_of_value_can_be_given_as_a_flag(words, read):
    assert read(load_config(None, ["--model.preset", "a", *words]))


def test_a_checkpoint_on_the_command_line_replaces_the_preset_of_the_file(job):
    config = load_config(job('[model]\npreset = "a"'), ["--model.checkpoint", "folder"])
    assert (config.model.checkpoint, config.model.preset) == ("folder", None)


def test_prompts_on_the_command_line_replace_the_prompts_file_of_the_file(job):
    path = job('[model]\npreset = "a"\n[generation]\nprompts_file = "p.jsonl"\nseed = 3')
    generation = load_config(path, ["--generation.prompts", "x"]).generation
    assert (generation.prompts, generation.prompts_file, generation.seed) == (("x",), None, 3)


def test_a_benchmark_that_names_models_needs_no_other(job):
    words = ["--benchmark.models", "b", "c", "--benchmark.cases", "1x8+4"]
    assert load_config(None, words).model.preset == "b"
    path = job('[model]\ndtype = "float32"\n[benchmark]\nmodels = ["c"]\ncases = ["1x8+4"]')
    assert load_config(path, []).model == ModelConfig(preset="c", dtype="float32")
    assert load_config(job('[model]\ncheckpoint = "a"'), words).model == ModelConfig(checkpoint="a")
    for no_benchmark in (words[:3], ["--benchmark.cases", "1x8+4"]):
        with pytest.raises(UserError, match="no model is named"):
            load_config(None, no_benchmark)


def test_a_generation_section_is_sampling_params():
    generation = load_config(None, ["--model.preset", "a", "--generation.top_k", "4"]).generation
    assert isinstance(generation, SamplingParams) and generation.top_k == 4


def test_a_config_does_not_change():
    config = load_config(None, ["--model.preset", "a"])
    with pytest.raises(ValidationError):
        config.parallel.tensor = 2


@pytest.mark.parametrize("both", ["", 'checkpoint = "a"\npreset = "b"'])
def test_exactly_one_of_checkpoint_and_preset_is_required(job, both):
    path = job(f"[model]\n{both}")
    message = mistake(path)
    assert "model.checkpoint" in message and "model.preset" in message and str(path) in message


def test_a_model_is_required_without_any_file():
    assert "model.checkpoint" in mistake(None)
    with pytest.raises(ValidationError, match=r"model\.preset"):
        ModelConfig()


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("[parallel]\ntensr = 2", "key parallel.tensr", "parallel.tensor"),
        ("[paralel]\ntensor = 2", "section [paralel]", "[parallel]"),
        ("[generation]\nchunk_tokens = 2", "key generation.chunk_tokens", "prefill.chunk_tokens"),
        ("temperature = 2", "key temperature", "generation.temperature"),
    ],
)
def test_an_unknown_key_is_named_with_its_file_and_the_nearest_valid_one(job, text, unknown, nearest):
    path = job(f'{text}\n[model]\npreset = "a"')
    assert mistake(path) == f"{path}: unknown {unknown}; the nearest valid one is {nearest}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[parallel]\ntensor = "2"', "parallel.tensor = '2': it must be a valid integer"),
        ("[parallel]\ntensor = 2.5", "parallel.tensor = 2.5: it must be a valid integer"),
        ("[parallel]\ntensor = true", "parallel.tensor = True: it must be a valid integer"),
        ("[parallel]\ntensor = 0", "parallel.tensor = 0: it must be greater than or equal to 1"),
        ('[kernels]\nbackend = "cuda"', "'auto', 'reference', 'triton' or 'mamba_ssm'"),
        ("[reduction]\ngroup_size = 64", "reduction.group_size = 64: it must be 32 or 128"),
        ('[generation]\nprompts = "x"', "generation.prompts = 'x': it must be a list"),
        ('[generation]\nprompts = ["x", 3]', "generation.prompts = 3: it must be a valid string"),
        (
            "[generation]\ntemperature = -1",
            "generation.temperature = -1: it must be greater",
        ),
        ("[output]\nfile = 3", "output.file = 3: it must be a path"),
        ("parallel = 3", "parallel = 3 is not a section; write [parallel]"),
    ],
)
def test_a_wrong_value_is_answered_with_its_key_itself_and_what_is_accepted(job, text, message):
    path = job(f'{text}\n[model]\npreset = "a"')
    answer = mistake(path)
    assert answer.startswith(f"{path}: ") and message in answer and "\n" not in answer


def test_several_mistakes_come_one_a_line(job):
    path = job('[model]\npreset = 1\n[parallel]\ntensor = "x"\n[cach]\n')
    lines = mistake(path).splitlines()
    assert len(lines) == 3 and all(line.startswith(str(path)) for line in lines)


def test_a_wrong_value_on_the_command_line_is_not_blamed_on_the_file(job):
    path = job('[model]\npreset = "a"')
    assert mistake(path, "--parallel.tensor", "0").startswith("command line: parallel.tensor = 0")
    assert "--parallel.tensor" in mistake(path, "--parallel.tensor", "two")


def test_an_unknown_flag_is_answered_with_the_nearest():
    message = mistake(None, "--model.preset", "a", "--parallel.tensr", "2")
    assert "--parallel.tensr" in message and "--parallel.tensor" in message


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_choices_are_told_in_their_order_in_every_process(seed):
    program = "from ssm_dist.cli import main; main(['--reduction.group_size', '7'])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "('None', '32', '128')" in done.stderr


def test_an_explanation_breaks_no_path(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    path = "/".join(["a_folder_of_some_length"] * 20)
    assert path in mistake(None, "--model.preset", "a", "--output.fil", path)
    assert "COLUMNS" not in os.environ


def test_a_missing_file_is_named(tmp_path):
    assert "missing.toml: No such file" in mistake(tmp_path / "missing.toml")


def test_malformed_toml_is_answered_with_its_position(job):
    assert "line 2" in mistake(job("[model]\npreset = \n"))


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "job.toml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in mistake(tmp_path / "job.toml")


def test_a_command_can_add_a_section_of_its_own(job):
    class Extra(Section):
        rounds: int = Field(1, strict=True, ge=1)
        """How often."""

    class ExtraConfig(Config):
        extra: Extra = Extra()
        """Options of one command."""

    path = job('[model]\npreset = "a"\n[extra]\nrounds = 2')
    assert load_config(path, [], ExtraConfig).extra.rounds == 2
    assert load_config(path, ["--extra.rounds", "3"], ExtraConfig).extra.rounds == 3


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.toml")), ids=lambda path: path.stem)
def test_a_bundled_configuration_is_valid_and_its_files_exist(path):
    config = load_config(path, [])
    named = [config.model.checkpoint, config.generation.prompts_file]
    assert all((ROOT / name).exists() for name in named if name)
    assert config.generation.prompts or config.generation.prompts_file or config.benchmark.wanted
