"""Budgets of a total: what is reserved beside the quantized linears, and what is said when it is too much."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config

from llmmpq.allocate import budget as arithmetic
from llmmpq.allocate.budget import describe, parts_of, size_of_at_least, vram_margin_nbytes
from llmmpq.budgets import budget_of
from llmmpq.errors import InfeasibleBudgetError, UnsupportedModelError
from llmmpq.model.checkpoint import INDEX_FILE, OutputTensor, write_checkpoint
from llmmpq.model.kv_cache import kv_cache_nbytes
from llmmpq.planning import check_budget, unmeasured_problem
from llmmpq.recipe import Budget, Recipe, parse_size
from llmmpq.session import open_session
from tests import tiny

GROUP_SIZE = 28


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("llama") / "model", dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def _same_threads_after():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def session_of(model, **budget):
    return open_session(
        Recipe().override(
            {"model": str(model), "quantizer.group_size": GROUP_SIZE, "run.threads": 1}
            | {f"budget.{key}": value for key, value in budget.items()}
        )
    )


def stored_of(session, bits):
    """What would be written with the same width everywhere; in the last mixture of widths; or in any, at the most."""
    skeleton = session.skeleton
    for kept in skeleton.kept:
        yield OutputTensor(
            name=kept.name,
            dtype=torch.bfloat16,
            shape=kept.shape,
            chunks=lambda kept=kept: [torch.zeros(kept.shape, dtype=torch.bfloat16)],
        )
    for spec in skeleton.linears:
        options = session.options()[spec.name]
        mixed = [scheme for scheme in options if scheme.mixed][-1]
        chosen = {"mixed": [mixed], "most": [session.scheme(8), mixed, *options]}.get(bits) or [session.scheme(bits)]
        every = [(key, stored) for scheme in chosen for key, stored in scheme.tensors(spec.shape).items()]
        # Of equal ones the first; a short last group makes the words of a mixture longer than those of 8 bits.
        largest = {key: max((s for k, s in every if k == key), key=lambda s: math.prod(s[1])) for key, _ in every}
        for key, (dtype, shape) in largest.items():
            kind = getattr(torch, dtype)
            yield OutputTensor(
                name=f"{spec.name}.{key}",
                dtype=kind,
                shape=shape,
                chunks=lambda shape=shape, kind=kind: [torch.zeros(shape, dtype=kind)],
            )


# The size of the files


def test_a_size_is_shared_out_to_the_byte(model, tmp_path):
    session = session_of(model, max_size="123456")
    budget = budget_of(session)
    kept = sum(tensor.nbytes for tensor in session.skeleton.kept)
    tensors = list(stored_of(session, bits="most"))
    write_checkpoint(tmp_path, tensors, max_shard_nbytes=10**9)
    header = (tmp_path / "model.safetensors").stat().st_size - sum(tensor.nbytes for tensor in tensors)
    assert budget == {
        "kind": "max_size",
        "value": "123456",
        "nbytes": 123456 - kept - header,
        "total_nbytes": 123456,
        "reserved": {"kept": kept, "headers": header},
        "largest_kept": {"name": "model.embed_tokens.weight", "nbytes": 2 * 128 * 64, "bits": 16},
    }
    assert parts_of(budget, 7) == {"quantized": 7, "kept unquantized": kept, "file headers and index": header}


@pytest.mark.parametrize("bits", [2, 3, 4, 8, "mixed"])
@pytest.mark.parametrize("max_shard_nbytes", [1, 3000, 20_000, 100_000, 10**9])
def test_headers_and_index_never_take_more_than_is_reserved(model, bits, max_shard_nbytes, tmp_path):
    session = session_of(model, max_size="1GB")
    session = open_session(session.recipe.override({"output.max_shard_size": str(max_shard_nbytes)}))
    most = budget_of(session)["reserved"]["headers"]
    tensors = list(stored_of(session, bits=bits))
    digests = write_checkpoint(tmp_path, tensors, max_shard_nbytes=max_shard_nbytes)
    assert (INDEX_FILE in digests) == (len(digests) > 1)
    written = sum((tmp_path / name).stat().st_size for name in digests)
    overhead = written - sum(tensor.nbytes for tensor in tensors)
    assert overhead <= most
    if bits == "mixed":
        assert most <= overhead * 1.6


def test_a_model_kept_in_part_counts_what_is_kept(model):
    all_quantized = budget_of(session_of(model, max_size="1MB"))
    session = open_session(
        Recipe().override({"model": str(model), "budget.max_size": "1MB", "output.keep": ["layers.0.*"]})
    )
    kept = sum(spec.num_weights for spec in session_of(model).skeleton.linears if spec.block == 0)
    assert budget_of(session)["reserved"]["kept"] == all_quantized["reserved"]["kept"] + 2 * kept


@pytest.mark.parametrize("kind", ["max_size", "fit_vram"])
@pytest.mark.parametrize("pins", [{}, {"down_proj": 8}])
def test_the_size_named_is_the_smallest_that_works(model, kind, pins):
    session = session_of(model, **{kind: "1000"})
    session = open_session(session.recipe.override({"allocation.pins": pins}))
    with pytest.raises(InfeasibleBudgetError) as caught:
        check_budget(session)
    message = str(caught.value)
    flag = f"--{kind.replace('_', '-')}"
    assert message.startswith(f"{flag} 1000")
    assert "model.embed_tokens.weight at 16 bits" in message
    assert ("loosen the pins" in message) == bool(pins)
    named = re.search(rf"Raise {flag} to (\S+) or more", message)[1]
    check_budget(session, Budget(**{kind: named}))
    needed = int(re.search(r"\(([\d,]+) bytes\)", message)[1].replace(",", ""))
    assert needed <= parse_size(named) < needed * 1.002
    check_budget(session, Budget(**{kind: str(needed)}))
    with pytest.raises(InfeasibleBudgetError):
        check_budget(session, Budget(**{kind: str(needed - 1)}))


@pytest.mark.parametrize("nbytes", [1, 999, 1000, 123_456, 999_999_999, 10**9, 3_411_223_344, 10**12 + 1])
def test_a_size_to_type_holds_what_it_must(nbytes):
    assert nbytes <= parse_size(size_of_at_least(nbytes)) <= max(nbytes + 1, nbytes * 1.001)


# The memory to run in


def test_memory_is_shared_out_to_the_byte(model):
    session = session_of(model, fit_vram="1GB", context=100, sequences=3)
    budget = budget_of(session)
    kept = sum(tensor.nbytes for tensor in session.skeleton.kept)
    cache = 3 * 100 * 3 * 2 * 2 * 16 * 2  # sequences, tokens, layers, keys and values, heads, head size, bytes
    margin = 10**9 // 20 + 800_000_000
    assert budget["reserved"] == {"kept": kept, "kv_cache": cache, "margin": margin}
    assert budget["nbytes"] == 10**9 - kept - cache - margin
    assert (budget["context"], budget["sequences"]) == (100, 3)
    assert describe(budget) == "--fit-vram 1GB --context 100 --sequences 3"
    assert list(parts_of(budget, 1)) == [
        "quantized",
        "kept unquantized",
        "KV cache for 3 x 100 tokens at 16 bits",
        "margin for the runtime (5 % + 0.8 GB)",
    ]


def test_the_margin_is_rounded_up():
    assert vram_margin_nbytes(20) == arithmetic.VRAM_MARGIN_NBYTES + 1
    assert vram_margin_nbytes(21) == arithmetic.VRAM_MARGIN_NBYTES + 2


def test_a_cache_that_cannot_fit_is_named(model):
    session = session_of(model, fit_vram="2GB", context=10**7)
    with pytest.raises(InfeasibleBudgetError, match=r"3\.84 GB KV cache for 1 x 10,000,000 tokens") as caught:
        check_budget(session)
    assert "The KV cache alone does not fit in 2.00 GB." in str(caught.value)
    assert "shorten --context," in str(caught.value)
    with pytest.raises(InfeasibleBudgetError) as caught:
        check_budget(session, Budget(fit_vram="10MB"))
    assert "alone" not in str(caught.value)


def test_the_cache_of_a_known_model():
    llama_3_8b = LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128
    )
    assert kv_cache_nbytes(llama_3_8b, context=8192, sequences=1) == 2**30
    assert kv_cache_nbytes(llama_3_8b, context=8192, sequences=4) == 2**32


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("num_tokens", [10, 40])
def test_the_cache_is_that_of_transformers(name, num_tokens):
    model = tiny.build(name)
    with torch.no_grad():
        cache = model(tiny.token_ids(2, num_tokens), use_cache=True).past_key_values
    held = [layer.keys.numel() + layer.values.numel() for layer in cache.layers]
    counted = kv_cache_nbytes(model.config, context=num_tokens, sequences=2)
    # transformers keeps one token less than the window: the newest is its query.
    sliding = [layer.keys.numel() // layer.keys.shape[-2] * 2 for layer in cache.layers if layer.is_sliding]
    spare = 2 * sum(sliding) if num_tokens > 16 else 0
    assert counted == 2 * sum(held) + spare


def test_windows_of_a_config():
    gemma = Gemma3TextConfig(
        num_hidden_layers=3,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    assert kv_cache_nbytes(gemma, context=100, sequences=1) == (16 + 100 + 16) * 2 * 8 * 2
    unused = Qwen2Config(
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, hidden_size=16, use_sliding_window=False
    )
    assert kv_cache_nbytes(unused, context=10**5, sequences=1) == 2 * 10**5 * 2 * 8 * 2


def config_of(**values):
    config = SimpleNamespace(**values)
    return SimpleNamespace(get_text_config=lambda decoder: config)


def test_a_config_that_says_little_counts_every_head():
    config = config_of(num_hidden_layers=2, num_attention_heads=4, hidden_size=64)
    assert kv_cache_nbytes(config, context=10, sequences=1) == 2 * 2 * 64 * 10 * 2


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"layer_types": ["full_attention", "linear_attention"]}, "layers of the kind 'linear_attention'"),
        ({"kv_lora_rank": 64}, "latent attention"),
        ({"num_attention_heads": None}, "num_attention_heads None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
    ],
)
def test_a_cache_that_cannot_be_counted_is_refused(values, says):
    config = config_of(**{"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64} | values)
    with pytest.raises(UnsupportedModelError, match=says) as caught:
        kv_cache_nbytes(config, context=10, sequences=1)
    assert "Use --max-size or --avg-bits instead" in str(caught.value)


def test_a_budget_survives_json_and_smallest_plans_fit(model):
    session = session_of(model, max_size="1GB")
    budget = budget_of(session)
    assert json.loads(json.dumps(budget)) == budget
    assert budget["nbytes"] > unmeasured_problem(session).largest_nbytes


def test_a_pin_is_the_width_itself_where_a_mixture_comes_to_the_same_mean(model):
    """Two widths, and profiles that come to 3 bits where the groups are even in number."""
    session = session_of(model, max_size="1MB")
    changes = {"quantizer.group_size": 32, "allocation.widths": [2, 4], "allocation.profiles": [3.0]}
    for pins, pinned in (({}, False), ({"down_proj": 8, "q_proj": 3}, True)):
        session = open_session(session.recipe.override(changes | {"allocation.pins": pins}))
        options = session.options()["model.layers.0.self_attn.q_proj"]
        assert [scheme.mixed for scheme in options] == [False, not pinned, False]
        unit = next(unit for unit in unmeasured_problem(session).units if unit.members[0].role.endswith("q_proj"))
        assert (3 in [scheme.bits for scheme in unit.schemes]) == pinned
        assert unit.pinned == pinned
