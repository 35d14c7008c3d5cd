"""Calibration tokens: which text is read, how it is cut, and that equal arguments give equal tokens."""

import hashlib
import json
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import llmmpq
from llmmpq.errors import CalibrationError
from llmmpq.model import text as texts
from llmmpq.model import tokens
from llmmpq.model.text import parse_hub_source, read_text, resolve_text
from llmmpq.model.tokens import advise_num_tokens, evaluation_windows, load_tokens

ASSETS = Path(llmmpq.__file__).parent / "assets"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "demo")


class Words:
    """One token per word; a word that is a number is its own id."""

    def __init__(self, *, eos=None, bos=None, adds_bos=False):
        self.eos_token_id, self.bos_token_id, self.adds_bos = eos, bos, adds_bos
        self.seen = []

    def __call__(self, text, *, verbose):
        assert not verbose
        self.seen.append(text)
        ids = [int(word) if word.isdigit() else 7 for word in text.split()]
        return {"input_ids": [self.bos_token_id, *ids] if self.adds_bos else ids}


def numbers(first, last):
    return " ".join(str(number) for number in range(first, last))


def load(tokenizer, source, **changes):
    asked = {"num_tokens": 64, "window": 32, "seed": 0} | changes
    return load_tokens(tokenizer, source=str(source), **asked)


def documents(source):
    return [document for part in resolve_text(str(source)).parts for document in part]


def test_builtin_text_gives_a_calibration_run(tokenizer):
    loaded = load(tokenizer, "builtin", num_tokens=8192, window=256, vocab_size=4096, max_window=1024)
    assert loaded.ids.shape == (32, 256)
    assert loaded.ids.dtype == torch.long
    assert loaded.num_tokens == 8192
    assert (loaded.source, loaded.notes) == ("builtin", ())
    assert len(documents("builtin")) > 5
    assert not any("---" in document.splitlines() for document in documents("builtin"))


def test_equal_arguments_give_equal_tokens(tokenizer):
    once, again = load(tokenizer, "builtin"), load(tokenizer, "builtin")
    assert torch.equal(once.ids, again.ids)
    assert once.digest == again.digest
    other = load(tokenizer, "builtin", seed=1)
    assert other.ids.shape == once.ids.shape
    assert other.digest != once.digest


def test_digest_covers_shape_and_ids(tmp_path):
    (tmp_path / "a.txt").write_text(numbers(0, 64))
    loaded = load(Words(), tmp_path)
    raw = b"int64 (2, 32) " + b"".join(int(i).to_bytes(8, "little") for i in loaded.ids.flatten())
    assert loaded.digest == hashlib.sha256(raw).hexdigest()
    assert load(Words(), tmp_path, window=64).digest != loaded.digest


def test_windows_are_a_shuffled_sample_without_repetition(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(numbers(0, 4000))
    loaded = load(Words(), path, num_tokens=320, window=32)
    starts = loaded.ids[:, 0].tolist()
    assert all(torch.equal(row, torch.arange(start, start + 32)) for row, start in zip(loaded.ids, starts, strict=True))
    assert all(start % 32 == 0 for start in starts)
    assert len(set(starts)) == 10
    assert starts != sorted(starts)
    assert max(starts) >= 320  # from the pool, not its first windows
    assert max(starts) < tokens.POOL_FACTOR * 320


def test_reading_stops_when_the_pool_is_full(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name} " + numbers(0, 299))
    words = Words()
    loaded = load(words, tmp_path, num_tokens=100, window=50)
    assert [text[0] for text in words.seen] == ["a", "b"]
    assert loaded.notes == (f"Calibration read the first 2 of 3 files of {tmp_path}: enough tokens.",)


def test_a_long_document_is_not_held_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MAX_DOCUMENT_CHARS", 1000)
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{number:08} \n" for number in range(10_000)))
    words = Words()
    loaded = load(words, path)
    assert max(map(len, words.seen)) <= 1010
    assert len(words.seen) < 5
    assert loaded.notes == ()


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ({"eos": 90, "bos": 91}, [1, 2, 90, 3, 90, 4]),
        ({"bos": 91}, [1, 2, 91, 3, 91, 4]),
        ({}, [1, 2, 3, 4]),
        ({"eos": 90, "bos": 91, "adds_bos": True}, [91, 1, 2, 91, 3, 91, 4]),
        ({"eos": 2}, [1, 2, 3, 2, 4]),
        ({"eos": 3}, [1, 2, 3, 4]),
    ],
)
def test_documents_are_separated_by_one_mark(tmp_path, marks, expected):
    path = tmp_path / "a.txt"
    path.write_text("---\n1 2\n---\n\n---\n3\n --- \n4\n")
    loaded = load(Words(**marks), path, window=len(expected))
    assert loaded.ids.tolist() == [expected]


