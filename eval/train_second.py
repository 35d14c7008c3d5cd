"""Train a small Qwen3 on the CPU: a second model, of another architecture than the demo, to confirm ablations on.

    OMP_NUM_THREADS=2 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 \\
        python eval/train_second.py OUT [--text FILE ...] [--steps 300] [--threads 2] [--blocks 32] [--peak-lr 2e-3]

What it shares with the demo, and what not: tokenizer, hidden size and number of blocks are the same. The embedding
(which is the head), the attention projections and the norms start from the demo's and are trained on; the gains of the
q and k norms, which the demo does not have, start from the mean length of its queries and keys. The MLPs, 57 % of the
weights, are narrower (640 for 768) and start random. So a result here is independent of the demo's for the MLPs, and
only partly so for attention and head.

The loss of a step is, with p the teacher's (the demo's) next-token distribution, h and g the states after block l:

    1/2 * CE(token) + 1/2 * CE(p) + 1/4 * sum over l of mean ||h_l - g_l||^2 / ||g_l||^2

Rejected: all blocks random, trained on tokens alone (held-out loss 6.76 after 50 steps, where this one has 5.33, though
with 50 warm-up steps), and the demo's MLPs cut to 640 neurons (perplexity 65 before any training, the demo's own being
55: hardly another model).

A step's windows are cut into two shards whose gradients are averaged in order, each worked by one thread, so the result
does not depend on --threads. Two threads inside each operation were rejected: on a busy machine they wait for each
other at each operation (1,140 tokens/s for 3,690 with one). The MALLOC settings, which do not change the result, keep
freed memory (2,940 tokens/s without).

With --blocks the model has another shape, for programs of many linears: that many blocks of hidden size 128 (2 heads of
64 with 1 key/value head, MLP 384). It shares with the demo the tokenizer and an embedding that is the demo's along its
128 leading directions; all blocks start random, those matrices that write into the residual stream 1/sqrt(2 blocks)
smaller. The demo teaches it by its distribution alone, as its states are of another width.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.resources import files
from pathlib import Path

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from llmmpq.evaluate.perplexity import token_nll
from llmmpq.model.text import packaged_text, read_text
from llmmpq.model.tokens import evaluation_windows

DEMO = Path(str(files("llmmpq") / "assets" / "demo"))
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TRAIN_TEXTS = ("prose-sample.txt", "wikitext2-valid.txt")
HELD_OUT = "mixed-heldout.txt"
WINDOW = 512
INTERMEDIATE = 640  # the demo has 768
NUM_SHARDS = 2  # a step's windows are worked in this many parts, whatever the number of threads
SHARD_WINDOWS = 2
PEAK_LR = 2e-3
WARM_UP_STEPS = 10
DEEP_WARM_UP_STEPS = 50
DEEP_HIDDEN, DEEP_INTERMEDIATE, DEEP_HEADS, DEEP_KV_HEADS = 128, 384, 2, 1
TEACHER_SHARE = 0.5  # of the target distribution; the rest is the token that came
STATE_WEIGHT = 0.25  # of each block's relative squared distance from the teacher's state, where they are of one shape
REPORT_STEPS = 25
NUM_REPORT_WINDOWS = 12
NUM_FINAL_WINDOWS = 40
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, action="append", help="text to train on; may be given several times")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2, help=f"1 to {NUM_SHARDS}; the result does not depend on it")
    parser.add_argument("--blocks", type=int, help="so many blocks of hidden size 128 instead of the demo's shape")
    parser.add_argument("--peak-lr", type=float, default=PEAK_LR)
    args = parser.parse_args()
    texts = args.text or [SHARED / name for name in TRAIN_TEXTS]
    if missing := [str(path) for path in texts if not path.is_file()]:
        parser.error(f"no training text at {', '.join(missing)}: give one or more text files with --text FILE")
    if args.steps < 1 or not 1 <= args.threads <= NUM_SHARDS:
        parser.error(f"--steps must be at least 1 and --threads 1 to {NUM_SHARDS}")
    args.out.mkdir(parents=True)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    teacher = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    ids = torch.cat([torch.tensor(tokenizer(read_text(path), verbose=False)["input_ids"]) for path in texts])
    batches = shuffled_windows(ids)
    deep = args.blocks is not None
    model = build_deep(teacher, args.blocks) if deep else build_model(teacher, next(batches))
    gradients_of = partial(shard_gradients, model, teacher, state_weight=0.0 if deep else STATE_WEIGHT)
    held_out = {name: evaluation_windows(tokenizer, text, WINDOW) for name, text in held_out_texts().items()}
    judged = next(iter(held_out.values()))
    tokens_per_step = NUM_SHARDS * SHARD_WINDOWS * WINDOW
    print(f"{model.num_parameters()} parameters, {len(ids)} training tokens, {args.steps} steps of {tokens_per_step}")
    before = {name: held_out_nll(model, windows, NUM_FINAL_WINDOWS) for name, windows in held_out.items()}

    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    kept = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.peak_lr, betas=(0.9, 0.95), fused=True)
    weights = decayed + kept
    warm_up = DEEP_WARM_UP_STEPS if deep else WARM_UP_STEPS
    started, losses = time.monotonic(), []
    print("| step | training loss | held-out loss | seconds |")
    print("| --- | --- | --- | --- |")
    with ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for step in range(1, args.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = args.peak_lr * schedule(step, args.steps, warm_up)
            shards = [next(batches) for _ in range(NUM_SHARDS)]
            parts = list(pool.map(lambda shard: gradients_of(weights, shard), shards))
            for weight, *gradients in zip(weights, *(gradients for _, gradients in parts), strict=True):
                weight.grad = torch.stack(gradients).mean(0)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            losses.append(sum(loss for loss, _ in parts) / NUM_SHARDS)
            if step % REPORT_STEPS == 0 or step == args.steps:
                recent = sum(losses) / len(losses)
                loss = held_out_nll(model, judged, NUM_REPORT_WINDOWS)
                print(f"| {step} | {recent:.3f} | {loss:.3f} | {time.monotonic() - started:.0f} |", flush=True)
                losses.clear()

    model.bfloat16().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    saved = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    print("\n| held-out text | tokens | demo | before | after (perplexity) |")
    print("| --- | --- | --- | --- | --- |")
    for name, windows in held_out.items():
        nll = [held_out_nll(teacher, windows, NUM_FINAL_WINDOWS), before[name]]
        nll.append(held_out_nll(saved, windows, NUM_FINAL_WINDOWS))
        num_tokens = windows[:NUM_FINAL_WINDOWS].numel()
        print(f"| {name} | {num_tokens} | {' | '.join(f'{math.exp(value):.1f}' for value in nll)} |")
    print(f"sha256 {hashlib.sha256((args.out / 'model.safetensors').read_bytes()).hexdigest()}")


def build_model(demo: PreTrainedModel, ids_BT: torch.Tensor) -> Qwen3ForCausalLM:
    """Qwen3 with random MLPs and the demo's other weights; the ids are read to measure its queries and keys."""
    config = Qwen3Config(
        vocab_size=demo.config.vocab_size,
        hidden_size=demo.config.hidden_size,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=demo.config.num_hidden_layers,
        num_attention_heads=demo.config.num_attention_heads,
        num_key_value_heads=demo.config.num_key_value_heads,
        head_dim=demo.config.head_dim,
        rope_parameters=demo.config.rope_parameters,
        max_position_embeddings=demo.config.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=demo.config.bos_token_id,
        eos_token_id=demo.config.eos_token_id,
    )
    model = Qwen3ForCausalLM(config)
    weights = demo.state_dict()
    outputs: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: outputs.update({name: output}))
        for name, module in demo.named_modules()
        if name.endswith(("q_proj", "k_proj"))
    ]
    with torch.no_grad():
        demo(ids_BT, use_cache=False)
    for handle in handles:
        handle.remove()
    for number in range(config.num_hidden_layers):
        prefix = f"model.layers.{number}."
        for short in "qk":
            output = outputs[f"{prefix}self_attn.{short}_proj"]
            length = output.unflatten(-1, (-1, config.head_dim)).square().mean(-1).sqrt().mean()
            weights[f"{prefix}self_attn.{short}_norm.weight"] = length.expand(config.head_dim)
    trained = {name: weight for name, weight in weights.items() if ".mlp." not in name}
    model.load_state_dict(model.state_dict() | trained)
    return model


