"""What MODEL may be, what each wrong one is told, and which small files travel with a model."""

from unittest.mock import MagicMock

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llmmpq.errors import CheckpointError
from llmmpq.model import source
from llmmpq.model.source import companion_files, is_hub_name, resolve_model


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the Hub: records the calls, returns or raises what it is told."""
    calls = []

    def answer(result):
        def snapshot_download(model, **options):
            calls.append((model, options))
            if isinstance(result, Exception):
                raise result
            return str(result)

        monkeypatch.setattr(source, "snapshot_download", snapshot_download)
        return calls

    answer(AssertionError("the Hub was asked"))
    return answer


def test_what_is_a_name_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "user" / "snapshots").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert [is_hub_name(name) for name in ("demo", "user/snapshots", str(tmp_path), "user/other")] == [
        *[False] * 3,
        True,
    ]


def http_error(kind: type, text: str = "no") -> Exception:
    return kind(text, response=MagicMock(headers={}))


def test_the_demo_is_part_of_the_package(hub):
    folder = resolve_model("demo")
    assert (folder / "config.json").is_file()
    assert list(folder.glob("*.safetensors"))


def test_a_folder_is_taken_as_it_is(hub, tmp_path, monkeypatch):
    (tmp_path / "user" / "model").mkdir(parents=True)
    (tmp_path / "user" / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = (tmp_path / "user" / "model").resolve()
    # `user/model` would be a Hub id if the folder were not there.
    for given in (str(expected), "user/model", "./user/model", "user/model/", "~/user/model"):
        assert resolve_model(given) == expected


def test_a_folder_without_a_config(hub, tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve_model(str(tmp_path))


def test_a_file_is_no_model(hub, tmp_path, monkeypatch):
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "model.gguf").write_text("")
    monkeypatch.chdir(tmp_path)
    for given in (str(tmp_path / "user" / "model.gguf"), "user/model.gguf"):
        with pytest.raises(CheckpointError, match=r"model\.gguf.*is a file"):
            resolve_model(given)


@pytest.mark.parametrize("model", ["/no/such", "./no", "../no/such", "~/no/such", "no-such", "a/b/c", "~nobody-here/x"])
def test_a_path_that_is_not_there_is_no_hub_id(hub, model):
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_model(model)


def test_a_hub_id_is_downloaded_without_pickles(hub, tmp_path):
    calls = hub(tmp_path)
    assert resolve_model("user/name", revision="v1") == tmp_path
    ((model, options),) = calls
    assert (model, options["revision"]) == ("user/name", "v1")
    assert "*.safetensors" in options["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".py", "*")) for pattern in options["allow_patterns"][:-1])


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (http_error(GatedRepoError), r"user/name is gated: accept its licence"),
        (http_error(RevisionNotFoundError), r"user/name has no revision 'v9'"),
        (http_error(RepositoryNotFoundError), r"'user/name' is neither a folder here nor a model on the Hub"),
        (LocalEntryNotFoundError("offline\nmore"), r"'user/name' is not a folder here.*offline\. Check"),
        (HFValidationError("bad id"), r"bad id"),
        (OSError("No space left on device"), r"No space left"),
        (OSError(), r"OSError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_answers_is_passed_on_in_one_line(hub, error, says):
    hub(error)
    with pytest.raises(CheckpointError, match=says) as caught:
        resolve_model("user/name", revision="v9")
    assert "\n" not in str(caught.value)


def test_companions_are_what_belongs_to_a_model_but_not_its_weights(tmp_path):
    wanted = [
        "LICENSE",
        "LICENSE.txt",
        "added_tokens.json",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    ]
    others = [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.safetensors",
        "tokenizer.bin",
        "tokenizer.pt",
        "tokenization_own.py",
        "tokenizer_own.py",
        "vocab.py",
        "README.md",
        "pytorch_model.bin",
    ]
    for name in wanted + others:
        (tmp_path / name).write_text(name)
    (tmp_path / "tokenizer_folder").mkdir()
    assert [path.name for path in companion_files(tmp_path)] == wanted