def test_separator_of_the_demo_tokenizer(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("One small thing.\n---\nAnd then another.\n")
    one, other = (tokenizer(text)["input_ids"] for text in ("One small thing.", "And then another."))
    expected = [*one, tokenizer.eos_token_id, *other]
    assert load(tokenizer, path, window=len(expected)).ids.tolist() == [expected]


def test_folder_is_read_in_order_without_hidden_files_and_links(tmp_path):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "c.txt").write_text("c")
    (folder / "a.md").write_text("a1\n---\na2")
    (folder / "b" / "b.jsonl").write_text('{"text": "b1"}\n\n{"body": "b2", "id": 3}\n')
    (folder / "d.py").write_text("code")
    (folder / ".e.txt").write_text("hidden")
    (folder / ".hidden" / "f.txt").write_text("hidden")
    (tmp_path / "outside.txt").write_text("outside")
    (folder / "g.txt").symlink_to(tmp_path / "outside.txt")
    (folder / "h").symlink_to(tmp_path, target_is_directory=True)
    assert documents(folder) == ["a1", "a2", "b1", "b2", "c"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match=r"no file ending in \.txt, \.md, \.jsonl"):
        resolve_text(str(tmp_path / "empty"))


def test_a_named_file_is_text_whatever_its_ending(tmp_path):
    path = tmp_path / "wiki.test.raw"
    path.write_bytes("\ufeffa\r\nb\n".encode())
    assert documents(path) == ["a\nb"]
    assert read_text(path) == "a\nb\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"a": "x", "b": "y"}', "its keys are: a, b"),
        ('{"a": 1}', "its keys are: a"),
        ("{}", "its keys are: none"),
        ('{"text": 3}', "'text' holds int"),
        ('"text"', "JSON str"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, line, expected):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(CalibrationError, match=expected) as caught:
        documents(path)
    assert f"{path} line 2" in str(caught.value)


