"""Siblings that share a launch give what each gives alone, and whatever is not as usual goes alone."""

import copy
import gc
import io
import threading
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from llmmpq.errors import RecipeError
from llmmpq.records import Scheme
from llmmpq.runtime import choice, ops, together
from llmmpq.runtime.linear import PackedLinear, share_launches
from llmmpq_kernels import cpu, native
from tests.unit.test_linear import random_packed

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="matrices of these tests are on the CPU"),
    pytest.mark.skipif(native.load().problem is not None, reason=str(native.load().problem)),
]
GOLDEN = Path(__file__).parents[1] / "golden" / "tiny-llama-v1"
WIDTH, ROWS = 72, {"q_proj": 40, "k_proj": 24, "v_proj": 17}


def keep(x):
    return x


class Attention(nn.Module):
    """As much of one as matters. `order` are the siblings to call, `change` what happens to x after the first."""

    def __init__(self, *, group_sizes=(32, 32, 32)):
        super().__init__()
        for place, (name, num_rows) in enumerate(ROWS.items()):
            packed = random_packed((num_rows, WIDTH), bits=place + 2, group_size=group_sizes[place], seed=place)
            bias = torch.randn(num_rows, generator=torch.Generator().manual_seed(place)) if place else None
            self.add_module(name, PackedLinear.from_packed(packed, bias))
        self.order = list(ROWS)
        self.change = keep

    def forward(self, x):
        found = {}
        for name in self.order:
            found[name] = getattr(self, name)(x)
            x = self.change(x)
        return found


@pytest.fixture(autouse=True)
def switched_on(monkeypatch):
    monkeypatch.setenv(choice.TOGETHER_VARIABLE, "1")
    choice.choose_together.cache_clear()
    yield
    choice._failures_together.clear()
    choice.choose_together.cache_clear()


@pytest.fixture
def launches(monkeypatch):
    """How many matrices each launch had."""
    seen, inner = [], cpu.multiply_together

    def count(x, members):
        seen.append(len(members))
        return inner(x, members)

    monkeypatch.setattr(cpu, "multiply_together", count)
    return seen


@pytest.fixture
def attention():
    module = Attention()
    share_launches(module)
    return module


def siblings_of(module) -> together.Siblings:
    (hook,) = module._forward_pre_hooks.values()
    return hook.__self__


def check(found, module, x):
    """Each output, bit for bit, is that of its matrix alone."""
    for name, y in found.items():
        assert torch.equal(y, ops.multiply(x, getattr(module, name).operands())), name


def test_one_launch_gives_what_three_give(attention, launches):
    for shape in ((WIDTH,), (1, 1, WIDTH), (3, WIDTH), (2, 8, WIDTH)):
        x = torch.randn(shape)
        launches.clear()
        found = attention(x)
        assert launches == [3]
        assert [y.shape for y in found.values()] == [(*shape[:-1], rows) for rows in ROWS.values()]
        check(found, attention, x)


def test_the_order_of_calls_is_free(attention, launches):
    attention.order, x = ["v_proj", "q_proj", "k_proj"], torch.randn(1, WIDTH)
    check(attention(x), attention, x)
    assert launches[:1] == [3]
    assert len(launches) == 4  # the three others are those of `check`


def test_many_rows_go_alone(attention, launches):
    x = torch.randn(17, WIDTH)
    check(attention(x), attention, x)
    assert launches == []
    assert not siblings_of(attention).apart


def test_a_sibling_left_out_costs_one_forward_only(attention, launches):
    attention.order, x = ["k_proj", "q_proj"], torch.randn(1, WIDTH)
    check(attention(x), attention, x)
    assert launches[0] == 3
    launches.clear()
    check(attention(x), attention, x)
    assert 3 not in launches
    assert siblings_of(attention).apart == {tuple(ROWS): "v_proj was not called with its siblings"}


@pytest.mark.parametrize(
    "change",
    [lambda x: x.add_(1), lambda x: x.clone(), lambda x: x.view(x.shape)],
    ids=["added to", "copied", "seen anew"],
)
def test_an_input_that_changed_is_another_input(attention, change):
    attention.order, attention.change = ["q_proj", "k_proj"], change
    x = torch.randn(1, WIDTH)
    inputs = [x.clone(), change(x.clone())]
    for _ in range(2):
        found = attention(inputs[0].clone())
        for (name, y), given in zip(found.items(), inputs, strict=True):
            assert torch.equal(y, ops.multiply(given, getattr(attention, name).operands()))
        assert "k_proj was called with another input" in siblings_of(attention).apart[tuple(ROWS)]


def test_parameters_put_in_meanwhile_are_used(attention):
    attention.order = ["q_proj", "k_proj"]

    def change(x):
        attention.k_proj.bias = nn.Parameter(torch.zeros(ROWS["k_proj"]), requires_grad=False)
        return x

    attention.change, x = change, torch.randn(1, WIDTH)
    check(attention(x), attention, x)


