"""Decoding with random weights, packed and plain, side by side in one run: speed does not depend on what weights say.

    python eval/decode_bench.py                      # CPU: a demo-shaped model and a 2048-wide one
    python eval/decode_bench.py --model 8b           # Llama-3.1-8B shape, on the GPU where there is one
    python eval/decode_bench.py --model 2048 --schemes 3,mixed --rounds 5 --out table.csv

Every variant is built and measured once in each round, so that a machine that slows down slows all of them; figures are
medians over the rounds. With --apart, `packed` lets q, k and v share a launch, and gate and up, which `apart` does
not. `reference` is what every linear did before there were kernels: the matrix unpacked by plain
torch for each call. The head and the embedding are not packed.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from arguments import names_among
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmmpq.evaluate.speed import copy_bandwidth, held_nbytes, measure_speed, read_nbytes
from llmmpq.records import PackedTensor
from llmmpq.runtime import choice
from llmmpq.runtime.linear import PackedLinear, share_launches
from llmmpq.scheme import Scheme

# (hidden, intermediate, blocks, heads, key/value heads, words). The 2048-wide one has the blocks of TinyLlama, four of
# them, which exceed the last cache of any CPU, and few words, so that its blocks take the time.
MODELS = {
    "demo": (256, 768, 6, 4, 2, 4096),
    "2048": (2048, 5632, 4, 32, 4, 4096),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}
GROUP_SIZE = 64
FORMATS = {"2": ((2, 1.0),), "3": ((3, 1.0),), "4": ((4, 1.0),), "8": ((8, 1.0),), "mixed": ((3, 0.5), (4, 0.5))}


def build(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    hidden, intermediate, blocks, heads, kv_heads, words = MODELS[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=words,
        max_position_embeddings=4096,
        tie_word_embeddings=name == "demo",
    )
    with torch.device(device):
        torch.manual_seed(0)
        model: nn.Module = LlamaForCausalLM(config)
    return model.to(dtype).requires_grad_(False).eval()


def pack(model: nn.Module, form: str) -> None:
    """Each linear of the blocks replaced by a packed one of random words."""
    generator = torch.Generator().manual_seed(1)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            shape = (module.out_features, module.in_features)
            packed = PackedLinear.from_packed(random_packed(shape, form, generator)).to(module.weight.device)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, packed)


def random_packed(shape: tuple[int, int], form: str, generator: torch.Generator) -> PackedTensor:
    """Words and zeros of random bits, small float16 scales, groups of each width at random places."""
    num_groups = -(-shape[1] // GROUP_SIZE)
    counts = [max(1, round(share * num_groups)) for _, share in FORMATS[form]]
    counts[0] += num_groups - sum(counts)
    runs = tuple((bits, count) for (bits, _), count in zip(FORMATS[form], counts, strict=True))
    mixed = len(runs) > 1
    scheme = Scheme(bits=None if mixed else runs[0][0], runs=runs if mixed else (), group_size=GROUP_SIZE)
    tensors: dict[str, torch.Tensor] = {}
    for key, (_, dims) in scheme.tensors(shape).items():
        if key == "scales":
            tensors[key] = (torch.rand(dims, generator=generator) * 0.01).half()
        elif key == "order":
            parts = torch.randperm(num_groups, generator=generator).split(counts)
            tensors[key] = torch.cat([part.sort().values for part in parts]).to(torch.int32)
        else:
            tensors[key] = torch.randint(-(2**31), 2**31, dims, generator=generator).to(torch.int32)
    return PackedTensor(scheme=scheme, shape=shape, **tensors)


def only_reference(model: nn.Module, device: torch.device) -> None:
    """Put all other backends out, for the matrices of this model."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            runs = module.scheme.widths(module.shape)
            for backend in (*choice.TRITON, choice.CPU):
                choice._failures[choice._kind(backend, device, runs, module.scheme.group_size)] = (
                    "put out by a benchmark"
                )
    choice.choose.cache_clear()


def measure(name: str, variant: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    kind, _, form = variant.partition(" ")
    dtype = getattr(torch, kind if kind in ("float32", "bfloat16") else arguments.dtype)
    model = build(name, dtype, device)
    choice._failures.clear()
    choice.choose.cache_clear()
    if form:
        pack(model, form)
    if kind != "apart":
        share_launches(model)
    if kind == "reference":
        only_reference(model, device)
    speed = measure_speed(model, batch=arguments.batch, prompt=arguments.prompt, new=arguments.new)
    found = {
        "step_ms": 1000 * speed.decode_step_s,
        "first_ms": 1000 * speed.first_token_s,
        "read_mb": read_nbytes(model) / 1e6,
        "held_mb": held_nbytes(model) / 1e6,
        "in_graph": speed.in_graph,
    }
    del model
    gc.collect()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=names_among(MODELS, "model"), default="demo,2048")
    parser.add_argument("--schemes", type=names_among(FORMATS, "scheme"), default=",".join(FORMATS))
    parser.add_argument("--dtype", help="of packed models (CPU: float32; GPU: bfloat16)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--apart", action="store_true", help="also with a launch for each matrix")
    parser.add_argument("--reference", action="store_true", help="also without kernels, at each width")
    parser.add_argument("--out", type=Path, help="a CSV")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.apart:
        os.environ[choice.TOGETHER_VARIABLE] = "1"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments.dtype = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    forms = arguments.schemes
    plain = ["bfloat16"] if device.type == "cuda" else ["float32", "bfloat16"]
    variants = plain + [f"packed {form}" for form in forms]
    variants += [f"apart {form}" for form in forms] if arguments.apart else []
    variants += [f"reference {form}" for form in forms] if arguments.reference else []
    copy = copy_bandwidth(device)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, copy {copy / 1e9:.1f} GB/s")
    print(f"batch {arguments.batch}, prompt {arguments.prompt}, {arguments.new} written, {arguments.rounds} rounds")
    rows = []
    for name in arguments.model:
        found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
        for _ in range(arguments.rounds):
            for variant in variants:
                found[variant].append(measure(name, variant, arguments, device))
        steps = {variant: statistics.median(one["step_ms"] for one in ones) for variant, ones in found.items()}
        for variant, ones in found.items():
            rows.append(
                {
                    "model": name,
                    "variant": variant,
                    "step_ms": round(steps[variant], 3),
                    "tokens_per_s": round(1000 * arguments.batch / steps[variant], 1),
                    "times_plain": round(steps[plain[0]] / steps[variant], 2),
                    "first_ms": round(statistics.median(one["first_ms"] for one in ones), 1),
                    "held_mb": round(ones[0]["held_mb"], 1),
                    "of_a_copy": round(ones[0]["read_mb"] * 1e9 / steps[variant] / copy, 3),
                    "in_graph": ones[0]["in_graph"],
                }
            )
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if arguments.out is not None:
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