def test_unreadable_sources_are_named(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 au lait")
    for read in (documents, read_text):
        with pytest.raises(CalibrationError, match=r"latin\.txt is not UTF-8 text: byte 0xe9"):
            read(path)
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_text(tmp_path)
    for missing in ("", "no/such/file"):
        with pytest.raises(CalibrationError, match="does not exist; allowed: auto, builtin"):
            resolve_text(missing)


def test_window_is_lowered_to_what_the_model_reads(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(numbers(0, 1000))
    loaded = load(Words(), path, num_tokens=200, window=100, max_window=40)
    assert loaded.ids.shape == (5, 40)
    assert loaded.notes == ("The calibration window was lowered from 100 to 40, the most the model reads.",)


def test_num_tokens_is_rounded_down_to_whole_windows_but_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(numbers(0, 1000))
    assert load(Words(), path, num_tokens=99, window=33).ids.shape == (3, 33)
    assert load(Words(), path, num_tokens=98, window=33).ids.shape == (2, 33)
    assert load(Words(), path, num_tokens=1, window=33).ids.shape == (1, 33)
    with pytest.raises(CalibrationError, match="at least 1"):
        load(Words(), path, num_tokens=0)


def test_short_text_is_used_whole_with_a_note(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(numbers(0, 100))
    loaded = load(Words(), path, num_tokens=320, window=32)
    assert sorted(loaded.ids.flatten().tolist()) == list(range(96))
    assert loaded.notes == (f"Calibration uses 96 tokens, all that {path} gives, of 320 asked for.",)


def test_text_shorter_than_a_window(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(numbers(0, 32))
    loaded = load(Words(), path, num_tokens=64, window=64)
    assert loaded.ids.tolist() == [list(range(32))]
    assert loaded.notes == (f"The calibration window was lowered from 64 to 32, all that {path} gives.",)
    path.write_text(numbers(0, 31))
    with pytest.raises(CalibrationError, match="gives 31 tokens; at least 32 are needed"):
        load(Words(), path, num_tokens=64, window=64)
    assert load(Words(), path, num_tokens=20, window=10).ids.shape == (2, 10)


def test_tokenizer_of_another_model_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(numbers(0, 100))
    assert load(Words(), path, vocab_size=100).num_tokens == 64
    with pytest.raises(CalibrationError, match=r"token 99, the model knows 99 tokens \(0 to 98\)"):
        load(Words(), path, vocab_size=99)


def test_advice_on_num_tokens():
    assert advise_num_tokens(768, 768) is None
    assert "1536 tokens would do" in (advise_num_tokens(767, 768) or "")


def test_evaluation_windows_keep_the_order(tokenizer):
    assert evaluation_windows(Words(), numbers(0, 100), 30).tolist() == torch.arange(90).reshape(3, 30).tolist()
    text = read_text(ASSETS / "calibration.txt")
    windows = evaluation_windows(tokenizer, text, 100)
    assert windows.flatten().tolist() == tokenizer(text)["input_ids"][: windows.numel()]
    with pytest.raises(CalibrationError, match="100 tokens, less than one evaluation window of 101"):
        evaluation_windows(Words(), numbers(0, 100), 101)


@pytest.mark.parametrize(("max_tokens", "num_notes"), [(None, 0), (101, 0), (100, 0), (99, 1), (60, 1)])
def test_evaluation_windows_say_when_tokens_are_cut_off(max_tokens, num_notes):
    notes = []
    windows = evaluation_windows(Words(), numbers(0, 100), 30, max_tokens=max_tokens, notes=notes)
    assert len(windows) == (2 if max_tokens == 60 else 3)
    assert notes == [f"No more than the first {max_tokens} tokens are read (--tokens)."] * num_notes


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf:c4", ("c4", None, "train", None)),
        ("hf:allenai/c4", ("allenai/c4", None, "train", None)),
        ("hf:allenai/c4/en:validation", ("allenai/c4", "en", "validation", None)),
        ("hf:a/b:test:body", ("a/b", None, "test", "body")),
        (texts.STANDARD_SOURCE, ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text")),
    ],
)
def test_hub_sources(source, expected):
    assert parse_hub_source(source) == expected


@pytest.mark.parametrize("source", ["hf:", "hf:a//b", "hf:a/b/c/d", "hf:a:b:c:d", "hf:a::text", "hf:/a"])
def test_hub_sources_not_understood(source):
    with pytest.raises(CalibrationError, match="allowed: hf:DATASET"):
        parse_hub_source(source)


@pytest.fixture
def hub(monkeypatch):
    """A `datasets` package that serves `hub.rows` and records what it was asked for and how many rows were read."""
    served = types.SimpleNamespace(rows=[{"text": f"{n} x"} for n in range(1000)], asked=[], num_read=0)

    def load_dataset(path, name=None, *, split, streaming):
        served.asked.append((path, name, split, streaming))

        def rows():
            for row in served.rows:
                if isinstance(row, Exception):
                    raise row
                served.num_read += 1
                yield row

        return rows()

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(texts, "_hub_answers", lambda: True)
    return served


def test_hub_data_set_is_streamed(hub):
    loaded = load(Words(eos=9), "hf:a/b/c:test")
    assert hub.asked == [("a/b", "c", "test", True)]
    assert loaded.source == "hf:a/b/c:test:text"
    assert loaded.num_tokens == 64
    assert hub.num_read <= tokens.POOL_FACTOR * 64 / 3 + 2
    assert loaded.digest == load(Words(eos=9), "hf:a/b/c:test").digest


def test_hub_column(hub):
    hub.rows = [{"id": 1, "body": "b1"}, {"id": 2, "body": None}, {"id": 3, "body": "b3"}]
    assert resolve_text("hf:a").source == "hf:a:train:body"
    assert documents("hf:a") == ["b1", "b3"]
    assert documents("hf:a:train:body") == ["b1", "b3"]
    with pytest.raises(CalibrationError, match="no column 'text'; its columns are: id, body"):
        resolve_text("hf:a:train:text")
    with pytest.raises(CalibrationError, match="'id' holds int"):
        documents("hf:a:train:id")
    hub.rows = [{"question": "q", "answer": "a"}]
    with pytest.raises(CalibrationError, match="its keys are: question, answer"):
        resolve_text("hf:a")


def test_rows_that_are_lines_make_one_document(hub):
    hub.rows = [{"text": text} for text in ["", " = Title = \n", "", "A line.\n", "End.", "Another."]]
    assert documents("hf:a") == [" = Title = \nA line.\nEnd.", "Another."]


def test_hub_failures_are_named(hub):
    hub.rows = [{"text": "a"}, ConnectionError("lost\nsecond line")]
    with pytest.raises(CalibrationError, match=r"hf:a cannot be read \(ConnectionError: lost\)"):
        documents("hf:a")
    hub.rows = []
    with pytest.raises(CalibrationError, match="hf:a has no rows"):
        resolve_text("hf:a")


def test_missing_package_is_named(monkeypatch):
    for missing in (None, types.ModuleType("datasets")):  # a folder of that name imports as an empty module
        monkeypatch.setitem(sys.modules, "datasets", missing)
        with pytest.raises(CalibrationError, match=r"pip install 'llmmpq\[eval\]'"):
            resolve_text("hf:a")


def test_auto_takes_the_standard_data_set(hub):
    text = resolve_text("auto")
    assert (text.source, text.notes) == (texts.STANDARD_SOURCE, ())
    assert hub.asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "train", True)]


@pytest.mark.parametrize("case", ["offline", "missing", "no answer", "broken"])
def test_auto_falls_back_to_the_packaged_text_and_says_so(hub, monkeypatch, case):
    if case == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    elif case == "missing":
        monkeypatch.setitem(sys.modules, "datasets", None)
    elif case == "no answer":
        monkeypatch.setattr(texts, "_hub_answers", lambda: False)
    else:
        hub.rows = [OSError("403")]
    text = resolve_text("auto")
    assert text.source == "builtin"
    assert documents("builtin") == [document for part in text.parts for document in part]
    (note,) = text.notes
    reason = {"offline": "HF_HUB_OFFLINE", "missing": "pip install", "no answer": "3 seconds", "broken": "403"}[case]
    assert reason in note
    assert "\n" not in note


def test_hub_is_asked_with_a_time_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(texts, "HUB_TIMEOUT_S", 0.5)
    release = threading.Event()

    def hang(*_, **__):
        release.wait()
        raise OSError

    monkeypatch.setattr(texts.urllib.request, "urlopen", hang)
    assert not texts._hub_answers()
    release.set()
    monkeypatch.undo()
    died = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    for endpoint in ("http://127.0.0.1:9", "no address", "http://[::1"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        assert not texts._hub_answers()
    page = tmp_path / "api" / "datasets" / texts.STANDARD_DATASET
    page.parent.mkdir(parents=True)
    page.write_text(json.dumps({}))
    monkeypatch.setenv("HF_ENDPOINT", tmp_path.as_uri())
    assert texts._hub_answers()
    assert not died
