"""The streamed states against those of the whole model, for every promised architecture; and what is left in memory."""

import gc
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from llmmpq.errors import UnsupportedModelError
from llmmpq.model.checkpoint import Checkpoint
from llmmpq.model.skeleton import Skeleton
from llmmpq.model.stream import BlockStream
from llmmpq.records import LinearSpec
from tests import tiny

CPU = torch.device("cpu")
# Longer than the sliding window of 16, so that a mask that was lost or taken from another layer shows.
WINDOWS = tiny.token_ids(3, 24)


def stream_of(opened, *, windows=WINDOWS, dtype=torch.float32, **options) -> BlockStream:
    skeleton, checkpoint = opened
    return BlockStream(skeleton, checkpoint, windows, device=CPU, dtype=dtype, **options)


def states_of_whole_model(opened, *, dtype=torch.float32):
    """(entering, leaving) states of every block, by hooks on the model as transformers loads and runs it."""
    skeleton, checkpoint = opened
    model, seen = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype).eval(), {}

    def note(block_name):
        def hook(_module, args, kwargs, output):
            entering = args[0] if args else kwargs["hidden_states"]
            seen[block_name] = (entering, output[0] if isinstance(output, tuple) else output)

        return hook

    for block_name in skeleton.block_names:
        model.get_submodule(block_name).register_forward_hook(note(block_name), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=WINDOWS, use_cache=False)
    return [seen[block_name] for block_name in skeleton.block_names]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max().clamp_min(1)))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_states_are_those_of_the_whole_model(opened, name, batch):
    expected = states_of_whole_model(opened(name))
    num_blocks = 0
    for block in stream_of(opened(name), batch=batch):
        assert [len(state) for state in block.states] == {1: [1, 1, 1], 2: [2, 1], 3: [3]}[batch]
        entering, leaving = expected[block.index]
        assert_close(torch.cat(block.states), entering)
        assert_close(torch.cat(list(block.run())), leaving)
        num_blocks += 1
    assert num_blocks == len(expected) >= 2


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_second_iteration_gives_the_same(opened, name):
    stream = stream_of(opened(name), batch=2)
    first, second = ([torch.cat(list(block.run())) for block in stream] for _ in range(2))
    assert len(first) == len(second) >= 2
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_bfloat16_states_are_those_of_the_whole_model(opened, name):
    expected = states_of_whole_model(opened(name), dtype=torch.bfloat16)
    for block in stream_of(opened(name), batch=3, dtype=torch.bfloat16):
        entering, leaving = expected[block.index]
        assert block.states[0].dtype == torch.bfloat16
        assert torch.equal(torch.cat(block.states), entering)
        assert torch.equal(torch.cat(list(block.run())), leaving)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_after_the_loop_all_is_on_meta_again(opened, name):
    skeleton, _ = opened(name)
    for block in stream_of(opened(name)):
        loaded = {n for n, p in skeleton.model.named_parameters() if not p.is_meta}
        # One block at a time, and of the embedding side nothing.
        assert loaded
        assert all(n.startswith(block.name + ".") for n in loaded)
        assert not any(p.is_meta for p in block.module.parameters())
    assert all(tensor.is_meta for tensor in skeleton.model.state_dict().values())


@pytest.mark.parametrize("name", tiny.NAMES)
def test_backwards_the_blocks_are_the_same_one_at_a_time(opened, name):
    skeleton, _ = opened(name)
    entering, leaving = [], []
    for block in stream_of(opened(name), batch=2):
        entering.append(list(block.states))
        leaving.append(list(block.run()))
    indices = []
    for block in stream_of(opened(name), batch=2).backwards(lambda index: entering[index]):
        indices.append(block.index)
        loaded = {n for n, p in skeleton.model.named_parameters() if not p.is_meta}
        assert loaded
        assert all(n.startswith(block.name + ".") for n in loaded)
        assert all(torch.equal(one, two) for one, two in zip(block.run(), leaving[block.index], strict=True))
    assert indices == list(reversed(range(len(skeleton.block_names))))
    assert all(tensor.is_meta for tensor in skeleton.model.state_dict().values())


def test_a_loop_that_is_left_early_frees_its_block(opened):
    skeleton, _ = opened("llama")
    blocks = iter(stream_of(opened("llama")))
    next(blocks)
    blocks.close()
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    blocks = iter(stream_of(opened("llama")))
    next(blocks)
    with pytest.raises(ZeroDivisionError):
        blocks.throw(ZeroDivisionError)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_weights_of_a_passed_block_are_not_held(opened):
    weak = []
    for block in stream_of(opened("llama"), follow_original=True):
        gc.collect()
        assert [ref() for ref in weak] == [None] * len(weak)
        weak = [weakref.ref(tensor) for tensor in block.original_weights.values()]
        weak += [weakref.ref(parameter) for parameter in block.module.parameters()]
    assert len(weak) > 7


