"""PackedLinear and its operator against nn.Linear on the dequantized weight."""

import copy
import warnings

import pytest
import torch
from torch import nn

from llmmpq.errors import CheckpointError, KernelUnavailableError
from llmmpq.records import PackedTensor, Scheme
from llmmpq.runtime import choice, ops
from llmmpq.runtime.linear import PackedLinear
from llmmpq_kernels import cpu, native, pack

SHAPE = (40, 72)


def random_packed(shape=SHAPE, *, bits=4, group_size=32, symmetric=False, seed=0) -> PackedTensor:
    generator = torch.Generator().manual_seed(seed)
    scheme = Scheme(bits=bits, group_size=group_size, symmetric=symmetric)
    num_rows, num_columns = shape
    num_groups = scheme.num_groups(num_columns)

    def random_codes(*dims):
        return torch.randint(0, 1 << bits, dims, generator=generator, dtype=torch.uint8)

    return PackedTensor(
        words=pack(random_codes(num_rows, num_columns), bits=bits),
        scales=(0.1 * torch.randn(num_rows, num_groups, generator=generator)).to(torch.float16),
        zeros=None if symmetric else pack(random_codes(num_groups, num_rows), bits=bits),
        scheme=scheme,
        shape=shape,
    )


def plain(packed: PackedLinear, dtype=torch.float32) -> nn.Linear:
    linear = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None, dtype=dtype)
    linear.weight.data = packed.dequantize(dtype)
    if packed.bias is not None:
        linear.bias.data = packed.bias.data.to(dtype)
    return linear.requires_grad_(False)


def random_bias(seed=1) -> torch.Tensor:
    return torch.randn(SHAPE[0], generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_output_is_that_of_the_dequantized_linear(bits, symmetric, dtype):
    linear = PackedLinear.from_packed(random_packed(bits=bits, symmetric=symmetric), random_bias().to(dtype))
    x = torch.randn(2, 5, SHAPE[1], generator=torch.Generator().manual_seed(2)).to(dtype)
    y = linear(x)
    assert y.dtype == dtype
    # Weights are not rounded to x's dtype on a CPU, so the product in float32 is the nearer one.
    wanted = plain(linear, torch.float32)(x.float())
    torch.testing.assert_close(y.float(), wanted, rtol=max(2e-5, 2 * torch.finfo(dtype).eps), atol=2e-4)


@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3), (0,), (0, 4), (2, 0), (2, 1, 3)])
def test_leading_dimensions(lead):
    linear = PackedLinear.from_packed(random_packed())
    x = torch.randn(*lead, SHAPE[1])
    assert linear(x).shape == (*lead, SHAPE[0])
    torch.testing.assert_close(linear(x), plain(linear)(x))


def test_strided_input():
    linear = PackedLinear.from_packed(random_packed(), random_bias())
    for x in (torch.randn(SHAPE[1], 6).T, torch.randn(3, 4, SHAPE[1]).transpose(0, 1), torch.randn(9, SHAPE[1])[::2]):
        assert not x.is_contiguous()
        torch.testing.assert_close(linear(x), plain(linear)(x.contiguous()), rtol=2e-5, atol=1e-4)


def test_wrong_input_size_is_refused():
    linear = PackedLinear.from_packed(random_packed())
    with pytest.raises(ValueError, match=r"71 features.*takes 72"):
        linear(torch.randn(2, 71))


def test_a_matrix_without_data_is_refused():
    linear = PackedLinear((64, 64), Scheme(bits=4, group_size=32))
    with pytest.raises(KernelUnavailableError, match=r"is on meta, its input on cpu.*holds no data"):
        linear(torch.randn(1, 64))
    assert linear(torch.empty(1, 64, device="meta")).shape == (1, 64)


def test_built_empty_on_meta_or_a_device():
    scheme = Scheme(bits=3, group_size=32)
    linear = PackedLinear(SHAPE, scheme, has_bias=True, bias_dtype=torch.bfloat16)
    stored = {name: (str(p.dtype).removeprefix("torch."), tuple(p.shape)) for name, p in linear.named_parameters()}
    assert stored == scheme.tensors(SHAPE) | {"bias": ("bfloat16", (40,))}
    assert {parameter.device.type for parameter in linear.parameters()} == {"meta"}
    assert not any(parameter.requires_grad for parameter in linear.parameters())
    assert PackedLinear(SHAPE, scheme, device="cpu").words.device.type == "cpu"
    assert PackedLinear(SHAPE, Scheme(bits=3, group_size=32, symmetric=True)).zeros is None
    assert "bits=3, group_size=32, asymmetric" in repr(linear)
    assert linear.to_empty(device="cpu").words.device.type == "cpu"