def test_the_same_sibling_twice_is_computed_twice(attention, launches):
    attention.order, x = ["q_proj", "q_proj", "k_proj", "v_proj"], torch.randn(1, WIDTH)
    found = attention(x)
    assert launches == [3, 1]
    check(found, attention, x)
    assert not siblings_of(attention).apart


def test_outside_of_the_parent_each_goes_alone(attention, launches):
    x = torch.randn(1, WIDTH)
    attention(x)
    launches.clear()
    assert attention.k_proj(x).shape == (1, 24)
    assert launches == [1]


def test_nothing_lives_longer_than_the_forward(attention, monkeypatch):
    seen, inner = [], ops.multiply_together

    def watch(x, members):
        outputs = inner(x, members)
        seen.extend(weakref.ref(output) for output in (x, *outputs))
        return outputs

    monkeypatch.setattr(ops, "multiply_together", watch)
    attention.order = ["q_proj"]
    attention(torch.randn(1, WIDTH))
    gc.collect()
    assert len(seen) == 4
    assert all(reference() is None for reference in seen)


def test_an_error_in_the_forward_leaves_nothing(attention):
    def fail(_x):
        raise KeyError("no luck")

    attention.change = fail
    with pytest.raises(KeyError):
        attention(torch.randn(1, WIDTH))
    assert together._here.call is None


def test_threads_never_swap_results(attention):
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(60):
            x = torch.randn(1, WIDTH, generator=generator)
            try:
                with torch.no_grad():
                    check(attention(x), attention, x)
            except AssertionError as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not siblings_of(attention).apart


def test_a_thread_does_not_see_the_parts_of_another(attention, launches):
    """The second runs between two siblings of the first, on the same tensor."""
    x, inner = torch.randn(1, WIDTH), []

    def change(given):
        if threading.current_thread() is threading.main_thread() and not inner:
            other = threading.Thread(target=lambda: inner.append(attention(x)))
            other.start()
            other.join()
        return given

    attention.change = change
    check(attention(x), attention, x)
    check(inner[0], attention, x)
    assert launches[:2] == [3, 3]


def test_copies_and_files_are_as_without(attention, launches):
    plain = Attention()
    assert list(attention.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in attention.named_modules()] == [name for name, _ in plain.named_modules()]
    file = io.BytesIO()
    torch.save(attention, file)
    file.seek(0)
    x = torch.randn(1, WIDTH)
    for other in (copy.deepcopy(attention), torch.load(file, weights_only=False), attention.to(torch.bfloat16)):
        launches.clear()
        given = x.to(other.k_proj.bias.dtype)
        found = other(given)
        assert launches == [3]
        check(found, other, given)
    alone = copy.deepcopy(attention.q_proj)
    assert sum(parameter.numel() for parameter in alone.parameters()) == sum(
        parameter.numel() for parameter in attention.q_proj.parameters()
    )


def test_a_gradient_and_uncounted_changes_go_alone(attention, launches):
    x = torch.randn(1, WIDTH)
    attention(x.clone().requires_grad_())
    with torch.inference_mode():
        y = attention(torch.randn(1, WIDTH))
    assert y["v_proj"].shape == (1, 17)
    assert 3 not in launches
    with torch.no_grad():
        attention(x.clone().requires_grad_())
    assert launches[-1] == 3