def test_backwards_they_are_gone_before_the_next_are_loaded(opened):
    weak, seen = [], []

    def entering(index):
        gc.collect()
        seen.append([ref() for ref in weak])
        return [torch.zeros(1, 24, tiny.HIDDEN)] * len(WINDOWS)

    for block in stream_of(opened("llama")).backwards(entering):
        assert len(block.states) == len(WINDOWS)
        weak = [weakref.ref(tensor) for tensor in block.original_weights.values()]
        weak += [weakref.ref(parameter) for parameter in block.module.parameters()]
    assert len(weak) > 7
    entering(0)  # nobody is asked for what enters block 0: it was embedded
    assert seen == [[], [None] * len(weak), [None] * len(weak)]


def test_a_block_that_is_kept_does_not_keep_its_weights(opened):
    for block in list(stream_of(opened("llama"))):
        assert block.original_weights == {}


def test_a_change_of_weights_is_seen_by_the_next_block(opened):
    states = {}
    for block in stream_of(opened("llama")):
        states[block.index] = torch.cat(block.states)
        if block.index == 0:
            for parameter in block.module.parameters():
                parameter.data = torch.zeros_like(parameter)
    # Without weights a block is the identity; the unchanged model's states differ.
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[1], states[2])


def test_following_the_original_beside_a_changed_model(opened):
    expected = states_of_whole_model(opened("llama"))
    for block in stream_of(opened("llama"), batch=2, follow_original=True):
        entering, leaving = expected[block.index]
        assert_close(torch.cat(block.original_states), entering)
        assert (block.index == 0) == torch.equal(torch.cat(block.states), torch.cat(block.original_states))
        for spec in block.linears:
            block.linear(spec).weight.data = torch.zeros(spec.shape)
        with block.with_original_weights():
            assert_close(torch.cat(list(block.run(block.original_states))), leaving)
        assert not any(block.linear(spec).weight.any() for spec in block.linears)


def test_without_following_there_are_no_original_states(opened):
    for block in stream_of(opened("llama")):
        assert block.original_states is None


def test_states_are_kept_in_the_compute_dtype(opened):
    for block in stream_of(opened("opt"), dtype=torch.float16, states_on_host=True):
        assert {state.dtype for state in block.states} == {torch.float16}


def test_run_leaves_no_graph(opened):
    for block in stream_of(opened("llama")):
        for parameter in block.module.parameters():
            parameter.requires_grad_(True)
        assert not any(output.requires_grad for output in block.run())
        assert not any(inputs.requires_grad for inputs, _ in block.inputs_of(block.linears[0]))


# Inputs of linears

GROUPS = {
    "gpt_neox": [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
}
LLAMA_GROUPS = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_groups_share_an_input_and_come_in_the_order_of_the_run(opened, name):
    for block in stream_of(opened(name)):
        groups = block.input_groups()
        found = [[spec.role for spec in group] for group in groups]
        if name == "gpt_neox":  # two norms feed the attention and the MLP
            assert found == [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]]
        else:
            assert found == GROUPS.get(name, LLAMA_GROUPS)
        assert sorted(spec.name for group in groups for spec in group) == sorted(spec.name for spec in block.linears)
        for group in groups:
            (first, _), *others = (next(block.inputs_of(spec)) for spec in group)
            assert all(torch.equal(first, other) for other, _ in others)


def test_inputs_are_those_that_the_whole_model_has_there(opened):
    model, seen = tiny.build("llama"), {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _m, args, path=path: seen.__setitem__(path, args[0]))
    with torch.no_grad():
        model(input_ids=WINDOWS, use_cache=False)
    for block in stream_of(opened("llama"), batch=2):
        for spec in block.linears:
            assert_close(torch.cat([inputs for inputs, _ in block.inputs_of(spec)]), seen[spec.name])
        shown = {spec.name: [] for spec in block.linears}
        for _ in block.run_with_inputs(lambda spec, x, shown=shown: shown[spec.name].append(x), block.linears):
            pass
        for spec in block.linears:
            assert_close(torch.cat(shown[spec.name]), seen[spec.name])


def test_hooks_are_gone_after_use(opened):
    for block in stream_of(opened("llama")):
        list(block.inputs_of(block.linears[-1]))
        next(block.inputs_of(block.linears[0]))  # left early
        block.input_groups()
        gc.collect()
        assert not any(module._forward_pre_hooks for module in block.module.modules())
    assert not any(module._forward_pre_hooks for module in opened("llama")[0].model.modules())


def test_original_inputs_come_from_original_weights_and_states(opened):
    stream = stream_of(opened("llama"), follow_original=True)
    plain = {
        spec.name: torch.cat([inputs for inputs, _ in block.inputs_of(spec)])
        for block in stream_of(opened("llama"))
        for spec in block.linears
    }
    for block in stream:
        for spec in block.linears:
            block.linear(spec).weight.data = 0.9 * block.linear(spec).weight.data
        for spec in block.linears:
            inputs, originals = (torch.cat(part) for part in zip(*block.inputs_of(spec), strict=True))
            assert_close(originals, plain[spec.name])
            if block.index > 0 or spec.role not in ("q_proj", "k_proj", "v_proj"):
                assert not torch.allclose(inputs, originals)


