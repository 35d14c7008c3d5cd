"""The text of the offline tasks, from the files beside this one. lm-eval imports it by its path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

FOLDER = Path(__file__).parent


def prose(**_settings: Any) -> dict[str, Dataset]:
    documents = FOLDER.joinpath("prose.txt").read_text(encoding="utf-8").split("\n---\n")
    return {"test": Dataset.from_list([{"text": document.strip()} for document in documents])}


def prose_results(doc: dict[str, str], results: tuple[float]) -> dict[str, tuple[float, int]]:
    (loglikelihood,) = results
    num_words, num_bytes = len(doc["text"].split()), len(doc["text"].encode())
    return {
        "word_perplexity": (loglikelihood, num_words),
        "byte_perplexity": (loglikelihood, num_bytes),
        "bits_per_byte": (loglikelihood, num_bytes),
    }


def cloze(**_settings: Any) -> dict[str, Dataset]:
    lines = FOLDER.joinpath("cloze.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
