"""Logits from memory and block by block are the same bits, however many windows ride together."""

import psutil
import pytest
import torch

from llmmpq import reading
from llmmpq.errors import CalibrationError, UnsupportedModelError
from llmmpq.reading import Reader
from tests import tiny

WINDOWS = tiny.token_ids(num_sequences=7, num_tokens=40)  # the last batch of four is a short one


def read(reader):
    batches = list(reader.logits(WINDOWS))
    assert [first for first, _ in batches] == list(range(0, len(WINDOWS), reader.batch(40)))
    return torch.cat([logits for _, logits in batches])


@pytest.fixture
def no_memory(monkeypatch):
    """Too little to hold any model, and enough for the logits."""
    monkeypatch.setattr(reading, "WEIGHTS_SHARE", 0.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_streamed_and_held_are_the_same_bits(name, dtype, folders, monkeypatch):
    held = Reader(str(folders(name)), dtype=dtype)
    assert held.is_held
    expected = read(held)
    monkeypatch.setattr(reading, "WEIGHTS_SHARE", 0.0)
    streamed = Reader(str(folders(name)), dtype=dtype)
    assert not streamed.is_held
    assert streamed.load() is None
    assert streamed.dtype == held.dtype == getattr(torch, dtype)
    assert torch.equal(read(streamed), expected)


def test_windows_ride_in_as_many_passes_as_their_states_need(folders, no_memory, monkeypatch):
    expected = read(Reader(str(folders("llama"))))
    monkeypatch.setattr(reading, "STATES_SHARE", 0.0)  # one batch at a time
    passes = []

    class Counted(reading.BlockStream):
        def __init__(self, *args, **options):
            passes.append(len(args[2]))
            super().__init__(*args, **options)

    monkeypatch.setattr(reading, "BlockStream", Counted)
    assert torch.equal(read(Reader(str(folders("llama")))), expected)
    assert passes == [4, 3]


def test_a_model_that_can_be_neither_held_nor_streamed(folders, no_memory, monkeypatch):
    def refuse(*_arguments):
        raise UnsupportedModelError("it has no blocks")

    monkeypatch.setattr(reading, "build_skeleton", refuse)
    with pytest.raises(
        UnsupportedModelError, match=r"cannot be held \(its weights take .* are free\) nor streamed: it"
    ):
        Reader(str(folders("llama")))


def test_logits_that_do_not_fit_name_the_window(folders, monkeypatch):
    reader = Reader(str(folders("llama")))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"available": 1000}))
    with pytest.raises(CalibrationError, match=r"logits of one window of 40 tokens take .* smaller --window"):
        next(reader.logits(WINDOWS))


def test_weights_are_read_with_the_first_logits(folders, monkeypatch):
    loads, plain = [], reading._load
    monkeypatch.setattr(reading, "_load", lambda *arguments: loads.append(arguments) or plain(*arguments))
    reader = Reader(str(folders("llama")))
    assert reader.batch(40) == 4
    assert not loads
    assert torch.equal(read(reader), read(reader))
    assert len(loads) == 1


def test_few_windows_per_forward_where_the_vocabulary_is_large(folders, monkeypatch):
    reader = Reader(str(folders("llama")))
    assert reader.batch(40) == 4
    monkeypatch.setattr(reading, "MOST_LOGITS_PER_FORWARD", 2 * 40 * tiny.VOCAB)
    assert (reader.batch(40), reader.batch(4000)) == (2, 1)
