"""Text: the tokenizer of a folder, chat templates against transformers', and the text of a stream of ids."""

import functools
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ssm_dist.errors import UserError
from ssm_dist.text import TextStream, Tokenizer, read_eos_ids

CORPUS = [
    "def hello(name):\n    return 'hello ' + name\n",
    "Wörter mit Umlauten, naïve café, “quotes” and a dash — and 日本語 or 日記.",
    "  leading spaces, emoji 🙂🙃👩‍🚀 and    wide   gaps\tand tabs\n\n\n",
] * 4
PROPERTY = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TEXTS = st.text(st.one_of(st.sampled_from("ab de\n\t'(日é🙂👩‍"), st.characters(codec="utf-8")), max_size=40)


def byte_level() -> tokenizers.Tokenizer:
    """As Mamba's and Falcon-Mamba's: BPE over bytes, so that tokens may end within a character."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<tool>", "日記é"])
    return tokenizer


def metaspace(byte_fallback: bool) -> tokenizers.Tokenizer:
    """As Zamba's: spaces are ▁, and a character outside the vocabulary is written as bytes <0x..>."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    trainer = trainers.UnigramTrainer(
        vocab_size=110, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS[::3], trainer)
    if not byte_fallback:
        tokenizer.decoder = decoders.Metaspace()
        return tokenizer
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    vocabulary = [(piece, score) for piece, score in vocabulary if piece != "\n"]
    vocabulary += [(f"<0x{value:02X}>", -20.0) for value in range(256)]
    tokenizer.model = models.Unigram(vocabulary, unk_id=0, byte_fallback=True)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    vocabulary = {word: n for n, word in enumerate(["[UNK]", "a", "##b", "word", ".", "'", "##s", ",", "é"])}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def no_decoder() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(models.WordLevel({"a": 0, "bc": 1, "é": 2}, unk_token="a"))


KINDS = {
    "byte-level": byte_level,
    "byte-fallback": lambda: metaspace(byte_fallback=True),
    "metaspace": lambda: metaspace(byte_fallback=False),
    "word-piece": word_piece,
    "no-decoder": no_decoder,
}


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    return Tokenizer(KINDS[kind]())


@functools.cache
def ids_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Random ids, a few of them unknown, with runs of byte tokens more often than chance has them."""
    raw = KINDS[kind]()
    anything = st.integers(0, raw.get_vocab_size() + 3)
    byte_ids = sorted(tokenizer_of(kind).byte_ids)
    return st.lists(st.one_of(anything, st.sampled_from(byte_ids)) if byte_ids else anything, max_size=24)


def streamed(stream: TextStream, ids: list[int]) -> str:
    """The pieces of all ids, as far as the stream goes."""
    pieces = []
    for token_id in ids:
        pieces.append(stream.push(token_id))
        if stream.stopped is not None:
            break
    return "".join(pieces) + stream.finish()


# --- streaming ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_random_ids_add_up_to_the_decoded_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)

    @PROPERTY
    @given(ids_of(kind))
    def check(ids: list[int]) -> None:
        stream = TextStream(tokenizer)
        assert streamed(stream, ids) == tokenizer.decode(ids)
        assert stream.text == tokenizer.decode(ids)
        assert stream.finish() == ""

    check()


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "metaspace"])
def test_pieces_of_random_text_add_up_to_the_decoded_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)

    @PROPERTY
    @given(TEXTS)
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        decoded = streamed(TextStream(tokenizer), ids)
        assert decoded == tokenizer.decode(ids)
        if kind != "metaspace":  # nothing is unknown to the others
            assert decoded == text

    check()


@functools.cache
def one_token_a_byte() -> tuple[Tokenizer, dict[int, int]]:
    """A byte-level tokenizer without merges, and the id of each byte that occurs in UTF-8."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw = tokenizers.Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    text = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 0x100), *range(0xE000, 0x110000, 0x1000)]))
    return Tokenizer(raw), dict(zip(text.encode(), raw.encode(text).ids, strict=True))