def build_deep(demo: PreTrainedModel, num_blocks: int) -> Qwen3ForCausalLM:
    """Narrow Qwen3 of so many random blocks; the embedding is the demo's along its leading directions."""
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=demo.config.vocab_size,
            hidden_size=DEEP_HIDDEN,
            intermediate_size=DEEP_INTERMEDIATE,
            num_hidden_layers=num_blocks,
            num_attention_heads=DEEP_HEADS,
            num_key_value_heads=DEEP_KV_HEADS,
            head_dim=DEEP_HIDDEN // DEEP_HEADS,
            rope_parameters=demo.config.rope_parameters,
            max_position_embeddings=demo.config.max_position_embeddings,
            tie_word_embeddings=True,
            bos_token_id=demo.config.bos_token_id,
            eos_token_id=demo.config.eos_token_id,
        )
    )
    with torch.no_grad():
        left, values, _ = torch.linalg.svd(demo.get_parameter("model.embed_tokens.weight"), full_matrices=False)
        model.get_parameter("model.embed_tokens.weight").copy_((left * values)[:, :DEEP_HIDDEN])
        for name, weight in model.named_parameters():
            if name.endswith("_proj.weight"):
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                weight.normal_(std=weight.shape[1] ** -0.5 / (math.sqrt(2 * num_blocks) if writes else 1.0))
    return model