# Models made to be awkward


class ToyBlock(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.used = nn.Linear(8, 8)
        self.spare = nn.Linear(8, 8)

    def forward(self, hidden_states, extra=None):
        output = hidden_states + self.used(hidden_states)
        if self.kind == "routed" and float(hidden_states.sum()) > 0:
            output = output + self.spare(output)
        if self.kind == "narrows":
            output = output[..., :4]
        return (output, None) if self.kind in ("tuple", "between tuples") else output


class Toy(nn.Module):
    """`kind` says what its blocks, or what happens between them, does not do as in the usual decoder."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(ToyBlock(kind) for _ in range(2))

    def forward(self, input_ids, use_cache=False):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            extra = input_ids[..., None].float() if self.kind == "token argument" else None
            hidden = layer(hidden, extra)
            hidden = hidden[0] if self.kind in ("tuple", "between tuples") else hidden
            hidden = 2 * hidden if self.kind.startswith("between") else hidden
        return hidden


@pytest.fixture
def toy(tmp_path):
    def make(kind: str, windows: torch.Tensor, batch: int = 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            whole = Toy(kind)
        save_file(whole.state_dict(), tmp_path / "model.safetensors")
        with torch.device("meta"):
            empty = Toy(kind)
        specs = tuple(
            LinearSpec(
                name=f"layers.{index}.{role}",
                shape=(8, 8),
                dtype="F32",
                block=index,
                role=role,
                fused_set=f"layers.{index}.{role}",
            )
            for index in range(2)
            for role in ("used", "spare")
        )
        skeleton = Skeleton(
            model=empty,
            block_names=("layers.0", "layers.1"),
            linears=specs,
            kept=(),
            stored_names={name: name for name in whole.state_dict()},
            ignored=(),
        )
        stream = BlockStream(skeleton, Checkpoint.open(tmp_path), windows, device=CPU, dtype=torch.float32, batch=batch)
        return whole, stream

    return make


TOY_WINDOWS = torch.arange(12).reshape(3, 4)


@pytest.mark.parametrize("kind", ["usual", "tuple", "routed"])
@pytest.mark.parametrize("batch", [1, 2])
def test_blocks_that_return_a_tensor_or_a_tuple(toy, kind, batch):
    whole, stream = toy(kind, TOY_WINDOWS, batch)
    outputs = [torch.cat(list(block.run())) for block in stream]
    with torch.no_grad():
        if kind == "routed":
            expected = torch.cat([whole(ids) for ids in TOY_WINDOWS.split(batch)])
        else:
            expected = whole(TOY_WINDOWS)
    assert_close(outputs[-1], expected)


def test_a_linear_that_never_runs_is_in_no_group(toy):
    _, stream = toy("usual", TOY_WINDOWS)
    for block in stream:
        assert [[spec.role for spec in group] for group in block.input_groups()] == [["used"]]


def test_a_block_that_narrows_its_states_is_refused(toy):
    _, stream = toy("narrows", TOY_WINDOWS)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0 turned states of shape \[1, 4, 8\] into \[1, 4, 4\]"):
        list(stream)


def test_an_argument_that_depends_on_the_tokens_is_refused(toy):
    _, stream = toy("token argument", TOY_WINDOWS)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0 takes an argument that depends on the tokens"):
        next(iter(stream))


@pytest.mark.parametrize("kind", ["between", "between tuples"])
def test_a_model_that_changes_the_states_between_blocks_is_refused(toy, kind):
    """Streamed as if nothing happened between blocks, its states would be wrong."""
    _, stream = toy(kind, TOY_WINDOWS)
    with pytest.raises(UnsupportedModelError):
        next(iter(stream))


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_linear_that_runs_for_some_batches_only(toy, order):
    """Routed experts: the batches that do not reach a linear must not end the run, nor hide those that do."""
    windows = torch.tensor([[9, 9], [3, 3]])[order]
    whole, stream = toy("routed", windows)
    assert sorted((whole.embed(windows).sum(dim=(1, 2)) > 0).tolist()) == [False, True]
    blocks = iter(stream)
    block = next(blocks)
    groups = block.input_groups()
    assert [[spec.role for spec in group] for group in groups] == [["used"], ["spare"]]
    spare = groups[1][0]
    with torch.no_grad():
        reached = [whole.embed(ids[None]) for ids in stream.windows if whole.embed(ids).sum() > 0]
        expected = [state + whole.layers[0].used(state) for state in reached]
    assert_close(torch.cat([inputs for inputs, _ in block.inputs_of(spare)]), torch.cat(expected))
