"""What a model card says, with everything known and with nothing known; and the bit map it shows."""

import sys
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from llmmpq.bitmap import as_text, bit_map, draw
from llmmpq.evaluate.card import Origin, write_card
from llmmpq.model import source
from llmmpq.origin import find_origin

ROLES = ("q_proj", "down_proj")
FOUND = {
    "method": "iqp",
    "bits_per_weight": 3.494357,
    "code_bits_per_weight": 3.194,
    "total_nbytes": 4_164_864,
    "quantized_nbytes": 2_064_864,
    "kept_nbytes": 2_100_000,
    "source_nbytes": 11_540_992,
    "layout_version": 1,
    "predicted_loss": 0.0057,
    "optimality_gap": 0.01,
    "measured_kl": 0.0123,
    "fallbacks": [],
    "warnings": ["calibration was\nthin"],
    "provenance": {
        "llmmpq": "0.1.0",
        "model": "/home/ada/models/base",
        "revision": None,
        "calibration": {"source": "/home/ada/text.txt", "num_tokens": 8192},
    },
    "linears": [
        {"block": block, "role": role, "bits": bits, "group_size": 64, "symmetric": False}
        for block, widths in enumerate([(2, 4), (3, 4), (3, 4)])
        for role, bits in zip(ROLES, widths, strict=True)
    ],
}
RESULTS = {
    "perplexity": 12.3456789,
    "nll": 2.5133,
    "extra_nll": 0.0234,
    "num_tokens": 8184,
    "window": 2048,
    "text": "/home/ada/heldout.txt",
    "baseline": {"perplexity": 12.0, "nll": 2.4849},
    "divergence": {"kl_mean": 0.0211, "kl_median": 0.0105, "kl_p90": 0.0505, "kl_p99": 0.2, "top1_agreement": 0.9325},
    "noise_floor": {"kl_mean": 0.00012, "top1_agreement": 0.999},
}
DIGESTS = {"model.safetensors": "ab" * 32, "config.json": "cd" * 32}


def card(origin: Origin, **changes: object) -> str:
    found = FOUND | changes.pop("found", {})  # type: ignore[operator]
    given = {"results": RESULTS, "has_picture": True} | changes
    return write_card(found, name="user/tiny", origin=origin, digests=DIGESTS, **given)  # type: ignore[arg-type]


def test_a_card_with_everything():
    text = card(Origin(name="org/base", hub_id="org/base", license="apache-2.0"))
    assert ModelCard(text).data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "library_name": "llmmpq",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["llmmpq", "quantized", "mixed-precision", "3.49-bit"],
    }
    for line in (
        "| True bits | 3.494 per quantized weight: codes, scales and zeros, as on disk |",
        "| Code bits | 3.194: codes alone, without that overhead |",
        "| Size | 11.54 MB -> 4.16 MB, 2.77 times smaller |",
        "| Bits chosen by | iqp, at most 1 % from the best for this budget |",
        "| Licence | apache-2.0, that of the original |",
        "| perplexity | 12.3457 | 12.0000 |",
        "| extra nats per token | +0.02340 |  |",
        "| mean | 0.0211 | 0.00012 |",
        "| p99 | 0.2 |  |",
        "| same likeliest token | 93.25 % | 99.90 % |",
        "8,184 tokens of heldout.txt in windows of 2048; all figures are in [eval.json](eval.json).",
        "![Code bits of each projection (columns) in each block (rows)](bit-map.png)",
        "  1-2  3     4",
        'model = LlmmpqForCausalLM.from_pretrained("user/tiny")',
        "llmmpq quantize org/base --recipe recipe.yaml",
        "- calibration was thin",
        f"{'ab' * 32}  model.safetensors",
    ):
        assert line in text.splitlines(), line
    assert "/home/ada" not in text


def test_a_card_says_what_is_not_known():
    text = card(
        Origin(name="base"), results=None, has_picture=False, found={"source_nbytes": None, "measured_kl": None}
    )
    data = ModelCard(text).data.to_dict()
    assert not {"base_model", "base_model_relation", "license"} & set(data)
    assert "that of the original, which was not found: see there" in text
    assert "Nobody has measured the perplexity of these files" in text
    assert "matplotlib, which draws it, was not installed" in text
    assert "bit-map.png" not in text
    assert "| Size | 4.16 MB |" in text
    assert "llmmpq quantize base --recipe recipe.yaml\n" in text
    assert "/home/ada" not in text


