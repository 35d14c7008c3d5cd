"""The model card of a quantized folder: README.md with metadata that the Hub reads, and the figures a reader needs.

Nothing is claimed that is not known: a figure that nobody measured, a licence or an original that cannot be named
are said to be missing. `library_name` is llmmpq, not transformers: the Hub shows that library's way to load, and
transformers alone does not know the format.

The last line of a card is a digest of the rest, so that a card which a person has edited is never written over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from llmmpq.bitmap import as_text, bit_map
from llmmpq.evaluate.results import KL_FIGURES, RESULTS_FILE, number, task_figures
from llmmpq.names import model_name, shortened, text_name, without_places
from llmmpq.records import EDITED

CARD_FILE, MAP_FILE = "README.md", "bit-map.png"
SEAL_START, SEAL_END = "<!-- written by llmmpq, sha256 ", " -->"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What is known of the model that was quantized."""

    name: str  # for people
    hub_id: str | None = None  # where the Hub holds it
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None


def write_card(
    found: Mapping[str, Any],
    *,
    name: str,
    origin: Origin,
    digests: Mapping[str, str],
    results: Mapping[str, Any] | None,
    has_picture: bool,
) -> str:
    """The text of the card. `found` is what `inspect_folder` says, `results` what `llmmpq eval --json` printed."""
    data = ModelCardData(
        base_model=origin.hub_id,
        base_model_relation=None if origin.hub_id is None else "quantized",
        library_name="llmmpq",
        license=origin.license,
        license_name=origin.license_name,
        license_link=origin.license_link,
        pipeline_tag="text-generation",
        tags=["llmmpq", "quantized", "mixed-precision", f"{found['bits_per_weight']:.2f}-bit"],
    )
    sections = [
        f"# {name}",
        f"Quantized with llmmpq from {_link(origin)} to **{found['bits_per_weight']:.3f} true bits per weight** on"
        " average, each matrix with bits of its own.",
        "\n".join(_summary(found, origin)),
        "## Quality",
        *_quality(found, results),
        "## Bits of each matrix",
        *_map(found, has_picture=has_picture),
        "## Loading",
        _loading(name),
        "## How it was made",
        _command(found, origin.hub_id),
        *_remarks(found),
        "## Digests",
        _digests(digests),
    ]
    return seal(str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections))).rstrip() + "\n")


def seal(text: str) -> str:
    return f"{text}\n{SEAL_START}{hashlib.sha256(text.encode()).hexdigest()}{SEAL_END}\n"


def is_sealed(card: str) -> bool:
    """Whether the card is as llmmpq wrote it; a person has not touched it."""
    text, start, rest = card.replace("\r\n", "\n").rpartition("\n" + SEAL_START)
    return bool(start) and rest.strip() == hashlib.sha256(text.encode()).hexdigest() + SEAL_END.rstrip()


def _link(origin: Origin) -> str:
    return origin.name if origin.hub_id is None else f"[{origin.hub_id}](https://huggingface.co/{origin.hub_id})"


def _summary(found: Mapping[str, Any], origin: Origin) -> Iterator[str]:
    linears = found["linears"]
    groups = ", ".join(str(size) for size in sorted({linear["group_size"] for linear in linears}))
    kinds = " and ".join(sorted({"symmetric" if linear["symmetric"] else "asymmetric" for linear in linears}))
    yield "| | |\n| --- | --- |"
    yield f"| Original | {_link(origin)} |"
    yield f"| Licence | {_licence(origin)} |"
    yield f"| True bits | {found['bits_per_weight']:.3f} per quantized weight: codes, scales and zeros, as on disk |"
    yield f"| Code bits | {found['code_bits_per_weight']:.3f}: codes alone, without that overhead |"
    before = found.get("source_nbytes")
    after = found["total_nbytes"]
    smaller = "" if before is None else f"{_size(before)} -> "
    ratio = "" if before is None else f", {before / after:.2f} times smaller"
    yield f"| Size | {smaller}{_size(after)}{ratio} |"
    yield f"| of which | {_size(found['quantized_nbytes'])} quantized, {_size(found['kept_nbytes'])} kept unquantized |"
    yield f"| Bits chosen by | {_choice(found)} |"
    yield f"| Groups | {groups} inputs share a scale, {kinds} |"
    if found["provenance"].get("rotation"):
        yield "| Rotated | the residual stream, exactly: the original's predictions, in other weights |"
    yield f"| Format | llmmpq, layout version {found['layout_version']} |"


def _choice(found: Mapping[str, Any]) -> str:
    if found["method"] == EDITED:
        return "a plan that a person gave"
    gap = number(found["optimality_gap"])
    return found["method"] + ("" if gap is None else f", at most {100 * gap:.2g} % from the best for this budget")


def _licence(origin: Origin) -> str:
    known = origin.license_name if origin.license == "other" and origin.license_name else origin.license
    if known is None:
        return "that of the original, which was not found: see there"
    named = f"[{known}]({origin.license_link})" if origin.license_link else known
    return f"{named}, that of the original"


def _quality(found: Mapping[str, Any], results: Mapping[str, Any] | None) -> Iterator[str]:
    if results is None:
        yield "Nobody has measured the perplexity of these files, or it was not recorded with them."
    else:
        yield "\n".join(_measured(results))
        yield _protocol(results)
    predicted, measured = number(found.get("predicted_loss")), number(found.get("measured_kl"))
    if measured is not None:
        yield f"When the widths were chosen, the KL divergence on the probe was {measured:.4g} nats per token."
    elif predicted is not None:
        yield f"When the widths were chosen, a loss of {predicted:.4g} was predicted: it compares plans of one model."


