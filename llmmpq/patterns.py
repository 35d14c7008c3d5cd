"""The rule by which a person names linears: the same to pin their width and to keep them as they are."""

from __future__ import annotations

from fnmatch import fnmatchcase


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` (shell wildcards, case matters) names the linear: its whole name, or all of it after a dot.

    So `down_proj`, `layers.0.*` and `*.down_proj` all match `model.layers.0.mlp.down_proj`; `proj` does not.
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