@pytest.mark.parametrize(
    "cast",
    [
        lambda linear: linear.to(torch.bfloat16),
        lambda linear: linear.half(),
        lambda linear: linear.double(),
        lambda linear: linear.type(torch.float64),
        lambda linear: nn.Sequential(linear).to("cpu", torch.bfloat16)[0],
        lambda linear: copy.deepcopy(linear).float(),
    ],
)
def test_casting_leaves_the_stored_tensors(cast):
    packed = random_packed()
    linear = cast(PackedLinear.from_packed(packed, random_bias().to(torch.float16)))
    for name, tensor in packed.tensors().items():
        assert getattr(linear, name).dtype == tensor.dtype
        assert torch.equal(getattr(linear, name), tensor)
    assert linear.bias.dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32)


def test_casting_changes_the_bias():
    linear = PackedLinear.from_packed(random_packed(), random_bias())
    assert linear.to(torch.bfloat16).bias.dtype == torch.bfloat16


def test_state_dict_round_trip():
    source = PackedLinear.from_packed(random_packed(), random_bias())
    target = PackedLinear(SHAPE, source.scheme, has_bias=True, device="cpu")
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, SHAPE[1])
    assert torch.equal(target(x), source(x))


def test_from_packed_refuses_tensors_that_do_not_fit():
    good = random_packed()
    fields = {"words": good.words, "scales": good.scales, "zeros": good.zeros, "scheme": good.scheme, "shape": SHAPE}
    for change, message in [
        ({"words": good.words[:, :-1]}, r"words is torch.int32 \[40, 11\]"),
        ({"scales": good.scales.float()}, "scales is torch.float32"),
        ({"zeros": None}, "zeros"),
        ({"shape": (40, 73 + 32)}, "words"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            PackedLinear.from_packed(PackedTensor(**(fields | change)))
    with pytest.raises(CheckpointError, match=r"bias is torch.float32 \[39\]"):
        PackedLinear.from_packed(good, random_bias()[:-1])


def test_a_gradient_is_refused_and_never_silent():
    linear = PackedLinear.from_packed(random_packed())
    x = torch.randn(2, SHAPE[1], requires_grad=True)
    y = linear(x)
    with pytest.raises(KernelUnavailableError, match="no gradient"):
        y.sum().backward()
    with torch.no_grad():
        assert not linear(x).requires_grad


def picks(*arguments, **options) -> dict[str, tuple[bool, str]]:
    return {name: (accepted, reason) for name, accepted, reason in ops.explain(*arguments, **options)}


def test_explain_says_which_backend_runs_and_why():
    scheme = Scheme(bits=4, group_size=32)
    found = picks(torch.device("cpu"), torch.float32, SHAPE, scheme)
    assert list(found) == ["gemv", "gemm", "dequantized", "cpu", "reference"]
    assert all(reason for _, reason in found.values())
    assert found["gemv"] == (False, "Triton kernels need a CUDA device, this is cpu")
    assert found["reference"][0]
    odd = picks(torch.device("cpu"), torch.float32, SHAPE, Scheme(bits=4, group_size=24))
    assert odd["cpu"][0] is False
    assert "not a multiple of 32" in odd["cpu"][1]
    refused = ops.explain(torch.device("cpu"), torch.int64, SHAPE, scheme)
    assert not any(candidate.accepted for candidate in refused)
    with pytest.raises(KernelUnavailableError, match="not floating point"):
        PackedLinear.from_packed(random_packed())(torch.zeros(2, SHAPE[1], dtype=torch.int64))


def test_rows_and_dtype_choose_the_kernel_on_a_gpu(monkeypatch):
    """A GPU that is not there: only what is asked of torch about it is replaced."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Imaginary")
    device, scheme = torch.device("cuda", 0), Scheme(bits=3, group_size=64)
    for num_rows, backend in [(1, "gemv"), (16, "gemm"), (2048, "dequantized")]:
        first = next(
            one for one in ops.explain(device, torch.bfloat16, SHAPE, scheme, num_rows=num_rows) if one.accepted
        )
        assert first.backend == backend
        assert "nobody measured" in first.reason
    in_float32 = picks(device, torch.float32, SHAPE, scheme)
    assert [name for name, (accepted, _) in in_float32.items() if accepted] == ["reference"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert picks(device, torch.bfloat16, SHAPE, scheme)["gemv"] == (
        False,
        "compute capability 7.5, at least 8.0 is needed",
    )


@pytest.fixture
def broken_cpu_kernel(monkeypatch):
    def fail(x, operands):
        raise RuntimeError("no luck\nand more lines")

    monkeypatch.setattr(cpu, "multiply", fail)
    monkeypatch.setattr(native, "load", lambda: native.Library(object(), None))
    choice.choose.cache_clear()
    yield
    choice._failures.clear()
    choice.choose.cache_clear()


def test_a_kernel_that_fails_gives_way_to_the_reference_with_one_warning(broken_cpu_kernel):
    linear = PackedLinear.from_packed(random_packed())
    x = torch.randn(3, SHAPE[1])
    with pytest.warns(RuntimeWarning, match="the cpu kernel failed on cpu .* the slow reference runs .*: no luck$"):
        y = linear(x)
    torch.testing.assert_close(y, plain(linear)(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear(x)
    assert picks(torch.device("cpu"), torch.float32, SHAPE, linear.scheme)["cpu"] == (False, "failed earlier: no luck")


def test_the_reference_says_why_it_runs_once_for_each_reason():
    choice._warn_once.cache_clear()
    x = torch.randn(3, SHAPE[1])
    with pytest.warns(RuntimeWarning, match="the slow reference runs in their place: groups of 24 are not a multiple"):
        PackedLinear.from_packed(random_packed((41, SHAPE[1]), group_size=24))(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PackedLinear.from_packed(random_packed((43, SHAPE[1]), group_size=24))(x)
    with pytest.warns(RuntimeWarning, match="activations are float64, it takes float32"):
        PackedLinear.from_packed(random_packed((44, SHAPE[1])))(x.double())


def test_memory_that_runs_out_is_no_fault_of_the_kernel(broken_cpu_kernel, monkeypatch):
    monkeypatch.setattr(cpu, "multiply", lambda _x, _operands: torch.empty(1 << 46))
    linear = PackedLinear.from_packed(random_packed())
    with pytest.raises(RuntimeError, match="allocate"):
        linear(torch.randn(3, SHAPE[1]))
    assert picks(torch.device("cpu"), torch.float32, SHAPE, linear.scheme)["cpu"][0]


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_operator_keeps_torchs_contract(symmetric):
    packed = random_packed(symmetric=symmetric)
    x = torch.randn(2, 3, SHAPE[1])
    arguments = (x, packed.words, packed.scales, packed.zeros, random_bias(), None, None, [4, 3], 32)
    torch.library.opcheck(torch.ops.llmmpq.packed_linear.default, arguments)


def test_the_fake_takes_its_arguments_by_name_too():
    """It names only those it needs; torch must hand over the others in place."""
    packed = random_packed()
    named = {
        "words": packed.words,
        "scales": packed.scales,
        "zeros": packed.zeros,
        "bias": None,
        "order": None,
        "scale_base": None,
    }
    given = {"x": torch.randn(2, 3, SHAPE[1]), **named}
    given = {name: value if value is None else value.to("meta") for name, value in given.items()}
    assert torch.ops.llmmpq.packed_linear(**given, runs=[4, 3], group_size=32).shape == (2, 3, SHAPE[0])


def test_compiles_without_a_graph_break():
    model = nn.Sequential(
        PackedLinear.from_packed(random_packed(), random_bias()),
        nn.GELU(),
        PackedLinear.from_packed(random_packed((16, 40), symmetric=True)),
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens in (3, 5):
        x = torch.randn(2, num_tokens, SHAPE[1])
        torch.testing.assert_close(compiled(x), model(x))


def test_transforms_and_replicas_compute_the_same_and_put_no_kernel_out():
    """Tensors inside a transform hold no data; a replica of torch's DataParallel holds no parameters."""
    linear = PackedLinear.from_packed(random_packed((40, 72), bits=4, group_size=32, seed=0), None)
    x = torch.randn(3, 5, 72)
    replica = copy.copy(linear)
    replica.__dict__ = dict(linear.__dict__)
    replica._parameters = {name: value for name, value in linear._parameters.items() if value is None}
    replica.__dict__ |= {name: value for name, value in linear._parameters.items() if value is not None}
    with torch.no_grad():
        expected = linear(x)
        assert torch.equal(torch.func.vmap(linear)(x), expected)
        assert torch.equal(replica(x), expected)
    assert not choice._failures