def _measured(results: Mapping[str, Any]) -> Iterator[str]:
    baseline = results.get("baseline")
    rows = []
    for label, key, digits in (("perplexity", "perplexity", 4), ("nats per token", "nll", 5)):
        here = number(results.get(key))
        there = number(baseline.get(key)) if isinstance(baseline, Mapping) else None
        if here is not None:
            rows.append((label, f"{here:.{digits}f}", "" if there is None else f"{there:.{digits}f}"))
    if (extra := number(results.get("extra_nll"))) is not None:
        rows.append(("extra nats per token", f"{extra:+.5f}", ""))
    rows += [
        (label, f"{own:.4f}", "" if other is None else f"{other:.4f}") for label, own, other in task_figures(results)
    ]
    if rows:
        yield "| | this model | original |\n| --- | ---: | ---: |"
        yield from (f"| {label} | {here} | {there} |" for label, here, there in rows)
    divergence = "\n".join(_divergence(results))
    if divergence:
        yield from ["", divergence] if rows else [divergence]


def _divergence(results: Mapping[str, Any]) -> Iterator[str]:
    """The noise floor stands beside each figure: divergence below it says nothing about quantization."""
    kl = results.get("divergence", results.get("kl"))
    if not isinstance(kl, Mapping):
        return
    floor = results.get("noise_floor", kl.get("noise_floor"))
    floors = floor if isinstance(floor, Mapping) else {"mean": floor}
    yield "| KL divergence from the original, nats per token | this model | noise floor |\n| --- | ---: | ---: |"
    for key in KL_FIGURES:
        value, least = (number(figures.get(f"kl_{key}", figures.get(key))) for figures in (kl, floors))
        if value is not None:
            yield f"| {key} | {value:.3g} | {'' if least is None else f'{least:.3g}'} |"
    agreement, least = (number(figures.get("top1_agreement")) for figures in (kl, floors))
    if agreement is not None:
        yield f"| same likeliest token | {100 * agreement:.2f} % | {'' if least is None else f'{100 * least:.2f} %'} |"
    yield "\nThe noise floor is the original's own divergence from its rounding to bfloat16."


def _protocol(results: Mapping[str, Any]) -> str:
    tokens, window = results.get("num_tokens"), results.get("window")
    text = results.get("text")
    parts = [f"{tokens:,} tokens" if isinstance(tokens, int) else "Measured"]
    if isinstance(text, str):
        parts.append(f"of {text_name(text)}")
    if isinstance(window, int):
        parts.append(f"in windows of {window}")
    if isinstance(stride := results.get("stride"), int) and stride != window:
        parts.append(f"every {stride}")
    return f"{' '.join(parts)}; all figures are in [{RESULTS_FILE}]({RESULTS_FILE})."


def _map(found: Mapping[str, Any], *, has_picture: bool) -> Iterator[str]:
    text = as_text(bit_map(found["linears"]))
    if has_picture:
        yield f"![Code bits of each projection (columns) in each block (rows)]({MAP_FILE})"
        yield f"<details><summary>The same as text</summary>\n\n```text\n{text}\n```\n\n</details>"
    else:
        yield f"```text\n{text}\n```"
        yield "As text: matplotlib, which draws it, was not installed."


def _loading(name: str) -> str:
    return (
        f"With llmmpq installed:\n\n```python\nfrom llmmpq import LlmmpqForCausalLM\n"
        f'from transformers import AutoTokenizer\n\nmodel = LlmmpqForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        'inputs = tokenizer("The library", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))\n```\n\n"
        "After `import llmmpq.hf`, `AutoModelForCausalLM.from_pretrained` works too."
    )


def _command(found: Mapping[str, Any], hub_id: str | None) -> str:
    # A revision of the provenance belongs to the model it names, not to one that a person named since.
    revision = found["provenance"].get("revision") if hub_id in (None, found["provenance"].get("model")) else None
    model = hub_id or model_name(str(found["provenance"].get("model", "MODEL")))
    command = f"llmmpq quantize {model} --recipe recipe.yaml"
    command += f" --revision {revision}" if revision else ""
    command += " --plan plan.json" if found["method"] == EDITED else ""
    calibration = found["provenance"].get("calibration")
    text = ""
    if isinstance(calibration, Mapping) and {"source", "num_tokens"} <= set(calibration):
        text = f" Calibrated on {calibration['num_tokens']:,} tokens of `{text_name(str(calibration['source']))}`."
    return (
        f"```sh\n{command}\n```\n\nwith [recipe.yaml](recipe.yaml), which holds every setting, by llmmpq "
        f"{found['provenance'].get('llmmpq', 'of an unknown version')}.{text} The decision for each matrix is in "
        "[plan.json](plan.json)."
    )


def _remarks(found: Mapping[str, Any]) -> Iterator[str]:
    remarks: Sequence[str] = without_places(
        [*found["fallbacks"], *found["warnings"]], shortened(found["provenance"], {})
    )
    if remarks:
        yield "\n".join(f"- {' '.join(str(remark).split())}" for remark in remarks)


def _digests(digests: Mapping[str, str]) -> str:
    weights = {name: digest for name, digest in sorted(digests.items()) if name.endswith(".safetensors")}
    lines = "\n".join(f"{digest}  {name}" for name, digest in weights.items())
    return (
        f"```text\n{lines}\n```\n\nsha256 of the weight files; [digests.json](digests.json) has those of all files, and"
        " `llmmpq inspect` compares them."
    )


def _size(nbytes: int) -> str:
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} bytes"