CHARACTERS_CUT_ANYWHERE = st.lists(
    st.one_of(
        st.sampled_from([0x41, 0x80, 0xA5, 0xBF, 0xC3, 0xE0, 0xE6, 0xED, 0xEF, 0xF0, 0xF4]).map(
            lambda b: [b]
        ),
        st.sampled_from("日🙂é\N{REPLACEMENT CHARACTER}").map(lambda c: list(c.encode())),
        st.sampled_from("日🙂").map(lambda c: list(c.encode()[:-1])),
    ),
    max_size=15,
).map(lambda parts: [byte for part in parts for byte in part])


@PROPERTY
@given(CHARACTERS_CUT_ANYWHERE)
def test_any_bytes_stream_as_they_decode(data: list[int]) -> None:
    """Characters cut short, lone continuations, overlong forms, the replacement character itself."""
    tokenizer, id_of = one_token_a_byte()
    stream = TextStream(tokenizer)
    assert streamed(stream, [id_of[byte] for byte in data]) == bytes(data).decode("utf-8", errors="replace")


def test_a_character_is_shown_once_it_is_whole() -> None:
    tokenizer, id_of = one_token_a_byte()
    stream = TextStream(tokenizer)
    assert [stream.push(id_of[byte]) for byte in "a🙂b".encode()] == ["a", "", "", "", "🙂", "b"]