@pytest.mark.parametrize(
    ("results", "shown"),
    [
        ({"kl": {"mean": 0.5, "noise_floor": 0.25}}, ["| mean | 0.5 | 0.25 |"]),
        ({"perplexity": 9.0}, ["| perplexity | 9.0000 |  |"]),
        ({"perplexity": "9", "kl": [], "baseline": 3, "num_tokens": "many", "window": None, "text": 1}, []),
        ({"perplexity": None, "kl": {"mean": None, "noise_floor": None}}, []),
    ],
)
def test_results_may_hold_less_or_something_else(results, shown):
    text = card(Origin(name="base"), results=results)
    for line in shown:
        assert line in text.splitlines()
    assert "None" not in text


def test_a_given_plan_is_part_of_the_command():
    text = card(Origin(name="demo"), found={"method": "edited"})
    assert "llmmpq quantize base --recipe recipe.yaml --plan plan.json" in text
    assert "| Bits chosen by | a plan that a person gave |" in text


@pytest.mark.parametrize(
    ("hub_id", "flag"), [("someone/fork", " --revision abc123"), ("official/base", ""), (None, " --revision abc123")]
)
def test_a_revision_belongs_to_the_model_that_was_quantized(hub_id, flag):
    provenance = {"model": "someone/fork", "revision": "abc123"}
    text = card(Origin(name="base", hub_id=hub_id), found={"provenance": provenance})
    assert f"llmmpq quantize {hub_id or 'someone/fork'} --recipe recipe.yaml{flag}" in text.splitlines()


def test_tasks_of_lm_eval_are_quality_too():
    results = {"results": {"arc": {"acc": 0.5, "acc_stderr": 0.1}}, "baseline": {"results": {"arc": {"acc": 0.6}}}}
    lines = card(Origin(name="base"), results=results).splitlines()
    assert "| arc: acc | 0.5000 | 0.6000 |" in lines
    assert not any("stderr" in line for line in lines)


def test_remarks_name_no_folder_of_this_machine():
    text = card(Origin(name="base"), found={"warnings": ["/home/ada/text.txt gives 17 tokens"]})
    assert "- text.txt gives 17 tokens" in text.splitlines()


def test_the_map_as_text_and_as_a_picture(tmp_path, monkeypatch):
    shown = bit_map([*FOUND["linears"], {"block": 0, "role": "q_proj", "bits": 8}])
    assert as_text(shown) == "block    q  down\n    0  2/8     4\n  1-2    3     4"
    mixed = bit_map([*FOUND["linears"], {"block": 0, "role": "q_proj", "bits": {"2": 2, "3": 1}}])
    assert as_text(mixed) == "block      q  down\n    0  2/2.3     4\n  1-2      3     4"
    for name in ("one.png", "two.png"):
        assert draw(tmp_path / name, shown, title="tiny")
    picture = (tmp_path / "one.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert picture == (tmp_path / "two.png").read_bytes()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw(tmp_path / "three.png", shown, title="tiny")
    assert not (tmp_path / "three.png").exists()


class Api:
    """Knows one model, whose only file has one digest."""

    def model_info(self, name: str, **_: object) -> object:
        data = ModelCard("---\nlicense: mit\n---\n").data
        file = SimpleNamespace(rfilename="model.safetensors", lfs=SimpleNamespace(sha256="ab" * 32))
        return SimpleNamespace(card_data=data, siblings=[file])


def test_the_original_is_named_when_its_files_are_those_that_were_quantized():
    provenance = {"model": "org/base", "revision": None, "model_files": {"model.safetensors": "ab" * 32}}
    origin, notes = find_origin(provenance, base_model=None, api=Api())
    assert (origin, notes) == (Origin(name="org/base", hub_id="org/base", license="mit"), [])

    origin, notes = find_origin(provenance | {"model_files": {"model.safetensors": "00"}}, base_model=None, api=Api())
    assert origin == Origin(name="org/base")
    assert "model.safetensors differs" in notes[0]
    assert "--base-model USER/NAME" in notes[0]


def test_a_local_original_gives_its_licence_by_its_own_card(tmp_path):
    provenance = {"model": str(tmp_path)}
    origin, notes = find_origin(provenance, base_model=None, api=Api())
    assert origin == Origin(name=tmp_path.name)
    assert len(notes) == 2
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    origin, notes = find_origin(provenance, base_model=None, api=Api())
    assert origin == Origin(name=tmp_path.name, license="mit")
    assert "names no base_model" in notes[0]


def test_the_demo_is_nobodys_model():
    origin, notes = find_origin({"model": source.DEMO}, base_model=None, api=Api())
    assert origin.hub_id is None
    assert notes == []
