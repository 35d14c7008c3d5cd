"""Where outputs are added to a stream, found on every promised architecture, and the errors collected there."""

import pytest
import torch

from llmmpq.model.landing import Landing, errors_where_it_lands, landing_of
from llmmpq.model.stream import BlockStream
from tests import tiny

CPU = torch.device("cpu")
WINDOWS = tiny.token_ids(3, 24)
BEHIND_ATTENTION = {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": None}
# None: the output of the block. Gemma's norms come before the addition: there an output is only itself.
LANDINGS = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3"), BEHIND_ATTENTION) | {
    "gemma3": {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": "post_feedforward_layernorm"},
    "gpt_neox": {"attention.dense": None, "mlp.dense_4h_to_h": None},
    "opt": {"self_attn.out_proj": "final_layer_norm", "fc2": None},
}


@pytest.fixture
def block_of(opened):
    def first_block(name, dtype=torch.float32):
        skeleton, checkpoint = opened(name)
        blocks = iter(BlockStream(skeleton, checkpoint, WINDOWS, device=CPU, dtype=dtype, follow_original=True))
        generators.append(blocks)
        return next(blocks)

    generators = []
    yield first_block
    for blocks in generators:
        blocks.close()


@pytest.fixture
def hooked():
    """Forward hooks that are gone after the test: the modules are shared by all tests of this file."""
    handles = []
    yield lambda module, hook: handles.append(module.register_forward_hook(hook))
    for handle in handles:
        handle.remove()


def spec_of(block, role):
    return next(spec for spec in block.linears if spec.name.endswith(role))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_what_is_added_to_a_stream_is_found_and_nothing_else(block_of, name, dtype):
    block = block_of(name, dtype)
    found = {spec.name.removeprefix(block.name + "."): landing_of(block, spec) for spec in block.linears}
    assert {role: landing.module for role, landing in found.items() if landing} == LANDINGS[name]
    assert {landing.factor for landing in found.values() if landing} == {1.0}


def test_a_scaled_addition_is_found_with_its_factor_and_its_error_in_the_layers_own_terms(block_of, hooked):
    block = block_of("llama")
    hooked(block.module.self_attn, lambda _module, _args, output: (0.25 * output[0], *output[1:]))
    spec = spec_of(block, "o_proj")
    landing = landing_of(block, spec)
    assert landing == Landing(module="post_attention_layernorm", factor=0.25)
    block.states = [state + 0.5 for state in block.states]
    block.linear(spec_of(block, "v_proj")).weight.data = 0 * block.linear(spec_of(block, "v_proj")).weight.data
    for state, (inputs, errors) in zip(block.states, errors_where_it_lands(block, spec, landing), strict=True):
        assert not inputs.any()  # without values attention gives nothing, and all of the original's is missing
        with block.with_original_weights():
            original, _ = block.module.self_attn.forward(
                block.module.input_layernorm(state - 0.5),
                **attention_arguments(block, state),
            )
        torch.testing.assert_close(0.25 * errors, 0.25 * original - 0.5, rtol=0, atol=1e-4)


def attention_arguments(block, state):
    seen = {}

    def note(_module, _args, kwargs):
        seen.update({key: value for key, value in kwargs.items() if key != "hidden_states"})

    handle = block.module.self_attn.register_forward_pre_hook(note, with_kwargs=True)
    block.call(state)
    handle.remove()
    return seen


@pytest.mark.parametrize(("name", "role"), [("llama", "down_proj"), ("gpt_neox", "dense"), ("opt", "fc2")])
def test_errors_at_the_end_of_the_block_are_those_of_its_output(block_of, name, role):
    block = block_of(name)
    generator = torch.Generator().manual_seed(0)
    block.states = [state + 0.1 * torch.randn(state.shape, generator=generator) for state in block.states]
    first = block.linear(block.linears[0])
    first.weight.data = first.weight.data + 0.01
    with block.with_original_weights():
        wanted = list(block.run(block.original_states))
    spec = spec_of(block, role)
    pairs = list(errors_where_it_lands(block, spec, landing_of(block, spec)))
    assert len(pairs) == len(block.states) == 3
    for (inputs, errors), output, expected in zip(pairs, block.run(), wanted, strict=True):
        assert inputs.shape[-1] == spec.shape[1]
        torch.testing.assert_close(errors, expected - output, rtol=0, atol=1e-5)


def test_a_window_with_bad_values_does_not_hide_the_place(block_of):
    block = block_of("llama")
    spec = spec_of(block, "o_proj")
    block.states[0][0, 17:] = torch.nan
    assert landing_of(block, spec).module == "post_attention_layernorm"
    for state in block.states:
        state[0, 3, 0] = torch.inf
    assert landing_of(block, spec) is None


def test_a_module_called_twice_is_no_place(block_of, monkeypatch):
    """Its first call would be taken for the one behind the linear, and no error would ever be collected."""
    block = block_of("llama")
    monkeypatch.setitem(block.module._modules, "post_attention_layernorm", block.module.input_layernorm)
    spec = spec_of(block, "o_proj")
    landing = landing_of(block, spec)
    assert landing is None or landing.module != "input_layernorm"
    down = spec_of(block, "down_proj")
    assert len(list(errors_where_it_lands(block, down, landing_of(block, down)))) == len(block.states)


def test_a_linear_called_twice_lands_nowhere(block_of, monkeypatch):
    block = block_of("llama")
    spec = spec_of(block, "down_proj")
    mlp, linear = block.module.mlp, block.linear(spec)
    plain = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda states: plain(states) + linear(torch.zeros(1, spec.shape[1])))
    assert landing_of(block, spec) is None


def test_a_quiet_layer_in_bfloat16_still_stands_out(block_of):
    block = block_of("llama", torch.bfloat16)
    spec = spec_of(block, "o_proj")
    block.linear(spec).weight.data = 1e-4 * block.linear(spec).weight.data
    assert landing_of(block, spec) == Landing(module="post_attention_layernorm", factor=1.0)


def test_inputs_used_as_a_buffer_afterwards_are_kept(block_of, hooked):
    block = block_of("llama")
    spec = spec_of(block, "down_proj")
    expected = [inputs for inputs, _ in errors_where_it_lands(block, spec, landing_of(block, spec))]
    hooked(block.linear(spec), lambda _module, args, output: (args[0].zero_(), output)[1])
    found = [inputs for inputs, _ in errors_where_it_lands(block, spec, Landing(module=None, factor=1.0))]
    assert all(torch.equal(one, two) for one, two in zip(expected, found, strict=True))


def test_looking_leaves_nothing_behind(block_of):
    block = block_of("qwen3")
    before = list(block.run())
    for spec in block.linears:
        landing = landing_of(block, spec)
        if landing:
            list(errors_where_it_lands(block, spec, landing))
    assert all(torch.equal(one, two) for one, two in zip(before, block.run(), strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.module.modules())
