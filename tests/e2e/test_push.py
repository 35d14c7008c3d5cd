"""`llmmpq push` and `quantize --push-to-hub` with the real huggingface_hub client, against a Hub on this machine.

The client reads its settings when it is imported, so they are set in its `constants`; one test sets them as a user
does, in the environment of a process of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import _http

from llmmpq import LlmmpqForCausalLM
from llmmpq.digest import file_sha256
from llmmpq.errors import HubError
from llmmpq.evaluate.card import is_sealed, seal
from llmmpq.hub import Destination
from llmmpq.pipeline import push_folder, quantize_model
from llmmpq.progress import Silent
from llmmpq.publishing import _private_names
from tests import tiny
from tests.e2e.hubserver import GIT_ATTRIBUTES, HubServer
from tests.e2e.running import digests, run_here, tiny_recipe

REPO = "user/tiny-5bit"


@pytest.fixture(scope="module")
def finished(folders, calibration_file, tmp_path_factory) -> Path:
    """A quantized folder of several shards, to copy."""
    folder = tmp_path_factory.mktemp("finished") / "tiny-5bit"
    recipe = tiny_recipe(
        folders("llama"), calibration_file, allocation__method="uniform", output__max_shard_size="40kB"
    )
    quantize_model(recipe, out=folder)
    assert len(list(folder.glob("*.safetensors"))) >= 4
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "tiny-5bit"))


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[HubServer]:
    with HubServer() as server:
        use_hub(monkeypatch, server.endpoint, tmp_path)
        yield server


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between the client's own five tries


def mistake(outcome) -> str:
    assert outcome.code == 2, outcome
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in outcome.stderr
    return line


def test_push_then_load_by_name(hub, folder, capsys, tmp_path):
    written = digests(folder)
    outcome = run_here(["push", folder, REPO, "--json"], capsys)
    assert outcome.code == 0, outcome.stderr
    result = json.loads(outcome.stdout)
    assert result["url"] == f"{hub.endpoint}/{REPO}"

    there = hub.repos[REPO].files()
    assert digests(folder) == written | {name: digests(folder)[name] for name in ("README.md", "bit-map.png")}
    assert there == {".gitattributes": GIT_ATTRIBUTES} | {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(result["uploaded"]) == sorted(set(there) - {".gitattributes"})
    assert len(hub.repos[REPO].messages) == 2  # its creation, and one commit for everything

    tokens = tiny.token_ids()
    with torch.no_grad():
        here = LlmmpqForCausalLM.from_pretrained(str(folder))(tokens).logits
        loaded = LlmmpqForCausalLM.from_pretrained(REPO)(tokens).logits
    assert torch.equal(here, loaded)
    cached = tmp_path / "cache" / f"models--{REPO.replace('/', '--')}" / "snapshots" / str(result["commit"])
    fetched = {path.name: path.read_bytes() for path in cached.glob("*.safetensors")}
    assert fetched == {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_the_same_command_again_sends_nothing(hub, folder, capsys):
    assert run_here(["push", folder, REPO], capsys).code == 0
    uploads, commits = hub.uploads.copy(), len(hub.repos[REPO].commits)
    again = json.loads(run_here(["push", folder, REPO, "--json"], capsys).stdout)
    assert again["uploaded"] == []
    assert (hub.uploads, len(hub.repos[REPO].commits)) == (uploads, commits)
    assert "Sent           nothing" in run_here(["push", folder, REPO], capsys).stdout


def test_an_interrupted_push_continues_with_the_shard_it_broke_off_in(hub, folder, capsys):
    hub.drop_uploads_after = 2
    line = mistake(run_here(["push", folder, REPO], capsys))
    assert "The same command again continues" in line
    assert "cannot reach" in line
    assert sum(hub.uploads.values()) == 2
    assert len({request for request in hub.requests if request.startswith("PUT")}) == 3  # one shard at a time
    assert list(hub.repos[REPO].files()) == [".gitattributes"]  # nobody sees half a model

    hub.drop_uploads_after = None
    outcome = run_here(["push", folder, REPO], capsys)
    assert outcome.code == 0, outcome.stderr
    assert set(hub.uploads.values()) == {1}  # no object was sent twice
    shards = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert len(hub.uploads) >= len(shards)
    assert shards.items() <= hub.repos[REPO].files().items()


def test_a_connection_that_breaks_once_is_not_even_noticed(hub, folder, capsys):
    hub.drop_uploads_after, hub.most_drops = 1, 1
    outcome = run_here(["push", folder, REPO], capsys)
    assert (outcome.code, hub.num_drops) == (0, 1), outcome.stderr
    assert hub.repos[REPO].files()["README.md"] == (folder / "README.md").read_bytes()


class Bytes(Silent):
    """Adds up what each task is told."""

    def __init__(self) -> None:
        self.told: dict[str, list[int]] = {}
        self.totals: dict[str, int] = {}

    @contextmanager
    def task(self, label: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
        self.totals[label] = total
        self.told[label] = []
        yield self.told[label].append


def test_progress_goes_shard_by_shard_to_its_end(hub, folder):
    progress = Bytes()
    push_folder(folder, Destination(repo=REPO), progress=progress)
    assert list(progress.totals) == ["compare digests", "upload"]
    assert {label: sum(told) for label, told in progress.told.items()} == progress.totals
    assert len(progress.told["upload"]) == len(list(folder.glob("*.safetensors"))) + 1


@pytest.mark.parametrize(
    ("token", "says"),
    [
        ("hf_wrong", "does not accept the token"),
        ("hf_reader", "the token of user may only read"),
        ("hf_other", "the token may not write to user/tiny-5bit"),
        (None, "needs a token, and none was found"),
    ],
)
def test_a_token_that_will_not_do(hub, folder, capsys, monkeypatch, token, says):
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    assert says in mistake(run_here(["push", folder, REPO], capsys))
    assert not hub.repos
    if token == "hf_other":  # and where the repository is there already
        hub.add_repo(REPO)
        assert says in mistake(run_here(["push", folder, REPO], capsys))
        assert list(hub.repos[REPO].files()) == [".gitattributes"]


def test_without_a_network(hub, folder, capsys, monkeypatch, tmp_path):
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path)  # the port that discards, where nobody listens
    line = mistake(run_here(["push", folder, REPO], capsys))
    assert "cannot reach http://127.0.0.1:9" in line
    assert "Check the network" in line
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in mistake(run_here(["push", folder, REPO], capsys))


def test_a_server_without_xet(hub, folder, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    line = mistake(run_here(["push", folder, REPO], capsys))
    assert "does not take uploads by Xet" in line
    assert "HF_HUB_DISABLE_XET=1" in line


@pytest.mark.parametrize("repo", ["tiny", "user/", "user/a b", "a/b/c", "user/--x"])
def test_a_name_that_is_none(hub, folder, capsys, repo):
    line = mistake(run_here(["push", folder, repo], capsys))
    assert "USER/NAME" in line
    assert ".. " not in line
    assert not hub.repos


def test_what_somebody_else_put_there_is_left_alone(hub, folder, capsys):
    before = {"README.md": b"my model", "model.safetensors": b"1"}
    hub.add_repo(REPO, before)
    line = mistake(run_here(["push", folder, REPO], capsys))
    assert "exists and holds something else" in line
    assert "README.md, model.safetensors" in line
    assert "--overwrite" in line
    assert hub.repos[REPO].files() == {".gitattributes": GIT_ATTRIBUTES} | before
    assert not (folder / "README.md").exists()

    result = json.loads(run_here(["push", folder, REPO, "--overwrite", "--json"], capsys).stdout)
    assert result["deleted"] == ["model.safetensors"]
    assert set(hub.repos[REPO].files()) == {".gitattributes", *(path.name for path in folder.iterdir())}


def test_another_quantized_model_is_left_alone(hub, folder, capsys):
    hub.add_repo(REPO, {"plan.json": b"{}", "digests.json": b"{}"})
    assert "holds another model quantized by llmmpq" in mistake(run_here(["push", folder, REPO], capsys))


def test_a_repository_that_changes_meanwhile_is_not_written_over(hub, folder, monkeypatch):
    repo = hub.add_repo(REPO)
    real = hub.RequestHandlerClass._batch

    def batch(handler, name, asked):
        if len(repo.commits) == 1:
            repo.commit("main", dict(repo.commits[repo.branches["main"]]), "somebody else")
        return real(handler, name, asked)

    monkeypatch.setattr(hub.RequestHandlerClass, "_batch", batch)
    with pytest.raises(HubError, match="changed by somebody else meanwhile"):
        push_folder(folder, Destination(repo=REPO))


def test_a_branch_of_its_own(hub, folder, capsys):
    hub.add_repo(REPO, {"model.safetensors": b"1"})
    for _ in range(2):
        outcome = run_here(["push", folder, REPO, "--revision", "5bit", "--message", "five bits"], capsys)
        assert outcome.code == 0, outcome.stderr
    repo = hub.repos[REPO]
    assert set(repo.files("5bit")) == {".gitattributes", *(path.name for path in folder.iterdir())}
    assert set(repo.files("main")) == {".gitattributes", "model.safetensors"}
    assert repo.messages[1:] == ["five bits"]


def test_private_is_private(hub, folder, capsys):
    assert run_here(["push", folder, REPO, "--private"], capsys).code == 0
    assert hub.repos[REPO].private
    hub.add_repo("user/open")
    assert "is public, though --private" in mistake(run_here(["push", folder, "user/open", "--private"], capsys))


def test_a_damaged_folder_is_not_pushed(hub, folder, capsys):
    shard = min(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    line = mistake(run_here(["push", folder, REPO], capsys))
    assert f"is damaged: {shard.name} is not the file that was written" in line
    assert not hub.repos


def test_only_a_folder_that_quantize_wrote(hub, folders, capsys):
    assert "has no plan.json" in mistake(run_here(["push", folders("llama"), REPO], capsys))


def test_an_edited_card_stays_here_and_there(hub, folder, capsys):
    run_here(["push", folder, REPO], capsys)
    repo = hub.repos[REPO]
    files = dict(repo.commits[repo.branches["main"]])
    edited = type(files["README.md"])(files["README.md"].content + b"Edited on the Hub.\n")
    repo.commit("main", files | {"README.md": edited})
    (folder / "eval.json").write_text('{"perplexity": 12.5}')  # so that a new card would be another
    outcome = run_here(["push", folder, REPO], capsys)
    assert "README.md was edited on the Hub and stays" in outcome.stdout
    assert repo.files()["README.md"] == edited.content
    assert "eval.json" in repo.files()

    (folder / "README.md").write_text("# Mine\n")
    outcome = run_here(["push", folder, REPO], capsys)
    assert "was edited: it is pushed as it is" in outcome.stdout
    assert repo.files()["README.md"] == b"# Mine\n"


def test_the_card_names_the_original_and_its_licence(hub, folder, folders, capsys):
    original = folders("llama")
    hub.add_repo("org/base", {}, card_data={"license": "other", "license_name": "tiny", "license_link": "LICENSE"})
    push = ["push", folder, REPO, "--base-model", "org/base"]
    assert run_here(push, capsys).code == 0
    data = ModelCard((folder / "README.md").read_text(encoding="utf-8")).data
    assert data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "library_name": "llmmpq",
        "license": "other",
        "license_name": "tiny",
        "license_link": "LICENSE",
        "pipeline_tag": "text-generation",
        "tags": ["llmmpq", "quantized", "mixed-precision", data.tags[-1]],
    }
    outcome = run_here(["push", folder, REPO], capsys)
    assert "the card names no base_model" in outcome.stdout
    assert f"recipe.yaml and plan.json name {original} and " in outcome.stdout
    assert "base_model" not in ModelCard((folder / "README.md").read_text(encoding="utf-8")).data.to_dict()
    line = mistake(run_here([*push[:-1], "org/none"], capsys))
    assert "--base-model org/none is not on the Hub" in line


def test_results_of_another_model_are_refused(hub, folder, capsys, tmp_path):
    wrong = tmp_path / "results.json"
    wrong.write_text('{"perplexity": 1.5, "total_nbytes": 17}')
    assert "was measured on another model" in mistake(run_here(["push", folder, REPO, "--results", wrong], capsys))
    wrong.write_text('{"accuracy": 1.0}')
    assert "holds no 'perplexity'" in mistake(run_here(["push", folder, REPO, "--results", wrong], capsys))


def test_what_is_published_of_an_evaluation_names_no_place(hub, folder, capsys, tmp_path):
    results = {"model": "./q", "text": "secret/x.txt", "perplexity": 2.0, "files": ["/home/ada/results_1.json"]}
    results |= {"baseline": {"model": "/home/ada/base", "perplexity": 1.9}}
    clean = {"model": "q", "text": "x.txt", "perplexity": 2.0, "files": ["results_1.json"]}
    clean |= {"baseline": {"model": "base", "perplexity": 1.9}}
    clean |= {"digest": file_sha256(folder / "digests.json")}
    results |= {"digest": clean["digest"]}
    (tmp_path / "e.json").write_text(json.dumps(results))
    assert run_here(["push", folder, REPO, "--results", tmp_path / "e.json"], capsys).code == 0
    assert json.loads(hub.repos[REPO].files()["eval.json"]) == clean
    (folder / "eval.json").write_text(json.dumps(results))  # put there by hand
    assert run_here(["push", folder, REPO], capsys).code == 0
    assert json.loads(hub.repos[REPO].files()["eval.json"]) == clean

    (tmp_path / "e.json").write_text(json.dumps(results | {"digest": "0" * 64}))
    line = mistake(run_here(["push", folder, REPO, "--results", tmp_path / "e.json"], capsys))
    assert "was measured on another model" in line
    assert "digests.json has the digest 000000000000" in line


def test_a_relative_name_is_a_private_one_too(folder):
    provenance = {"model": "./base", "calibration": {"source": "~/x.txt"}}
    (note,) = _private_names(folder, provenance)
    assert "./base and ~/x.txt" in note


def test_a_folder_that_is_not_there(hub, capsys, tmp_path):
    for command in (["push", tmp_path / "none", REPO], ["inspect", tmp_path / "none"]):
        assert "none does not exist" in mistake(run_here(command, capsys))


def test_figures_of_tasks_alone_are_taken(hub, folder, capsys, tmp_path):
    (tmp_path / "e.json").write_text('{"model": "q", "results": {"arc_easy": {"acc": 0.5}}}')
    assert run_here(["push", folder, REPO, "--results", tmp_path / "e.json"], capsys).code == 0
    assert "| arc_easy: acc | 0.5000 |  |" in (folder / "README.md").read_text(encoding="utf-8").splitlines()


def test_a_seal_breaks_with_any_change():
    card = seal("# Card\n\nText.\n")
    assert is_sealed(card)
    assert is_sealed(card.replace("\n", "\r\n"))
    assert not is_sealed(card.replace("Text", "text"))
    assert not is_sealed(card + "More.\n")
    assert not is_sealed("# Card\n")


QUANTIZE = ["--bits", "4", "--tokens", "256", "--window", "64", "--group-size", "28", "--threads", "1", "--quiet"]


def test_quantize_looks_at_the_hub_first_and_pushes_last(hub, folders, calibration_file, capsys, tmp_path, monkeypatch):
    out = tmp_path / "out"
    command = ["quantize", folders("llama"), "--calib", calibration_file, "--out", out, *QUANTIZE]
    command += ["--push-to-hub", REPO, "--private", "--json"]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not accept the token" in mistake(run_here(command, capsys))
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    hub.add_repo(REPO, {"notes.txt": b"mine"}, private=True)
    assert "holds something else" in mistake(run_here(command, capsys))
    assert not (tmp_path / ".llmmpq-work").exists()  # nothing was spent

    del hub.repos[REPO]
    hub.drop_uploads_after = 0
    line = mistake(run_here(command, capsys))
    assert f"{out} is finished and stays, but it was not pushed" in line
    hub.drop_uploads_after = None
    outcome = run_here(command, capsys)
    assert outcome.code == 0, outcome.stderr
    result = json.loads(outcome.stdout)
    assert result["already_done"]
    assert result["pushed"]["repo"] == REPO
    assert hub.repos[REPO].private
    assert hub.repos[REPO].files()["plan.json"] == (out / "plan.json").read_bytes()


def test_no_repository_is_made_for_an_output_that_cannot_be(hub, folders, capsys, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("somebody's")
    command = ["quantize", folders("llama"), "--bits", 3, "--calib", "builtin", "--out", out, "--push-to-hub", REPO]
    assert "holds something else" in mistake(run_here(command, capsys))
    assert not hub.repos


def test_private_alone_says_that_it_would_change_nothing(hub, capsys):
    assert "--push-to-hub" in mistake(run_here(["quantize", "demo", "--private"], capsys))


SCRIPT = """
import sys
from llmmpq.cli import main
assert main(["push", sys.argv[1], "user/apart", "--quiet"]) == 0
from llmmpq import LlmmpqForCausalLM
LlmmpqForCausalLM.from_pretrained("user/apart").save_pretrained(sys.argv[2])
"""


def test_the_environment_alone_points_the_client_elsewhere(folder, tmp_path):
    with HubServer() as server:
        settings = {
            "HF_ENDPOINT": server.endpoint,
            "HF_TOKEN": "hf_writer",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "again")],
            env=os.environ | settings,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert set(server.repos["user/apart"].files()) == {".gitattributes", *(path.name for path in folder.iterdir())}
    assert list((tmp_path / "again").glob("*.safetensors"))
