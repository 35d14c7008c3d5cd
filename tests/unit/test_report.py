"""The report on folders that no run makes: large, hostile, incomplete."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmmpq.digest import file_sha256
from llmmpq.errors import CheckpointError
from llmmpq.records import PlannedLinear, Scheme
from llmmpq.report import bit_map, charts, evidence, sections
from llmmpq.report.axis import axis_of
from llmmpq.report.evidence import Evidence, collect
from llmmpq.report.page import render, write_page
from tests.browser import Browser
from tests.page import Page

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny-llama-v1"
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HOSTILE = "</style></title><script>window.taken = 1</script>\"'><img src=x onerror='window.taken = 1'>&amp;\ud800"


def linear(block: int, role: str, bits: int) -> dict[str, Any]:
    scheme = Scheme(bits=bits, group_size=128)
    planned = PlannedLinear(shape=(1024, 4096), block=block, role=role, scheme=scheme)
    name = f"model.layers.{block}.{role}"
    entry = {"name": name, "block": block, "role": role, "shape": [1024, 4096]}
    return entry | scheme.to_json() | {"nbytes": planned.nbytes}


def make_evidence(num_blocks: int = 2, name: str = "user/model", **changes: Any) -> Evidence:
    linears = [
        linear(block, role, (2, 3, 4, 8)[(block + len(role)) % 4]) for block in range(num_blocks) for role in ROLES
    ]
    linears.append(linear(num_blocks, "lm_head", 4))
    nbytes, num_weights = sum(one["nbytes"] for one in linears), len(linears) * 1024 * 4096
    losses = {one["name"]: {"2": 0.01 * (1 + one["block"]), "3": 1e-3, "4": 1e-4, "8": 0.0} for one in linears}
    kept = 2_000_000
    folder = {
        "folder": f"somewhere/{name}",
        "layout_version": 1,
        "method": "iqp",
        "budget": {"kind": "avg_bits", "value": 3.5, "nbytes": nbytes},
        "bits_per_weight": 8 * nbytes / num_weights,
        "code_bits_per_weight": 3.2,
        "num_weights": num_weights,
        "quantized_nbytes": nbytes,
        "kept_nbytes": kept,
        "total_nbytes": nbytes + kept,
        "predicted_loss": 0.02,
        "optimality_gap": 0.001,
        "linears": linears,
        "problems": [],
        "verified": True,
        "fallbacks": [],
        "warnings": [],
        "kept": [{"name": "embed.weight", "shape": [1], "nbytes": kept, "reason": "embedding"}],
        "provenance": {"model": name, "llmmpq": "0.1.0", "model_files": {"model.safetensors": "ab" * 32}},
    }
    points = [
        {"nbytes": n, "total_nbytes": n + kept, "bits_per_weight": 8 * n / num_weights, "predicted_loss": 1 / n**2}
        for n in range(nbytes // 2, 2 * nbytes, nbytes // 4)
    ]
    known: dict[str, Any] = {
        "name": name,
        "folder": folder,
        "measured_kl": 0.018,
        "report": {
            "source_nbytes": 4 * nbytes,
            "sensitivity": {"kind": "kl", "num_tokens": 1024, "rounding_kl": 1e-5, "losses": losses},
            "linears": {},
        },
        "digests": {"model.safetensors": "cd" * 32},
        "recipe_yaml": f"model: {name!r}\ncalibration:\n  seed: 17\n",
        "curve": {"format": "llmmpq-pareto", "method": "iqp", "points": points},
        "results": {
            "perplexity": 12.5,
            "nll": math.log(12.5),
            "extra_nll": 0.03,
            "num_tokens": 8184,
            "window": 2048,
            "text": "a text",
            "baseline": {"model": name, "perplexity": 12.1, "nll": math.log(12.1)},
            "kl": {"mean": 0.02, "median": 0.01, "p90": 0.05, "p99": 0.2, "top1_agreement": 0.93, "noise_floor": 2e-5},
        },
    }
    return Evidence(**known | changes)


def with_folder(known: Evidence, **changes: Any) -> Evidence:
    return replace(known, folder={**known.folder, **changes})


def hostile() -> Evidence:
    """Names from a stranger, in every place that takes one, and as long as they like."""
    known = make_evidence(name=HOSTILE + "x" * 300)
    linears = [{**one, "name": HOSTILE + one["name"], "role": HOSTILE + "y" * 200} for one in known.folder["linears"]]
    curve: Mapping[str, Any] = known.curve or {}
    results: Mapping[str, Any] = known.results or {}
    losses = {one["name"]: {"2": 0.1, "3": 0.01} for one in linears}
    return replace(
        with_folder(
            known,
            linears=linears,
            method=HOSTILE,
            problems=[HOSTILE + "z" * 300],
            warnings=[HOSTILE],
            fallbacks=[HOSTILE],
            kept=[{"name": HOSTILE, "reason": HOSTILE, "nbytes": 1}],
        ),
        report={"sensitivity": {"losses": losses}, "linears": {linears[0]["name"]: {"algorithm": HOSTILE}}},
        recipe_yaml=HOSTILE,
        digests={HOSTILE: HOSTILE},
        curve={**curve, "method": HOSTILE},
        results={**results, "text": HOSTILE + "t" * 300, "bits_per_weight": 1.0, "results": {HOSTILE: {HOSTILE: 0.5}}},
    )


def test_the_page_is_well_formed_and_fetches_nothing() -> None:
    text = render(make_evidence())
    page = Page(text)
    assert page.mistakes == []
    assert len(page.ids) == len(set(page.ids))
    links = [address for address in page.addresses if address != "data:,"]
    assert links
    assert {address.removeprefix("#") for address in links} <= set(page.ids)
    assert not {name for name, _ in page.elements} & {"script", "img", "iframe", "object", "embed", "form"}
    assert [word for word in ("://", "url(", "@import") if word in text] == []
    policy = next(attributes for name, attributes in page.elements if attributes.get("http-equiv"))
    assert "default-src 'none'" in str(policy["content"])


def test_hostile_names_are_text_and_nothing_else() -> None:
    known = hostile()
    text = render(known)
    page = Page(text)
    assert page.mistakes == []
    assert not {name for name, _ in page.elements} & {"script", "img"}
    assert {name for _, attributes in page.elements for name in attributes if name.startswith("on")} == set()
    assert HOSTILE.replace("\ud800", "?") in page.text[""]  # the heading
    assert {"summary", "bits", "sensitivity", "curve", "divergence", "notes", "matrices", "provenance"} <= set(
        page.text
    )
    text.encode()  # can be written


def test_the_map_shows_every_matrix_with_its_width() -> None:
    known = make_evidence(num_blocks=80)
    page = Page(render(known))
    *panels, outside, _, _ = page.tables["bits"]
    seen = {
        (int(row[0]), role): int(bits)
        for panel in panels
        for row in panel[1:]
        for role, bits in zip(ROLES, row[1:], strict=True)
    }
    linears = known.folder["linears"]
    assert seen == {(one["block"], one["role"]): one["bits"] for one in linears if one["role"] != "lm_head"}
    assert outside == [["lm_head", "4"]]
    assert [len(panel) - 1 for panel in panels] == [27, 27, 26]
    assert [row[0] for row in panels[0][:2]] == ["block", "0"]


def test_groups_of_several_widths_are_a_texture() -> None:
    """Two matrices of one block with one role, which is what runs within a matrix will look like."""
    cell = bit_map.bits_cell([linear(0, "q_proj", 2), linear(0, "q_proj", 4)])
    assert [(run.bits, run.share) for run in cell.runs] == [(2, 0.5), (4, 0.5)]
    assert cell.text == "3.0"
    known = make_evidence()
    page = render(with_folder(known, linears=[*known.folder["linears"], linear(0, "q_proj", 8)]))
    assert 'class="mixed"' in page
    assert Page(page).mistakes == []


def test_the_sensitivity_of_every_matrix_is_told() -> None:
    known = make_evidence(num_blocks=3)
    page = Page(render(known))
    assert "1,024 tokens" in page.text["sensitivity"]
    rows = page.tables["matrices"][0]
    assert rows[0][-4:] == ["loss at 2", "loss at 3", "loss at 4", "loss at 8"]
    assert {row[0]: row[-4:] for row in rows[1:]} == {
        one["name"]: [f"{0.01 * (1 + one['block']):.4g}", "0.001", "0.0001", "0"] for one in known.folder["linears"]
    }
    view = charts.sensitivity(known)
    assert view is not None
    assert view.tracks[0].label == "3 · lm_head"  # the largest loss
    assert [mark.text for mark in view.tracks[0].marks] == ["2", "3", "4"]  # none where nothing is lost
    assert [mark.text for mark in view.tracks[0].marks if "chosen" in mark.kind] == ["4"]


def test_the_chosen_point_lies_on_the_curve_it_belongs_to() -> None:
    known = make_evidence()
    assert known.curve is not None
    point = known.curve["points"][2]
    view = charts.curve(with_folder(known, quantized_nbytes=point["nbytes"], predicted_loss=point["predicted_loss"]))
    assert view is not None
    assert view.chosen is not None
    assert (view.chosen["x"], view.chosen["y"]) == (view.points[2]["x"], view.points[2]["y"])
    assert [at["x"] for at in view.points] == sorted(at["x"] for at in view.points)
    assert [at["y"] for at in view.points] == sorted((at["y"] for at in view.points), reverse=True)


def test_a_loss_of_another_kind_is_not_drawn_on_the_curve() -> None:
    view = charts.curve(with_folder(make_evidence(), method="local"))
    assert view is not None
    assert view.chosen is None
    assert "not drawn" in view.remarks[0]


def test_predicted_and_measured_stand_on_one_axis() -> None:
    view = charts.divergence(make_evidence())
    assert view is not None
    places = {track.label: track.marks[0].at for track in view.tracks}
    assert places["Noise floor of the probe"] < places["Measured on the probe"] < places["Predicted by the plan"]
    assert places["Evaluation: median"] < places["Evaluation: p90"] < places["Evaluation: p99"]
    assert view.sentence == "On the probe, 0.90 times the predicted KL was measured."


@pytest.mark.parametrize(
    "results",
    [
        {"kl": {"mean": 0.02, "p99": 0.2, "top1_agreement": 0.93, "noise_floor": {"mean": 2e-5}}},
        {"divergence": {"kl_mean": 0.02, "kl_p99": 0.2, "top1_agreement": 0.93}, "noise_floor": {"kl_mean": 2e-5}},
    ],
)
def test_figures_of_an_evaluation_are_found_by_either_name(results: dict[str, Any]) -> None:
    known = make_evidence(results=results)
    view = charts.divergence(known)
    assert view is not None
    figures = {track.label: track.figure for track in view.tracks}
    assert (figures["Evaluation: mean"], figures["Evaluation: p99"]) == ("0.02", "0.2")
    assert figures["Noise floor of the evaluation"] == "2e-5"
    assert "93.00 %" in Page(render(known)).text["divergence"]


def test_figures_of_lm_eval_are_shown_beside_the_baselines() -> None:
    found = {"results": {"arc_easy": {"acc,none": 0.61, "acc_stderr,none": 0.01, "alias": "arc_easy"}}}
    known = make_evidence(results=found | {"baseline": {"results": {"arc_easy": {"acc,none": 0.63}}}})
    page = Page(render(known))
    assert ["arc_easy: acc", "0.6100", "0.6300"] in page.tables["divergence"][-1]
    assert not any("stderr" in row[0] for row in page.tables["divergence"][-1])


def test_figures_of_another_model_are_noticed() -> None:
    results = {"perplexity": 3.0, "bits_per_weight": 2.5}
    assert "2.500 true bits" in Page(render(make_evidence(results=results))).text["divergence"]


def test_a_digest_decides_whose_figures_they_are() -> None:
    same = {"perplexity": 3.0, "digest": "a" * 64, "bits_per_weight": 2.5}
    known = make_evidence(results=same, digest="a" * 64)
    assert "another model" not in Page(render(known)).text["divergence"]
    assert "These figures are of another model" in Page(render(replace(known, digest="b" * 64))).text["divergence"]
    assert "2.500 true bits" in Page(render(replace(known, digest=None))).text["divergence"]


def copy_of_golden(folder: Path) -> Path:
    folder.mkdir()
    for path in GOLDEN.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_the_page_names_no_place_of_this_machine(tmp_path: Path) -> None:
    folder = copy_of_golden(tmp_path / "tiny")
    assert "/tmp/" in (folder / "recipe.yaml").read_text()
    baseline = {"model": "/home/ada/base", "perplexity": 7.0}
    results = {"perplexity": 7.5, "model": "/home/ada/q", "text": "/home/ada/held.txt", "baseline": baseline}
    (folder / "eval.json").write_text(json.dumps(results | {"digest": file_sha256(folder / "digests.json")}))
    report = json.loads((folder / "report.json").read_text())
    report["warnings"].append(f"{report_model(folder)}/x is odd")
    (folder / "report.json").write_text(json.dumps(report))
    found = collect(folder)
    text = render(found)
    assert "/tmp/" not in text
    assert "/home" not in text
    page = Page(text)
    assert "llama at" in page.text[""]
    assert "llama/x is odd" in page.text["notes"]
    assert "of held.txt" in page.text["divergence"] or "On held.txt" in page.text["divergence"]
    assert "another model" not in page.text["divergence"]
    assert {"model: llama", "  source: c.txt"} <= set(found.recipe_yaml.splitlines())


def report_model(folder: Path) -> str:
    return str(json.loads((folder / "plan.json").read_text())["provenance"]["model"])


def test_only_a_report_is_written_over(tmp_path: Path) -> None:
    folder = copy_of_golden(tmp_path / "tiny")
    for name in ("plan.json", "config.json"):
        before = (folder / name).read_bytes()
        with pytest.raises(CheckpointError, match="is not a report of llmmpq"):
            write_page(folder, folder / name)
        assert (folder / name).read_bytes() == before
    out = tmp_path / "page.html"
    write_page(folder, out)
    page = out.read_bytes()
    out.write_bytes(page.replace(b"<h1>", b"<h1>Old "))
    write_page(folder, out)
    assert out.read_bytes() == page


def test_what_is_missing_is_said_with_how_to_get_it() -> None:
    known = make_evidence(measured_kl=None, report={}, digests={}, recipe_yaml="", curve=None, results=None)
    page = Page(render(with_folder(known, predicted_loss=None, optimality_gap=None, provenance={}, budget={})))
    assert page.mistakes == []
    assert "holds no measurement" in page.text["sensitivity"]
    assert "llmmpq plan MODEL --pareto" in page.text["curve"]
    assert "records no KL" in page.text["divergence"]
    assert "llmmpq eval DIR --baseline MODEL" in page.text["divergence"]
    assert "Fallbacks" in page.text["notes"]


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1e-9, 1e300])
def test_odd_figures_do_no_harm(value: float) -> None:
    known = with_folder(make_evidence(measured_kl=value), predicted_loss=value, optimality_gap=value)
    results = {"perplexity": value, "nll": "a word", "kl": {"mean": value, "p99": None}, "baseline": [1]}
    losses = {one["name"]: {"2": value, "3": "?", "x": 1.0} for one in known.folder["linears"]}
    report = {"sensitivity": {"losses": losses, "num_tokens": "?"}, "source_nbytes": value}
    page = Page(render(replace(known, results=results, report=report)))
    assert page.mistakes == []
    assert not re.search(r"\bnan\b|\binf\b", "".join(page.text.values()))


def test_problems_fallbacks_and_warnings_are_not_overlooked() -> None:
    told = {"problems": ["shard 1 is damaged"], "fallbacks": ["q: rounded"], "warnings": ["few tokens", "more"]}
    page = Page(render(with_folder(make_evidence(), **told)))
    assert "shard 1 is damaged" in page.text[""]
    assert "1 fallback and 2 warnings" in page.text[""]
    assert all(sentence in page.text["notes"] for sentence in ("q: rounded", "few tokens", "more"))


def test_provenance_names_versions_digests_text_and_seed() -> None:
    text = Page(render(make_evidence())).text["provenance"]
    assert all(part in text for part in ("llmmpq 0.1.0", "ab" * 32, "cd" * 32, "user/model", "17"))


def test_a_folder_of_an_older_llmmpq_has_a_page_too() -> None:
    page = Page(render(collect(GOLDEN)))
    assert page.mistakes == []
    assert "holds no measurement" in page.text["sensitivity"]
    assert "Every file of this folder had the digest" in page.text["provenance"]


def test_a_curve_or_figures_in_the_folder_are_found(tmp_path: Path) -> None:
    for path in GOLDEN.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / evidence.RESULTS_FILE).write_text('{"perplexity": 7.5}')
    points = '[{"nbytes": 1, "total_nbytes": 2, "bits_per_weight": 2.5, "predicted_loss": 0.1}]'
    (tmp_path / evidence.CURVE_FILE).write_text(f'{{"format": "llmmpq-pareto", "method": "iqp", "points": {points}}}')
    found = collect(tmp_path)
    assert (found.results, found.folder["problems"]) == ({"perplexity": 7.5}, [])
    assert Page(render(found)).mistakes == []
    (tmp_path / evidence.CURVE_FILE).write_text('{"format": "llmmpq-pareto", "points": [{"nbytes": "many"}]}')
    with pytest.raises(CheckpointError, match=r"a point is .*many.* expected numbers"):
        collect(tmp_path)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values", [[1.0], [1e-7, 3.0], [0.0, 1.0], [-1.0, 2.0], [5e8, 5e8 + 1], [math.inf, 0.2, 0.3], []]
)
def test_an_axis_shows_what_it_is_made_for(values: list[float], log: bool) -> None:
    axis = axis_of(values, log=log)
    shown = sorted(value for value in values if math.isfinite(value) and (value > 0 or not log))
    places = [axis.percent(value) for value in shown]
    assert places == sorted(places)
    assert all(0 < place < 100 for place in places)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 8
    assert [at for at, _ in ticks] == sorted(at for at, _ in ticks)
    assert len({label for _, label in ticks}) == len(ticks)


def test_roles_lose_an_ending_that_they_share() -> None:
    assert bit_map.short_names(ROLES) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert bit_map.short_names(["fc1", "out_proj"]) == ["fc1", "out_proj"]


def test_kinds_of_matrices_say_what_they_got() -> None:
    rows = sections.kinds(make_evidence(num_blocks=4))
    assert [row["short"] for row in rows] == ["q", "k", "v", "o", "gate", "up", "down", "lm_head"]
    assert rows[0] == {"short": "q", "role": "q_proj", "bits": "4.25", "share": "14 %"}


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["large", "hostile"])
def test_no_page_is_wider_than_its_screen(name: str, width: int, chromium: Browser, tmp_path: Path) -> None:
    known = make_evidence(num_blocks=80) if name == "large" else hostile()
    path = tmp_path / "page.html"
    path.write_text(render(known), encoding="utf-8")
    chromium.open(path.as_uri(), width=width)
    assert chromium.evaluate("document.scrollingElement.scrollWidth") <= width
    assert chromium.complaints() == []
    assert chromium.requests() == [path.as_uri()]
    assert chromium.evaluate("window.taken") is None


# Matrices of several widths


def with_mixed(known: Evidence) -> Evidence:
    """The first matrix has three groups in four at 2 bits, one at 3, and was measured so."""
    first, *others = known.folder["linears"]
    first = {**first, "bits": {"2": 24, "3": 8}}
    losses = dict(known.report["sensitivity"]["losses"])
    losses[first["name"]] = {"2": 0.5, "2.25": 0.2, "4": 0.01}
    report = {**known.report, "sensitivity": {**known.report["sensitivity"], "losses": losses}}
    return replace(with_folder(known, linears=[first, *others]), report=report)


def test_a_matrix_of_several_widths_is_shown_by_its_mean_and_its_shares():
    known = with_mixed(make_evidence())
    first = known.folder["linears"][0]
    cell = bit_map.bits_cell([first])
    assert cell.text == "2.2"
    assert [(run.bits, run.share) for run in cell.runs] == [(2, 0.75), (3, 0.25)]
    assert "2.2 (75 % 2, 25 % 3) bits, groups of 128" in cell.title
    assert sections.matrices(known)[0]["bits"] == "2.2 (75 % 2, 25 % 3)"
    shown = charts.sensitivity(known)
    assert shown is not None
    assert 2.25 in shown.widths
    track = next(track for track in shown.tracks if track.figure == "2.2")
    assert [mark.kind for mark in track.marks if "chosen" in mark.kind] == ["w2 chosen"]
    total = sum(part["share"] for part in sections.widths(known))
    assert total == pytest.approx(100)
    page = render(known)
    assert "loss at 2.25" in page
    assert "2.2 (75 % 2, 25 % 3)" in page
