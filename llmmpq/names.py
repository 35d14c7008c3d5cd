"""Names of models and texts without the folders they lie in: what is written for others shows nobody's machine.

A text is told from a data set by its `hf:`. A model may be a Hub id, USER/NAME: a relative path of that very form is
taken for one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

HUB_TEXT = "hf:"


def model_name(name: str) -> str:
    return _last(name) if _is_path(name) or name.count("/") > 1 else name


def text_name(name: str) -> str:
    return _last(name) if not name.startswith(HUB_TEXT) and (_is_path(name) or "/" in name) else name


def shortened(provenance: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, str]:
    """Each place of this machine that a quantized folder names, and the name that is left of it."""
    found = {}
    for of in (provenance, recipe):
        for name, short in (
            (of.get("model"), model_name),
            *((_get(of.get(part), "source"), text_name) for part in ("calibration", "probe")),
            (_get(of.get("evaluation"), "text"), text_name),
        ):
            if isinstance(name, str) and short(name) != name:
                found[name] = short(name)
    return found


def without_places(value: Any, places: Mapping[str, str]) -> Any:
    """A JSON value in whose texts each of the places is shortened, within sentences too."""
    if isinstance(value, str):
        for place in sorted(places, key=len, reverse=True):
            value = re.sub(rf"(?<![\w./~-]){re.escape(place)}(?!\w)", places[place].replace("\\", r"\\"), value)
        return value
    if isinstance(value, Mapping):
        return {key: without_places(entry, places) for key, entry in value.items()}
    return [without_places(entry, places) for entry in value] if _is_list(value) else value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def _is_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or PureWindowsPath(name).is_absolute()


def _last(name: str) -> str:
    kind = PureWindowsPath if PureWindowsPath(name).is_absolute() and not name.startswith("/") else PurePosixPath
    return kind(name).name or name