def test_compiles_without_a_graph_break(attention):
    x = torch.randn(2, 1, WIDTH)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    check(compiled(x), attention, x)
    compiled = torch.compile(lambda given: attention(given)["k_proj"] + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), attention(x)["k_proj"] + 1)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_siblings_go_alone(attention, launches, where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    x = torch.randn(1, WIDTH)
    wanted = attention(x)
    launches.clear()
    if where == "cpu":
        accelerate.cpu_offload(attention, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(attention, tmp_path, execution_device=torch.device("cpu"))
    for _ in range(2):
        found = attention(x)
        assert all(torch.equal(found[name], wanted[name]) for name in ROWS)
    assert launches == [1] * 6
    assert all(parameter.is_meta for parameter in attention.parameters())


def test_dispatched_without_offloading_they_still_share(attention, launches):
    accelerate = pytest.importorskip("accelerate")
    accelerate.dispatch_model(attention, {"": "cpu"}, main_device="cpu", force_hooks=True)
    x = torch.randn(1, WIDTH)
    found = attention(x)
    assert launches == [3]
    check(found, attention, x)


def test_groups_of_two_sizes_are_told_apart(launches):
    module = Attention(group_sizes=(32, 64, 32))
    share_launches(module)
    x = torch.randn(1, WIDTH)
    check(module(x), module, x)
    assert 3 not in launches
    members = [(linear.shape, linear.scheme) for linear in (module.q_proj, module.k_proj)]
    assert "groups of 32 and 64" in ops.explain_together(x.device, x.dtype, members).reason


def test_one_that_was_replaced_is_left_in_peace(attention, launches):
    attention.k_proj, x = nn.Linear(WIDTH, 3), torch.randn(1, WIDTH)
    assert attention(x)["k_proj"].shape == (1, 3)
    assert launches == [1, 1]


def test_a_launch_that_fails_gives_way_with_one_warning(attention, monkeypatch):
    def fail(x, members):
        raise RuntimeError("no luck") if len(members) > 1 else AssertionError("each alone was launched through here")

    inner, x = cpu.multiply, torch.randn(1, WIDTH)
    right = {name: inner(x, getattr(attention, name).operands()) for name in ROWS}
    monkeypatch.setattr(
        cpu, "multiply", lambda x, operands: right[next(n for n in ROWS if ROWS[n] == operands.shape[0])]
    )
    monkeypatch.setattr(cpu, "multiply_together", fail)
    with pytest.warns(RuntimeWarning, match="3 matrices in one launch, each is launched alone from now on: no luck"):
        found = attention(x)
    assert all(torch.equal(found[name], right[name]) for name in ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(x)


def test_the_switch(monkeypatch, launches):
    members = [((8, 64), Scheme(bits=4, group_size=32))] * 2
    for value, accepted, said in [
        ("1", True, "one call"),
        ("0", False, "=1 switches it on"),
        ("", False, "no gain on a CPU"),
    ]:
        monkeypatch.setenv(choice.TOGETHER_VARIABLE, value)
        found = ops.explain_together(torch.device("cpu"), torch.float32, members)
        assert (found.accepted, said in found.reason) == (accepted, True)
        module = Attention()
        share_launches(module)
        assert bool(module._forward_pre_hooks) == accepted
    monkeypatch.setenv(choice.TOGETHER_VARIABLE, "yes")
    with pytest.raises(RecipeError, match="LLMMPQ_TOGETHER is 'yes': set it to 1"):
        share_launches(Attention())


def test_a_parent_inside_another_does_not_set_the_outer_one_apart(launches):
    class Outer(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention()

        def forward(self, x):
            found = {"q_proj": self.q_proj(x)}
            self.inner(x)
            return found | {name: getattr(self, name)(x) for name in ("k_proj", "v_proj")}

    outer = Outer()
    share_launches(outer)
    for _ in range(2):
        outer(torch.randn(1, WIDTH))
    assert launches == [3, 3, 3, 3]
    assert not siblings_of(outer).apart


def test_an_error_between_siblings_proves_nothing_of_them(launches):
    class Failing(Attention):
        fails = True

        def forward(self, x):
            self.q_proj(x)
            if self.fails:
                raise ValueError("in between")
            return super().forward(x)

    module = Failing()
    share_launches(module)
    with pytest.raises(ValueError, match="in between"):
        module(torch.randn(1, WIDTH))
    assert not siblings_of(module).apart


def test_an_interrupted_forward_leaves_nothing_to_the_next(launches):
    class Interrupted(Attention):
        interrupts = True

        def forward(self, x):
            if self.interrupts:
                self.q_proj(x)
                raise KeyboardInterrupt
            return super().forward(x)

    module = Interrupted()
    share_launches(module)
    x = torch.randn(1, WIDTH)
    with pytest.raises(KeyboardInterrupt):
        module(x)
    module.interrupts = False
    module(x)
    assert together._here.call is None
    assert launches == [3, 3]
    assert not siblings_of(module).apart


def test_explaining_on_a_gpu(monkeypatch):
    """A GPU that is not there: only what is asked of torch about it is replaced."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Imaginary")
    device, four = torch.device("cuda", 0), Scheme(bits=4, group_size=64)
    wide = Scheme(bits=None, runs=((2, 1), (3, 1), (4, 1), (8, 1)), group_size=64)

    def told(*schemes, num_rows=1):
        found = ops.explain_together(device, torch.bfloat16, [((40, 256), s) for s in schemes], num_rows=num_rows)
        return found.backend, found.accepted, found.reason

    assert told(four, four, Scheme(bits=3, group_size=64)) == (
        "gemv",
        True,
        "one launch for all of them, which nobody measured",
    )
    assert told(four, four, num_rows=16) == ("separate", False, "gemm takes one matrix at a time")
    assert told(wide, wide, four)[2] == "9 runs of widths together, at most 8"
    assert told(four, Scheme(bits=4, group_size=24))[2] == "their kernels differ: gemv and reference"


def test_a_loaded_model_shares_launches_and_says_the_same(monkeypatch, launches):
    """Loaded, saved and dequantized as anything else; the text that it writes does not change by a token."""
    from llmmpq.hf import LlmmpqForCausalLM

    model = LlmmpqForCausalLM.from_pretrained(str(GOLDEN))
    ids = torch.arange(5)[None]
    together_text = model.generate(ids, max_new_tokens=8, do_sample=False)
    num_blocks = model.config.num_hidden_layers
    assert launches.count(3) >= 8 * num_blocks
    assert launches.count(2) >= 8 * num_blocks
    assert not any(siblings_of(block.self_attn).apart for block in model.model.layers)
    monkeypatch.setenv(choice.TOGETHER_VARIABLE, "0")
    alone = LlmmpqForCausalLM.from_pretrained(str(GOLDEN))
    launches.clear()
    assert torch.equal(alone.generate(ids, max_new_tokens=8, do_sample=False), together_text)
    assert set(launches) == {1}
    assert list(model.state_dict()) == list(alone.state_dict())
    model.dequantize()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
