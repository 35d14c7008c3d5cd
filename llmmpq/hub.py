"""A repository of the Hub: what it holds, whether it may be written to, and how files get there.

One commit publishes everything, after the last shard is stored: a reader never sees half a model. Until then shards
lie in the repository's storage, where the Hub finds them by their digest, so that an interrupted push sends none of
them twice. What the branch already holds is compared by digest and not sent.

A repository is written to when it is new or empty, or holds this very model. Anything else there is somebody's work and
is only replaced when `overwrite` says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from llmmpq.errors import HubError
from llmmpq.output import DIGESTS_FILE, PLAN_FILE
from llmmpq.progress import Progress

MAIN = "main"
UNTOUCHED = ".gitattributes"  # written by the Hub itself into every new repository
SHARDS = ".safetensors"
SIGN_IN = "`hf auth login`, or set HF_TOKEN to a token that may write (https://huggingface.co/settings/tokens)"


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where a model goes."""

    repo: str
    private: bool = False
    revision: str | None = None
    overwrite: bool = False

    @property
    def branch(self) -> str:
        return self.revision or MAIN


@dataclass(frozen=True, kw_only=True)
class Branch:
    """What the destination holds now. `commit` is None where the repository or its branch is still to be made."""

    files: Mapping[str, RepoFile]
    commit: str | None
    is_missing_repo: bool = False
    is_copy: bool = False  # of the main branch, with nothing of its own


def check_destination(destination: Destination, folder: Path) -> None:
    """Before the long run: the token, the name, and that `folder` could be pushed. Makes the repository.

    A token may be good and not allowed to write here; only making the repository tells.
    """
    api = HfApi()
    with explained(api, destination):
        branch = look(api, destination)
        refuse_other_content(branch, destination, folder)
        make(api, destination, branch)