def test_a_run_of_byte_tokens_is_shown_at_its_end() -> None:
    tokenizer = tokenizer_of("byte-fallback")
    ids = tokenizer.encode("hello 🙂 x", add_special_tokens=False)
    stream = TextStream(tokenizer)
    assert [stream.push(token_id) for token_id in ids] == ["", "hello", " ", "", "", "", "", "🙂 ", ""]
    assert stream.finish() == "x"


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "word-piece"])
def test_without_stop_strings_whole_tokens_are_shown_at_once(kind: str) -> None:
    tokenizer, stream = tokenizer_of(kind), TextStream(tokenizer_of(kind))
    ids = tokenizer.encode("hello wide name", add_special_tokens=False)
    for count, token_id in enumerate(ids, start=1):
        stream.push(token_id)
        assert stream.text == tokenizer.decode(ids[:count])


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_cost_does_not_grow_with_the_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids decoded in all, for ordinary text and for one broken character after another."""
    raw = KINDS[kind]()
    ordinary = raw.encode(" ".join(CORPUS) * 3).ids
    broken = [token_id for token_id in range(raw.get_vocab_size()) if "\ufffd" in raw.decode([token_id])] * 20
    for ids in (ordinary, broken):
        tokenizer, decoded = Tokenizer(raw), 0
        decode = tokenizer.decode

        def counting(ids: list[int], decode=decode) -> str:  # type: ignore[no-untyped-def]
            nonlocal decoded
            decoded += len(ids)
            return decode(ids)

        monkeypatch.setattr(tokenizer, "decode", counting)
        streamed(TextStream(tokenizer), ids)
        assert len(ids) > 500 and decoded < 12 * len(ids)


# --- stop strings -------------------------------------------------------------------------------------------


def cut(text: str, stop: list[str]) -> tuple[str, str | None]:
    """The definition: read on until the text ends in a stop string; the longest of them counts."""
    for end in range(len(text) + 1):
        met = [string for string in stop if text[:end].endswith(string)]
        if met:
            longest = max(met, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "metaspace"])
def test_text_is_cut_before_the_first_stop_string_completed(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    characters = st.sampled_from("ab 日🙂é\n")

    @PROPERTY
    @given(
        st.one_of(ids_of(kind), st.text(characters, max_size=25).map(tokenizer.encode)),
        st.lists(st.text(characters, min_size=1, max_size=4), min_size=1, max_size=3),
    )
    def check(ids: list[int], stop: list[str]) -> None:
        ends = [n for n in range(1, len(ids) + 1) if cut(tokenizer.decode(ids[:n]), stop)[1] is not None]
        expected, met = cut(tokenizer.decode(ids[: ends[0]] if ends else ids), stop)
        stream = TextStream(tokenizer, stop)
        for count, token_id in enumerate(ids, start=1):
            stream.push(token_id)
            assert (stream.stopped is not None) == bool(ends and count >= ends[0])
        stream.finish()
        assert (stream.text, stream.stopped) == (expected, met)

    check()


def test_a_stop_string_may_span_tokens_and_partial_matches_are_released() -> None:
    tokenizer, id_of = one_token_a_byte()
    stream = TextStream(tokenizer, stop=["END", "###"])
    pieces = [stream.push(id_of[byte]) for byte in b"a##bENEND!"]
    assert pieces == ["a", "", "", "##b", "", "", "EN", "", "", ""]
    assert (stream.stopped, stream.text, stream.finish()) == ("END", "a##bEN", "")


def test_a_partial_match_at_the_end_is_text() -> None:
    tokenizer, id_of = one_token_a_byte()
    stream = TextStream(tokenizer, stop=["END"])
    assert [stream.push(id_of[byte]) for byte in b"xEN"] == ["x", "", ""]
    assert (stream.finish(), stream.stopped) == ("EN", None)


def test_a_stop_string_of_byte_tokens_ends_the_text_at_once() -> None:
    """A new line is a byte token with such tokenizers: to wait for the next token would be one too many."""
    tokenizer = tokenizer_of("byte-fallback")
    stream = TextStream(tokenizer, stop=["\n"])
    for token_id in tokenizer.encode("hello\n", add_special_tokens=False):
        stream.push(token_id)
    assert (stream.text, stream.stopped) == ("hello", "\n")


# --- the folder ---------------------------------------------------------------------------------------------

CHAT_ML = (
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}\n"
)
LLAMA = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}
        {% generation %} {{ message['content'] + eos_token }} {% endgeneration %}
    {%- endif %}
{%- endfor %}
"""
TOOLS = """\
{% set state = namespace(count=0) %}
{% for message in messages %}
  {% if message.role == 'stop' %}{% break %}{% endif %}
  {% set state.count = state.count + 1 %}
  {{ message | tojson }}
{% endfor %}
{{ state.count }} messages{{ pad_token }}, {{ {'b': '<é>', 'a': [1]} | tojson(indent=2) }}
{{ strftime_now('%Y')[:2] }}
"""
TALK = [
    {"role": "user", "content": "Write 'hello' <b>in bold</b>."},
    {"role": "assistant", "content": " héllo "},
    {"role": "user", "content": "日本語 🙂"},
]


def folder_of(path: Path, raw: tokenizers.Tokenizer, chat_template: object = None) -> Path:
    """Save a tokenizer as transformers does."""
    PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|im_start|>",
        eos_token="<|endoftext|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(path)
    return path


def loaded(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


def rewrite(path: Path, **changes: object) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | changes))


@pytest.mark.parametrize("messages", [TALK, TALK[:1], [*TALK, {"role": "stop"}]], ids=["talk", "one", "stop"])
@pytest.mark.parametrize("template", [CHAT_ML, LLAMA, TOOLS], ids=["chatml", "llama", "tools"])
def test_chat_templates_render_as_in_transformers(
    tmp_path: Path, template: str, messages: list[dict[str, str]]
) -> None:
    folder = folder_of(tmp_path, byte_level(), template)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    try:
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:
        with pytest.raises(UserError, match="cannot render"):
            loaded(folder).apply_chat_template(messages)
    else:
        assert loaded(folder).apply_chat_template(messages) == expected


