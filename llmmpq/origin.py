"""What was quantized, as far as a folder's provenance and the Hub can tell: for the model card.

A wrong original is worse than none: a name that looks like a Hub id may have been a folder on the machine that
quantized, or its files may have changed since. So the files' digests in the provenance are compared with the Hub's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from llmmpq.errors import HubError
from llmmpq.evaluate.card import CARD_FILE, Origin
from llmmpq.model.source import DEMO

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def find_origin(provenance: Mapping[str, Any], *, base_model: str | None, api: HfApi) -> tuple[Origin, list[str]]:
    """The origin, and what a person should know about it. `base_model` is what the person says it is."""
    asked = base_model or provenance.get("model")
    if not isinstance(asked, str) or not asked:
        return Origin(name="a model that was not recorded"), [_unnamed("its plan does not say what was quantized")]
    if base_model is None and asked == DEMO:
        return Origin(name="the demo model that comes along with llmmpq"), []
    if HUB_ID.fullmatch(asked):
        try:
            # A revision of the provenance belongs to the model it names, not to one that is given now.
            revision = provenance.get("revision") if base_model is None else None
            info = api.model_info(asked, revision=revision, files_metadata=True)
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
            if base_model is not None:
                raise HubError(f"--base-model {base_model} is not on the Hub, or is private: give USER/NAME") from None
        else:
            changed = _changed(info.siblings or [], provenance.get("model_files"))
            if base_model is None and changed:
                why = f"{asked} on the Hub is not what was quantized: {changed} differs"
                return Origin(name=asked), [_unnamed(why)]
            licence = _licence(info.card_data)
            return Origin(name=asked, hub_id=asked, **licence), [] if licence else [_unlicensed(f"{asked} names none")]
    elif base_model is not None:
        raise HubError(f"--base-model is {base_model!r}; allowed: USER/NAME of a model on the Hub")
    return _local_origin(Path(asked).expanduser())


def _local_origin(folder: Path) -> tuple[Origin, list[str]]:
    notes = [_unnamed(f"{folder} was quantized, which the Hub does not know")]
    licence = {}
    if (folder / CARD_FILE).is_file():
        try:
            licence = _licence(ModelCard.load(folder / CARD_FILE, ignore_metadata_errors=True).data)
        except (ValueError, OSError):  # a README that is no card
            licence = {}
    if not licence:
        notes.append(_unlicensed(f"{folder / CARD_FILE} names none"))
    return Origin(name=folder.name, **licence), notes


def _licence(data: ModelCardData | Any) -> dict[str, str]:
    if data is None or not isinstance(data.get("license"), str):
        return {}
    found = {key: data.get(key) for key in ("license", "license_name", "license_link")}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _changed(siblings: list[Any], quantized: Any) -> str | None:
    """A file of weights that was quantized and that the Hub does not have, or has otherwise."""
    there = {file.rfilename: file.lfs.sha256 for file in siblings if file.lfs is not None}
    for name, digest in (quantized if isinstance(quantized, Mapping) else {}).items():
        if name.endswith(".safetensors") and there.get(name) != digest:
            return str(name)
    return None


def _unnamed(why: str) -> str:
    return f"the card names no base_model ({why}); --base-model USER/NAME states it"


def _unlicensed(why: str) -> str:
    return f"the card names no licence ({why}); a quantized model stays under the licence of the original"
