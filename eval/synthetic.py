"""Write a random Llama of a given shape shard by shard, never holding more than one tensor.

    python eval/synthetic.py OUT [--blocks 22] [--hidden 2048] [--intermediate 5632] [--vocab 32000]

The default is TinyLlama's shape (2.2 GB in bf16). Weights are normal with the spread a trained model has, so that
nothing overflows; what they compute is noise. For memory and time experiments only. The tokenizer is the demo's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    head = args.hidden // args.heads
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": args.hidden,
        "intermediate_size": args.intermediate,
        "num_hidden_layers": args.blocks,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": head,
        "vocab_size": args.vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    (args.out / "config.json").write_text(json.dumps(config, indent=2))
    demo = Path(str(files("llmmpq") / "assets" / "demo"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo / name, args.out / name)

    generator = torch.Generator().manual_seed(args.seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        weight = torch.randn(rows, columns, generator=generator, dtype=torch.float32) * columns**-0.5
        return weight.to(torch.bfloat16)

    ones = torch.ones(args.hidden, dtype=torch.bfloat16)
    weight_map: dict[str, str] = {}

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{number:05d}-of-{args.blocks + 2:05d}.safetensors"
        save_file(tensors, args.out / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    write(1, {"model.embed_tokens.weight": matrix(args.vocab, args.hidden)})
    for block in range(args.blocks):
        prefix = f"model.layers.{block}."
        write(
            block + 2,
            {
                f"{prefix}self_attn.q_proj.weight": matrix(args.hidden, args.hidden),
                f"{prefix}self_attn.k_proj.weight": matrix(args.kv_heads * head, args.hidden),
                f"{prefix}self_attn.v_proj.weight": matrix(args.kv_heads * head, args.hidden),
                f"{prefix}self_attn.o_proj.weight": matrix(args.hidden, args.hidden),
                f"{prefix}mlp.gate_proj.weight": matrix(args.intermediate, args.hidden),
                f"{prefix}mlp.up_proj.weight": matrix(args.intermediate, args.hidden),
                f"{prefix}mlp.down_proj.weight": matrix(args.hidden, args.intermediate),
                f"{prefix}input_layernorm.weight": ones.clone(),
                f"{prefix}post_attention_layernorm.weight": ones.clone(),
            },
        )
    write(args.blocks + 2, {"model.norm.weight": ones.clone(), "lm_head.weight": matrix(args.vocab, args.hidden)})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    print(f"wrote {args.out}: {sum(p.stat().st_size for p in args.out.glob('*.safetensors')) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