def test_a_template_may_be_a_string_or_named_in_the_tokenizer_config(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, byte_level())
    config = folder / "tokenizer_config.json"
    with pytest.raises(UserError, match=r"no .* chat template"):
        loaded(folder).apply_chat_template(TALK)
    rewrite(config, chat_template="{{ messages | length }}")
    assert loaded(folder).apply_chat_template(TALK) == "3"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ eos_token }}"}]
    rewrite(config, chat_template=named)
    assert loaded(folder).apply_chat_template(TALK) == "<|endoftext|>"
    rewrite(config, chat_template=named[:1])
    with pytest.raises(UserError, match=r"no .* chat template"):
        loaded(folder).apply_chat_template(TALK)
    rewrite(config, chat_template=7)
    with pytest.raises(UserError, match="chat_template"):
        loaded(folder)
    (folder / "chat_template.jinja").write_text("file")
    assert loaded(folder).apply_chat_template(TALK) == "file"


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% if %}", "{{ 'a' + 1 }}"],
    ids=["escape", "mutation", "syntax", "type"],
)
def test_a_bad_template_is_the_users_error(template: str) -> None:
    with pytest.raises(UserError, match="cannot render"):
        Tokenizer(no_decoder(), chat_template=template).apply_chat_template(TALK)


@pytest.mark.parametrize("messages", [[], ["hello"], [{"role": b"user"}]], ids=["none", "string", "bytes"])
def test_messages_must_be_json_objects(messages: list[dict[str, str]]) -> None:
    with pytest.raises(UserError, match="messages"):
        Tokenizer(no_decoder(), chat_template=CHAT_ML).apply_chat_template(messages)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_encoding_and_decoding_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    raw = KINDS[kind]()
    raw.enable_truncation(4)  # as saved by some training scripts; a prompt must not be cut
    raw.enable_padding(length=64)
    folder = folder_of(tmp_path, raw)
    ours, theirs = loaded(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in [*CORPUS, "", "<|endoftext|>hello <|im_end|>", "<s>a</s>"]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_folder_without_tokenizer_has_none(tmp_path: Path) -> None:
    assert Tokenizer.from_folder(tmp_path) is None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{broken", b"[1]", b"\xff\xfe"], ids=["syntax", "list", "bytes"])
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    folder = folder_of(tmp_path, byte_level())
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        Tokenizer.from_folder(folder)


def test_a_prompt_that_is_no_text_is_the_users_error() -> None:
    with pytest.raises(UserError, match="Unicode"):
        tokenizer_of("byte-level").encode("half of a pair: \ud83d")


def test_eos_ids_come_from_the_generation_config_and_the_tokenizer(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, byte_level())
    end_of_text = byte_level().token_to_id("<|endoftext|>")
    assert loaded(folder).eos_ids == {end_of_text}
    rewrite(folder / "config.json", eos_token_id=77)
    assert loaded(folder).eos_ids == {end_of_text}
    rewrite(folder / "generation_config.json", eos_token_id=[2, 5])
    assert loaded(folder).eos_ids == {end_of_text, 2, 5}
    assert read_eos_ids(folder) == {2, 5}
    rewrite(folder / "generation_config.json", eos_token_id="2")
    with pytest.raises(UserError, match="eos_token_id"):
        loaded(folder)
    (folder / "generation_config.json").unlink()
    assert read_eos_ids(folder) == {77}
    rewrite(folder / "tokenizer_config.json", eos_token=None)
    assert loaded(folder).eos_ids == {77}


def test_special_tokens_may_be_objects_or_in_the_special_tokens_map(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, byte_level(), "{{ bos_token }}{{ eos_token }}")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": {"content": "<b>"}}))
    rewrite(folder / "special_tokens_map.json", eos_token={"content": "<|im_end|>", "special": True})
    tokenizer = loaded(folder)
    assert tokenizer.apply_chat_template(TALK) == "<b><|im_end|>"
    assert tokenizer.eos_ids == {byte_level().token_to_id("<|im_end|>")}
