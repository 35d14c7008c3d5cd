"""`llmmpq report` on a run of the demo: what the page says is what the folder holds, and a real browser shows it."""

import json
import shutil
from pathlib import Path

import pytest

from llmmpq.pipeline import quantize_model, trace_curve
from llmmpq.recipe import load_recipe
from tests.browser import Browser
from tests.e2e.running import digests, read_plan, run_here
from tests.page import Page

FAST = {
    "budget.avg_bits": 3.5,
    "calibration.tokens": 512,
    "calibration.window": 64,
    "measurement.tokens": 64,
    "measurement.quantizer": "rtn",
    "allocation.method": "additive",
    "quantizer.sweeps": 0,
    "run.threads": 1,
}
OPTIONS = ("2", "2.5", "3", "3.5", "4", "8")  # mean bits
RESULTS = {
    "model": "demo-quantized",
    "window": 1024,
    "num_tokens": 8184,
    "nll": 5.1498,
    "perplexity": 172.3934,
    "text": "packaged held-out text",
    "baseline": {"model": "demo", "nll": 5.1459, "perplexity": 171.7302, "total_nbytes": 11540992},
    "extra_nll": 0.0039,
    "kl": {"mean": 0.007, "median": 0.003, "p90": 0.015, "p99": 0.06, "top1_agreement": 0.96, "noise_floor": 5e-5},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the quantized demo in `out`, its curve in `curve`, figures in `eval.json`."""
    folder = tmp_path_factory.mktemp("report")
    recipe = load_recipe("demo").override(FAST)
    quantize_model(recipe, out=folder / "out", work_dir=folder / "work")
    trace_curve(recipe, 6, out=folder / "curve", work_dir=folder / "work")
    (folder / "eval.json").write_text(json.dumps(RESULTS))
    return folder


@pytest.fixture
def arguments(made: Path) -> list[object]:
    return ["report", made / "out", "--pareto", made / "curve" / "pareto.json", "--results", made / "eval.json"]


def test_the_page_says_what_the_folder_holds(
    made: Path, arguments: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(made / "out")
    outcome = run_here([*arguments, "--out", tmp_path / "page.html", "--json"], capsys)
    assert (outcome.code, outcome.stderr) == (0, "")
    told = json.loads(outcome.stdout)
    assert (told["has_sensitivity"], told["has_curve"], told["has_results"]) == (True, True, True)
    assert told["problems"] == []
    assert digests(made / "out") == before  # nothing is written there
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.mistakes == []
    plan, report = read_plan(made / "out"), json.loads((made / "out" / "report.json").read_text())
    assert f"{plan['bits_per_weight']:.3f}" in page.text["summary"]
    assert f"{plan['predicted_loss']:.4g}" in page.text["summary"]
    assert f"{report['source_nbytes'] / 1e6:.2f} MB" in page.text["summary"]
    rows = page.tables["matrices"][0][1:]
    assert {row[0]: row[2] for row in rows} == {name: _shown(one["bits"]) for name, one in plan["linears"].items()}
    assert {"%" in row[2] for row in rows} == {True, False}  # of two widths, and of one
    losses = report["sensitivity"]["losses"]
    assert list(losses) == list(plan["linears"])
    first = rows[0][0]
    assert page.tables["matrices"][0][0][-len(OPTIONS) :] == [f"loss at {bits}" for bits in OPTIONS]
    assert rows[0][-len(OPTIONS) :] == [f"{losses[first][bits]:.4g}".replace("e-0", "e-") for bits in OPTIONS]
    assert losses[first]["2"] > losses[first]["8"] > 0
    assert text.count('class="dot"') == len(json.loads((made / "curve" / "pareto.json").read_text())["points"])
    assert "172.3934" in page.text["divergence"]
    digest = json.loads((made / "out" / "digests.json").read_text())["model.safetensors"]
    assert digest in page.text["provenance"]


def _shown(bits: int | dict[str, int]) -> str:
    if isinstance(bits, int):
        return str(bits)
    total = sum(bits.values())
    mean = sum(int(width) * count for width, count in bits.items()) / total
    return f"{mean:.1f} ({', '.join(f'{100 * count / total:.0f} % {width}' for width, count in bits.items())})"


def test_equal_folders_give_equal_pages(
    made: Path,
    arguments: list[object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pages = []
    for place in ("a", "b"):
        shutil.copytree(made / "out", tmp_path / place / "out")
        monkeypatch.chdir(tmp_path / place)
        assert run_here(["report", "out", *arguments[2:]], capsys).code == 0
        pages.append((tmp_path / place / "out-report.html").read_bytes())
    assert pages[0] == pages[1]
    assert str(tmp_path).encode() not in pages[0]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_without_complaint_or_sideways_scrolling(
    width: int,
    dark: bool,
    arguments: list[object],
    chromium: Browser,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "page.html"
    assert run_here([*arguments, "--out", path], capsys).code == 0
    chromium.open(path.as_uri(), width=width, dark=dark)
    assert chromium.complaints() == []
    assert chromium.requests() == [path.as_uri()]
    # A number, not innerWidth: a phone zooms out until a page that is too wide fits.
    assert chromium.evaluate("document.scrollingElement.scrollWidth") <= width
    chromium.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert chromium.evaluate("document.scrollingElement.scrollWidth") <= width
    heights = chromium.evaluate("[...document.querySelectorAll('section')].map(one => one.offsetHeight)")
    assert len(heights) == 8
    assert min(heights) > 60
    paper = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(18, 22, 26)" if dark else "rgb(251, 251, 249)")
    chromium.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


# Of the text colours that are used on each other: WCAG asks for 4.5.
CONTRAST = """
[...document.querySelectorAll('td, th, p, li, dt, dd, summary, .mark, .flag, .tick, .x, .y, .bar i')].map(one => {
  const lum = text => { const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  if (![...one.childNodes].some(node => node.nodeType === 3 && node.data.trim())) return [21, ''];
  const none = 'rgba(0, 0, 0, 0)';
  let under = one, back = none;
  for (; under && back === none; under = under.parentElement) back = getComputedStyle(under).backgroundColor;
  const [a, b] = [lum(getComputedStyle(one).color), lum(back)].sort((x, y) => y - x);
  return [(a + 0.05) / (b + 0.05), one.className + ' ' + one.textContent.slice(0, 30)];
}).sort((x, y) => x[0] - y[0])[0]
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(
    dark: bool, arguments: list[object], chromium: Browser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "page.html"
    assert run_here([*arguments, "--out", path], capsys).code == 0
    chromium.open(path.as_uri(), width=1280, dark=dark)
    ratio, where = chromium.evaluate(CONTRAST)
    assert ratio >= 4.5, where


def test_what_is_missing_is_told(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(["report", made / "out", "--out", tmp_path / "page.html"], capsys)
    assert outcome.code == 0
    assert "--pareto takes what" in outcome.stdout
    assert "--results takes what" in outcome.stdout


def test_a_changed_folder_is_reported_as_changed(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "out", tmp_path / "out")
    with (tmp_path / "out" / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x01")
    outcome = run_here(["report", tmp_path / "out", "--out", tmp_path / "page.html"], capsys)
    assert "problem: model.safetensors is not the file that was written" in outcome.stdout
    assert "model.safetensors is not the file that was written" in Page((tmp_path / "page.html").read_text()).text[""]


def test_mistakes_are_one_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curve = json.loads((made / "curve" / "pareto.json").read_text())
    curve["provenance"]["model_files"]["config.json"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(curve))
    (tmp_path / "empty.json").write_text("{}")
    for flags, sentence in (
        (["--pareto", tmp_path / "other.json"], "is the curve of another model"),
        (["--pareto", made / "eval.json"], "is not a curve"),
        (["--pareto", tmp_path / "nothing.json"], "cannot read"),
        (["--results", tmp_path / "empty.json"], "holds no 'perplexity'"),
        (["--out", tmp_path], "is a folder: name a file in it"),
    ):
        outcome = run_here(["report", made / "out", *flags], capsys)
        assert (outcome.code, outcome.stdout) == (2, "")
        assert outcome.stderr.count("\n") == 1
        assert sentence in outcome.stderr
    outcome = run_here(["report", tmp_path], capsys)
    assert (outcome.code, "is not a model quantized by llmmpq" in outcome.stderr) == (2, True)


def test_a_plan_file_carries_no_measurement(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is in the folder depends on the inputs alone, not on what a work folder happens to hold."""
    recipe = load_recipe("demo").override(FAST)
    quantize_model(recipe, out=tmp_path / "out", work_dir=made / "work", plan_file=made / "out" / "plan.json")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["sensitivity"] is None
    assert run_here(["report", tmp_path / "out", "--out", tmp_path / "page.html"], capsys).code == 0
    assert "The plan was given as a file" in Page((tmp_path / "page.html").read_text()).text["sensitivity"]
