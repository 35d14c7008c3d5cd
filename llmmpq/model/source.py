"""MODEL, as a person names it, to a folder on this machine: `demo`, a local folder, or a Hub id."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llmmpq.errors import CheckpointError

DEMO = "demo"
# Weights only as safetensors: a pickle would never be read, so it is never downloaded.
# The same weights again in another program's naming, and whatever lies in subfolders.
SKIPPED_PATTERNS = ("consolidated*", "*/*")
DOWNLOAD_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
# Small files that belong to a model but not to its weights: copied to the output as they are.
COMPANION_PATTERNS = (
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "LICENSE*",
)


def is_hub_name(model: str) -> bool:
    """Whether `resolve_model` asks the Hub: neither the packaged model nor a folder here."""
    try:
        return model != DEMO and not Path(model).expanduser().is_dir()
    except RuntimeError:  # ~nobody
        return not Path(model).is_dir()


def resolve_model(model: str, *, revision: str | None = None) -> Path:
    """The folder that holds MODEL, downloading it when it is a Hub id."""
    if model == DEMO:
        return Path(str(files("llmmpq") / "assets" / "demo"))
    try:
        path = Path(model).expanduser()
    except RuntimeError:  # ~nobody
        path = Path(model)
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"{path} is a folder on this machine, which has no revision {revision!r}")
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} has no config.json: not a Hugging Face model folder")
        return path.resolve()
    looks_local = path.exists() or model.startswith((".", "/", "~", os.sep)) or model.count("/") != 1
    if looks_local:
        kind = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"MODEL {model!r} {kind}: give a model folder, a Hub id like 'user/name', or '{DEMO}'")
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=list(DOWNLOAD_PATTERNS),
                ignore_patterns=list(SKIPPED_PATTERNS),
            )
        )
    except GatedRepoError:
        raise CheckpointError(
            f"{model} is gated: accept its licence on its Hub page, then `hf auth login` or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{model} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{model!r} is neither a folder here nor a model on the Hub (or it is private: `hf auth login`)"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{model!r} is not a folder here and cannot be fetched from the Hub: {reason}. "
            "Check the name and the network, or download it first and give the folder."
        ) from None


def companion_files(folder: Path) -> list[Path]:
    """Tokenizer, generation settings and licence, in sorted order."""
    found = {path for pattern in COMPANION_PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.suffix not in (".safetensors", ".bin", ".pt", ".pth", ".py"))