def shuffled_windows(ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Endless shards of WINDOW + 1 tokens: each epoch cuts the text elsewhere and shuffles the pieces."""
    generator = torch.Generator().manual_seed(SEED)
    while True:
        offset = int(torch.randint(WINDOW, (), generator=generator))
        starts = torch.arange(offset, len(ids) - WINDOW, WINDOW)
        if len(starts) < SHARD_WINDOWS:
            raise SystemExit(f"{len(ids)} training tokens are too few: give at least {WINDOW * (SHARD_WINDOWS + 2)}")
        order = starts[torch.randperm(len(starts), generator=generator)]
        for chosen in order[: len(order) // SHARD_WINDOWS * SHARD_WINDOWS].split(SHARD_WINDOWS):
            yield ids[chosen[:, None] + torch.arange(WINDOW + 1)]


def schedule(step: int, num_steps: int, warm_up: int) -> float:
    if step <= warm_up:
        return step / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (num_steps - warm_up + 1)))


def shard_gradients(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    weights: Sequence[torch.Tensor],
    ids_BT: torch.Tensor,
    *,
    state_weight: float,
) -> tuple[float, tuple[torch.Tensor, ...]]:
    """Loss on the tokens alone, and the gradients of the loss that includes the teacher."""
    read, expected = ids_BT[:, :-1], ids_BT[:, 1:].flatten()
    # The cache of cast weights belongs to the process, so two threads would share its graph.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        with torch.no_grad():
            taught = teacher(read, use_cache=False, output_hidden_states=state_weight > 0)
        found = model(read, use_cache=False, output_hidden_states=state_weight > 0)
    logits_NV = found.logits.float().flatten(0, 1)
    target_NV = taught.logits.float().flatten(0, 1).softmax(-1)
    token_loss = cross_entropy(logits_NV, expected)
    loss = (1 - TEACHER_SHARE) * token_loss + TEACHER_SHARE * cross_entropy(logits_NV, target_NV)
    if state_weight:
        for state, wanted in zip(found.hidden_states[1:], taught.hidden_states[1:], strict=True):
            apart = (state.float() - wanted.float()).square().sum(-1) / wanted.float().square().sum(-1)
            loss = loss + state_weight * apart.mean()
    return token_loss.item(), torch.autograd.grad(loss, weights)


def held_out_texts() -> dict[str, str]:
    """Texts never trained on, the one that is reported during training first."""
    texts = {HELD_OUT: read_text(SHARED / HELD_OUT)} if (SHARED / HELD_OUT).is_file() else {}
    return texts | {f"llmmpq/assets/{name}": packaged_text(name) for name in ("heldout.txt", "calibration.txt")}


def held_out_nll(model: PreTrainedModel, windows: torch.Tensor, limit: int) -> float:
    """Nats per token over at most `limit` windows, evenly spread."""
    chosen = torch.linspace(0, len(windows) - 1, min(limit, len(windows))).long()
    return token_nll(model, windows[chosen], batch=4, advance=lambda num: None).nll


if __name__ == "__main__":
    main()