def look(api: HfApi, destination: Destination) -> Branch:
    """Asks for the token first: without one, everything that is private looks as if it were not there."""
    who = api.whoami()
    if "/" not in destination.repo:
        raise HubError(f"{destination.repo!r} is no repository; allowed: USER/NAME, such as {who.get('name')}/model")
    if ((who.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise HubError(f"the token of {who.get('name')} may only read: {SIGN_IN}")
    return _state(api, destination)


def _state(api: HfApi, destination: Destination) -> Branch:
    try:
        info = api.model_info(destination.repo)
    except RepositoryNotFoundError:
        return Branch(files={}, commit=None, is_missing_repo=True)
    if destination.private and info.private is False:
        raise HubError(
            f"{destination.repo} exists and is public, though --private was asked: change that in its settings, or "
            "choose another name"
        )
    api.auth_check(destination.repo, write=True)
    try:
        commit = api.model_info(destination.repo, revision=destination.branch).sha
    except RevisionNotFoundError:
        return Branch(files={}, commit=None)
    tree = api.list_repo_tree(destination.repo, recursive=True, revision=destination.branch)
    files = {file.path: file for file in tree if isinstance(file, RepoFile)}
    return Branch(files=files, commit=commit, is_copy=destination.branch != MAIN and commit == info.sha)


def refuse_other_content(branch: Branch, destination: Destination, folder: Path) -> None:
    others = sorted(set(branch.files) - {UNTOUCHED})
    if not others or branch.is_copy or destination.overwrite or _is_same_model(branch, folder):
        return
    where = destination.repo + (f" (branch {destination.revision})" if destination.revision else "")
    if DIGESTS_FILE in branch.files and PLAN_FILE in branch.files:
        what = f"another model quantized by llmmpq than {folder}"
    else:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        what = f"something else than {folder} ({shown})"
    raise HubError(
        f"{where} exists and holds {what}: it is left alone. Choose another name or --revision, or replace what it "
        f"holds with `llmmpq push {folder} {destination.repo} --overwrite`."
    )


def _is_same_model(branch: Branch, folder: Path) -> bool:
    """The digests of all files are in one file, so that file alone decides."""
    file = branch.files.get(DIGESTS_FILE)
    return file is not None and (folder / DIGESTS_FILE).is_file() and is_there(file, folder / DIGESTS_FILE)


def is_there(file: RepoFile | None, path: Path) -> bool:
    if file is None or file.size != path.stat().st_size:
        return False
    hasher = hashlib.sha256() if file.lfs else hashlib.sha1(b"blob %d\0" % file.size)  # git's name of a file
    with path.open("rb") as stream:
        while chunk := stream.read(8 << 20):
            hasher.update(chunk)
    return hasher.hexdigest() == (file.lfs.sha256 if file.lfs else file.blob_id)


def make(api: HfApi, destination: Destination, branch: Branch) -> Branch:
    """The repository and the branch, where they are missing. Returns what the push builds upon."""
    if branch.commit is not None:
        return branch
    if branch.is_missing_repo:
        # None is the default of the user's organisation, False would ask for public.
        api.create_repo(destination.repo, private=destination.private or None, exist_ok=True)
    if destination.revision is not None:
        api.create_branch(destination.repo, branch=destination.branch, exist_ok=True)
    made = _state(api, destination)
    if made.commit is None:
        raise HubError(f"{destination.repo} exists, but the token does not let it be read: {SIGN_IN}")
    return made


def upload(
    api: HfApi,
    destination: Destination,
    branch: Branch,
    files: list[Path],
    *,
    message: str,
    progress: Progress,
) -> dict[str, Any]:
    missing = [path for path in files if not is_there(branch.files.get(path.name), path)]
    replaced = destination.overwrite or branch.is_copy
    deleted = sorted(set(branch.files) - {path.name for path in files} - {UNTOUCHED}) if replaced else []
    missing_nbytes = sum(path.stat().st_size for path in missing)
    outcome = {
        "uploaded": [path.name for path in missing],
        "uploaded_nbytes": missing_nbytes,
        "unchanged": [path.name for path in files if path not in missing],
        "deleted": deleted,
        "commit": branch.commit,
    }
    if not missing and not deleted:
        return outcome
    additions = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in missing]
    with progress.task("upload", missing_nbytes, "bytes") as advance:
        for addition, path in zip(additions, missing, strict=True):
            if path.suffix == SHARDS:  # one by one: each is safe before the next is begun
                api.preupload_lfs_files(
                    destination.repo, additions=[addition], revision=destination.branch, free_memory=False
                )
                advance(path.stat().st_size)
        done = api.create_commit(
            destination.repo,
            operations=[*additions, *(CommitOperationDelete(path_in_repo=path, is_folder=False) for path in deleted)],
            commit_message=message,
            revision=destination.branch,
            parent_commit=branch.commit,
        )
        advance(sum(path.stat().st_size for path in missing if path.suffix != SHARDS))
    return outcome | {"commit": done.oid}


@contextmanager
def no_bars() -> Iterator[None]:
    """Two libraries drawing bars on one terminal overwrite each other."""
    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not quiet:
            enable_progress_bars()


@contextmanager
def explained(api: HfApi, destination: Destination) -> Iterator[None]:
    """What the Hub's client raises, in one line that says what to do."""
    try:
        yield
    except LocalTokenNotFoundError:
        raise HubError(f"pushing to {destination.repo} needs a token, and none was found: {SIGN_IN}") from None
    except OfflineModeIsEnabled:
        raise HubError(
            f"pushing to {destination.repo} needs the network, but HF_HUB_OFFLINE is set: unset it"
        ) from None
    except HFValidationError as error:
        raise HubError(
            f"{destination.repo!r} is no name for a repository: {_clause(error)}. Allowed: USER/NAME"
        ) from None
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename is not None:  # of this machine
            raise
        raise _explain(error, api, destination) from error


def _clause(error: object) -> str:
    """What ends with a full stop of ours needs none of its own."""
    return str(error).rstrip(". ")


def _explain(error: Exception, api: HfApi, destination: Destination) -> HubError:
    # What happens in a thread of the client comes wrapped: the cause says more.
    while not isinstance(error, HTTPError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    continues = "The same command again continues where this one ended."
    if not isinstance(error, HfHubHTTPError):
        says = str(error) or type(error).__name__
        if (
            "xet-write-token" in says
        ):  # a mirror, or a Hub of one's own: the client does not try the older way by itself
            return HubError(f"{api.endpoint} does not take uploads by Xet ({says}): set HF_HUB_DISABLE_XET=1")
        unreachable = isinstance(error, HTTPError)
        what = f"cannot reach {api.endpoint}" if unreachable else f"pushing to {destination.repo} failed"
        return HubError(f"{what}: {_clause(says)}. Check the network. {continues}")
    status = error.response.status_code
    says = error.server_message or error.response.reason_phrase
    if status == 401:
        return HubError(f"{api.endpoint} does not accept the token ({says}): {SIGN_IN}")
    if status == 403:
        return HubError(
            f"the token may not write to {destination.repo} ({says}): use a name under your own user or under an "
            "organisation that lets you write, or a token with that permission"
        )
    if status in (409, 412):
        return HubError(
            f"{destination.repo} was changed by somebody else meanwhile ({says}): look at it, then push again"
        )
    return HubError(f"{api.endpoint} answered {status} ({says}) for {destination.repo}. {continues}")
