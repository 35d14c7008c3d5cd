"""A quantized folder onto the Hub, with its model card. The same command again continues."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from llmmpq.bitmap import bit_map, draw
from llmmpq.digest import file_sha256
from llmmpq.errors import CheckpointError
from llmmpq.evaluate.card import CARD_FILE, MAP_FILE, Origin, is_sealed, write_card
from llmmpq.evaluate.results import RESULTS_FILE, checked_results, other_model
from llmmpq.hub import Branch, Destination, explained, is_there, look, make, no_bars, refuse_other_content, upload
from llmmpq.inspection import inspect_folder, recipe_of
from llmmpq.model.checkpoint import write_text
from llmmpq.names import shortened
from llmmpq.origin import find_origin
from llmmpq.output import DIGESTS_FILE, PLAN_FILE, RECIPE_FILE, read_object
from llmmpq.progress import Progress, Silent


def push_folder(
    folder: Path,
    destination: Destination,
    *,
    results: Path | None = None,
    base_model: str | None = None,
    message: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the card of a quantized folder and publish the folder. `results` is what `llmmpq eval --json` printed."""
    progress = progress or Silent()
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist: push a folder that `llmmpq quantize` wrote")
    for name in (PLAN_FILE, DIGESTS_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}: push a folder that `llmmpq quantize` wrote")
    api = HfApi()
    with explained(api, destination), no_bars():
        branch = look(api, destination)
        refuse_other_content(branch, destination, folder)
        found = _verified(folder, progress)
        origin, notes = find_origin(found["provenance"], base_model=base_model, api=api)
        notes += _write_card(folder, found, results, name=destination.repo, origin=origin)
        notes += _private_names(folder, found["provenance"])
        branch = make(api, destination, branch)
        files = _published(folder)
        kept, more = _edited_there(api, destination, branch, folder)
        outcome = upload(
            api,
            destination,
            branch,
            [path for path in files if path.name not in kept],
            message=message or f"{found['bits_per_weight']:.3f} bits per weight, by llmmpq",
            progress=progress,
        )
    return {
        "folder": str(folder),
        "repo": destination.repo,
        "url": f"{api.endpoint}/{destination.repo}" + (f"/tree/{destination.branch}" if destination.revision else ""),
        "revision": destination.branch,
        **outcome,
        "notes": notes + more,
    }


def _verified(folder: Path, progress: Progress) -> dict[str, Any]:
    nbytes = sum(
        (folder / name).stat().st_size for name in read_object(folder / DIGESTS_FILE) if _is_file(folder, name)
    )
    with progress.task("compare digests", nbytes, "bytes") as advance:
        found = inspect_folder(folder, advance=advance)
    if problems := found["problems"]:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise CheckpointError(
            f"{folder} is damaged: {problems[0]}{more}. Nothing was pushed; quantize again with --overwrite"
        )
    return found


def _is_file(folder: Path, name: str) -> bool:
    return Path(name).name == name and (folder / name).is_file()


def _write_card(
    folder: Path, found: Mapping[str, Any], results: Path | None, *, name: str, origin: Origin
) -> list[str]:
    """The card, its picture and the results it quotes, into the folder. A card that a person edited stays."""
    notes = []
    kept = folder / RESULTS_FILE
    source = results or (kept if kept.is_file() else None)
    measured = None if source is None else _read_results(source, found)
    try:
        if measured is not None:  # what lay there already may name folders of this machine
            write_text(kept, json.dumps(measured, indent=2) + "\n")
        drawn = draw(folder / MAP_FILE, bit_map(found["linears"]), title=f"bits of {name.rpartition('/')[2]}")
        card = folder / CARD_FILE
        if card.is_file() and not is_sealed(card.read_text(encoding="utf-8")):
            notes.append(f"{card} was edited: it is pushed as it is; without it a new one would be written")
        else:
            write_text(
                card,
                write_card(
                    found,
                    name=name,
                    origin=origin,
                    digests=read_object(folder / DIGESTS_FILE),
                    results=measured,
                    has_picture=drawn,
                ),
            )
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot write the card into {folder}: {error}") from None
    if not drawn:
        notes.append(f"matplotlib is not installed, so {MAP_FILE} is not drawn: pip install 'llmmpq[plot]'")
    if measured is None:
        notes.append("the card says nothing about quality: give --results with what `llmmpq eval --json` printed")
    return notes


def _read_results(path: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    results = checked_results(read_object(path), path)
    if why := other_model(results, found, file_sha256(Path(found["folder"]) / DIGESTS_FILE)):
        raise CheckpointError(f"{path} was measured on another model than {found['folder']}: {why}")
    return results


def _private_names(folder: Path, provenance: Mapping[str, Any]) -> list[str]:
    paths = shortened(provenance, recipe_of(folder))
    if not paths:
        return []
    return [f"{RECIPE_FILE} and {PLAN_FILE} name {' and '.join(paths)} of this machine: they are published as they are"]


def _published(folder: Path) -> list[Path]:
    """What llmmpq wrote, and nothing else that may lie there."""
    names = [*read_object(folder / DIGESTS_FILE), DIGESTS_FILE, CARD_FILE, MAP_FILE, RESULTS_FILE]
    return [folder / name for name in names if (folder / name).is_file()]


def _edited_there(
    api: HfApi, destination: Destination, branch: Branch, folder: Path
) -> tuple[frozenset[str], list[str]]:
    """A card that was edited on the Hub is not written over by one that nobody edited here."""
    there = branch.files.get(CARD_FILE)
    ours = folder / CARD_FILE
    if there is None or branch.is_copy or destination.overwrite or is_there(there, ours):
        return frozenset(), []
    if not is_sealed(ours.read_text(encoding="utf-8")):
        return frozenset(), []
    path = api.hf_hub_download(destination.repo, CARD_FILE, revision=branch.commit)
    if is_sealed(Path(path).read_text(encoding="utf-8")):
        return frozenset(), []
    note = f"{CARD_FILE} was edited on the Hub and stays; --overwrite replaces it"
    return frozenset({CARD_FILE}), [note]
