"""From evidence to one HTML file. Jinja escapes whatever the folder says: names in it may come from anyone.

The page forbids itself every request (its Content-Security-Policy), so that it is safe to open wherever it came from,
and holds no time and no place: equal folders give equal pages.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined

from llmmpq import __version__
from llmmpq.errors import CheckpointError
from llmmpq.model.checkpoint import write_text
from llmmpq.report import charts, figures, sections
from llmmpq.report.evidence import Evidence, collect

PAGE_FILE, STYLE_FILE = "page.html", "style.css"
GENERATOR, LONGEST_HEAD = b'<meta name="generator" content="llmmpq ', 4096


def write_page(folder: Path, out: Path, *, pareto: Path | None = None, results: Path | None = None) -> Evidence:
    """Write the page on a quantized folder, and return what it was made from."""
    if out.is_dir():
        raise CheckpointError(f"--out {out} is a folder: name a file in it, such as {out / 'report.html'}")
    if out.exists() and not _is_report(out):
        raise CheckpointError(
            f"{out} exists and is not a report of llmmpq: it is not written over. Name another file with --out"
        )
    evidence = collect(folder, pareto=pareto, results=results)
    page = render(evidence)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder of --out {out}: {error.strerror}") from None
    write_text(out, page)
    return evidence


def _is_report(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return GENERATOR in stream.read(LONGEST_HEAD)
    except OSError:
        return False


def render(evidence: Evidence) -> str:
    environment = Environment(
        loader=FunctionLoader(_read),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"figure": figures.figure}
    page = environment.get_template(PAGE_FILE).render(
        evidence=evidence,
        folder=evidence.folder,
        sections=sections,
        charts=charts,
        style=_read(STYLE_FILE),
        version=__version__,
    )
    # JSON may hold halves of a character, which no file can.
    return page.encode("utf-8", "replace").decode()


def _read(name: str) -> str:
    return (files("llmmpq.report") / name).read_text(encoding="utf-8")
