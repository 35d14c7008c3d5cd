"""Rotations folded into the weights before quantizing: extra NLL and KL of each kind, with and without group bits.

    python eval/rotations.py [--models demo,/tmp/second] [--kinds none,folded,random,sequency,learned] [--values]
                             [--bits 2,3] [--averages 2.5] [--seeds 0] [--text FILE] [--csv OUT]

    none        the model as it is
    folded      the gains of the norms folded into the linears behind them, the head a matrix of its own
    random      folded, and the stream turned by a Hadamard matrix, the signs of the channels drawn
    sequency    by a Hadamard matrix for each group of 64 channels, its rows in the order of their sign changes
    learned     `--rotate`, as users get it: by a rotation that makes the mean fourth power of all its weights small

What is made here is for Llama and models laid out like it; that its log-probabilities stay (to 1e-4) is checked.

With `--values` values are rotated too, head by head, and what the output layer reads with them (not with `learned`).
Quantized by the recipe `demo`: first every matrix at the same width, then at averages of true bits, where the groups of
a matrix may differ, since what is flat has less for them to tell apart.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from ablation import judge_on
from rows import append_row
from torch import nn

from llmmpq import pipeline
from llmmpq.model.text import packaged_text
from llmmpq.model.tokens import evaluation_windows
from llmmpq.recipe import load_recipe
from llmmpq.session import load_tokenizer

GROUP = 64
SAME = 1e-4
FIELDS = ("model", "seed", "kind", "budget", "true_bits", "extra_nll", "kl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="demo")
    parser.add_argument("--kinds", default="none,folded,random,sequency,learned")
    parser.add_argument("--values", action="store_true")
    parser.add_argument("--bits", default="2,3")
    parser.add_argument("--averages", default="2.5")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--text", help="a text file; without it the packaged held-out text")
    parser.add_argument("--max-windows", type=int, default=64, help="of 512 tokens, to judge on")
    parser.add_argument("--csv", type=Path, default=Path("rotations.csv"))
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    budgets: list[dict[str, Any]] = [{"budget.bits": int(bits)} for bits in args.bits.split(",") if bits]
    budgets += [{"budget.avg_bits": float(bits)} for bits in args.averages.split(",") if bits]
    for model in args.models.split(","):
        judge = judge_on(model, args.text, args.max_windows)
        for seed in map(int, args.seeds.split(",")):
            for kind in args.kinds.split(","):
                with tempfile.TemporaryDirectory() as work:
                    source = model
                    if kind not in ("none", "learned"):
                        source = str(_folder(model, kind, seed=seed, values=args.values, to=Path(work) / "rotated"))
                    name = kind + ", values" * args.values
                    for budget in budgets:
                        bits, extra, kl = _quantized(
                            source, budget, judge, rotate=kind == "learned", seed=seed, work=Path(work)
                        )
                        label = "{}={}".format(*next(iter(budget.items())))
                        append_row(
                            args.csv, dict(zip(FIELDS, (model, seed, name, label, bits, extra, kl), strict=True))
                        )
                        print(f"{model} seed {seed} {name:18s} {label:20s} NLL {extra:+.4f} KL {kl:.4f}", flush=True)


def _quantized(
    model: str, budget: dict[str, Any], judge: Any, *, rotate: bool, seed: int, work: Path
) -> tuple[float, float, float]:
    changes = {
        "model": model,
        "calibration.tokens": 12288,
        "calibration.seed": seed,
        "quantizer.group_size": GROUP,
        "quantizer.rotate": rotate,
    }
    out = work / "-".join(map(str, budget.values()))
    made = pipeline.quantize_model(load_recipe("demo").override(changes | budget), out=out, work_dir=work / "work")
    extra, kl = judge(pipeline.load_model(str(out))[1])
    return made["plan"]["bits_per_weight"], extra, kl


def _folder(model: str, kind: str, *, seed: int, values: bool, to: Path) -> Path:
    folder, original = pipeline.load_model(model)
    tokenizer = load_tokenizer(folder)
    original = original.float().eval()
    rotated = copy.deepcopy(original)
    _untie(rotated)
    _fold_norms(rotated)
    if kind != "folded":
        _rotate_stream(rotated, _rotation(kind, rotated, torch.Generator().manual_seed(seed)))
    if values:
        _rotate_values(rotated)
    tokens = evaluation_windows(tokenizer, packaged_text("heldout.txt"), 512)[:4]
    with torch.no_grad():
        one, two = (torch.log_softmax(some(tokens).logits, dim=-1) for some in (original, rotated))
    if float((one - two).abs().max()) > SAME:
        raise SystemExit(f"{model}, {kind}: the rotated model is another one, by {float((one - two).abs().max()):.2g}")
    rotated.save_pretrained(to)
    tokenizer.save_pretrained(to)
    return to


def _untie(model: Any) -> None:
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def _readers(layer: Any) -> tuple[tuple[Any, list[nn.Linear]], ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return (
        (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
        (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
    )


def _fold_norms(model: Any) -> None:
    pairs = [pair for layer in model.model.layers for pair in _readers(layer)]
    for norm, linears in [*pairs, (model.model.norm, [model.lm_head])]:
        for linear in linears:
            linear.weight.data *= norm.weight.data
        norm.weight.data.fill_(1.0)


def _rotate_stream(model: Any, rotation: torch.Tensor) -> None:
    model.model.embed_tokens.weight.data @= rotation
    model.lm_head.weight.data @= rotation
    for layer in model.model.layers:
        for _, linears in _readers(layer):
            for linear in linears:
                linear.weight.data @= rotation
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data = rotation.t() @ linear.weight.data


def _rotate_values(model: Any) -> None:
    for layer in model.model.layers:
        attention = layer.self_attn
        size = attention.head_dim
        turn = _hadamard(size)
        values, outputs = attention.v_proj.weight, attention.o_proj.weight
        values.data = (turn.t() @ values.data.reshape(-1, size, values.shape[1])).reshape(values.shape)
        outputs.data = (outputs.data.reshape(len(outputs), -1, size) @ turn).reshape(outputs.shape)


def _rotation(kind: str, model: Any, generator: torch.Generator) -> torch.Tensor:
    size = model.config.hidden_size
    if kind == "sequency":
        if size % GROUP:
            raise SystemExit(f"{size} channels are not made of whole groups of {GROUP}")
        return torch.block_diag(*[_by_sequency(_hadamard(GROUP))] * (size // GROUP))
    signs = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1
    return signs[:, None] * _hadamard(size)


def _hadamard(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    if len(matrix) != size:
        raise SystemExit(f"a Hadamard matrix of {size} is not made here; a power of two is")
    return matrix / size**0.5


def _by_sequency(matrix: torch.Tensor) -> torch.Tensor:
    changes = (matrix[:, 1:] * matrix[:, :-1] < 0).sum(dim=1)
    return matrix[changes.argsort(stable=True)]


if __name__ == "__main__":
    main()
