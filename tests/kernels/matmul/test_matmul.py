import pytest
import torch
from helpers import DTYPES, assert_within, integers, normal, padded, rounding_bound, strided

from pyparallel.kernels.matmul.matmul import matmul, matmul_out


def truth_of(x, w, bias=None, residual=None, activation="none"):
    acts = {
        "none": lambda t: t,
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
        "silu": torch.nn.functional.silu,
    }
    y = x.double() @ w.double().T
    if bias is not None:
        y = y + bias.double()
    y = acts[activation](y)
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 40, 33), (65, 70, 100), (16, 32, 64)])
def test_exact_on_small_integers(dtype, shape, device):
    m, n, k = shape
    x, w = integers(m, k, dtype=dtype, device=device), integers(n, k, dtype=dtype, device=device)
    bias = integers(n, dtype=dtype, device=device)
    out = matmul(x, w, bias=bias, out_dtype=torch.float32)
    assert torch.equal(out.double(), truth_of(x, w, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
def test_epilogue_within_rounding(dtype, activation, device):
    x, w = normal(37, 50, dtype=dtype, device=device), normal(41, 50, dtype=dtype, device=device)
    bias, residual = normal(41, dtype=dtype, device=device), normal(37, 41, dtype=dtype)
    residual = residual.to(device)
    out = matmul(x, w, bias=bias, residual=residual, activation=activation)
    truth = truth_of(x, w, bias, residual, activation)
    sums = x.double().abs() @ w.double().abs().T + bias.double().abs() + residual.double().abs()
    # The slope of every activation here is below 1.2.
    assert_within(out, truth, 1.2 * rounding_bound(truth, dtype, sums, 52))


@pytest.mark.parametrize("layout", [strided, padded, lambda t: t.T.contiguous().T])
def test_strides(layout, device):
    x, w = integers(20, 34, device=device), integers(45, 34, device=device)
    residual = integers(20, 45, device=device, seed=1)
    base = torch.full((20, 90), -5.0, device=device)
    out = matmul_out(layout(x), layout(w), base[:, ::2], residual=layout(residual))
    assert torch.equal(out.double(), truth_of(x, w, residual=residual))
    assert (base[:, 1::2] == -5.0).all()


def test_transposed_weight_is_a_view(device):
    x, w = integers(5, 48, device=device), integers(48, 33, device=device)
    assert torch.equal(matmul(x, w.T).double(), x.double() @ w.double())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_with_scales(dtype, device):
    x = integers(18, 70, device=device).to(dtype)
    w = integers(36, 70, device=device, seed=4).to(dtype)
    x_scale = 2.0 ** integers(18, device=device)
    w_scale = 2.0 ** integers(36, device=device, seed=2)
    out = matmul(x, w, x_scale=x_scale, w_scale=w_scale, out_dtype=torch.float32)
    truth = (x.double() * x_scale.double()[:, None]) @ (w.double() * w_scale.double()[:, None]).T
    assert torch.equal(out.double(), truth)


@pytest.mark.parametrize("split_k", [2, 3])
def test_split_k_repeats_its_bits(split_k, device):
    x, w = normal(9, 200, device=device), normal(40, 200, device=device)
    bias, residual = normal(40, device=device), normal(9, 40, device=device)
    first = matmul(x, w, bias=bias, residual=residual, activation="silu", split_k=split_k)
    again = matmul(x, w, bias=bias, residual=residual, activation="silu", split_k=split_k)
    assert torch.equal(first, again)
    truth = truth_of(x, w, bias, residual, "silu")
    sums = x.double().abs() @ w.double().abs().T + 1 + residual.double().abs()
    assert_within(first, truth, 1.2 * rounding_bound(truth, torch.float32, sums, 210))


def test_pre_activation_is_kept(device):
    x, w = integers(7, 20, device=device), integers(33, 20, device=device)
    bias = integers(33, device=device)
    pre = torch.empty(7, 33, device=device)
    matmul_out(
        x, w, torch.empty(7, 33, device=device), bias=bias, activation="relu", pre_activation=pre
    )
    assert torch.equal(pre.double(), truth_of(x, w, bias))


def test_empty_inputs(device):
    assert matmul(torch.zeros(0, 5, device=device), torch.zeros(4, 5, device=device)).shape == (
        0,
        4,
    )
    out = matmul(
        torch.zeros(3, 0, device=device),
        torch.zeros(4, 0, device=device),
        bias=torch.ones(4, device=device),
    )
    assert torch.equal(out, torch.ones(3, 4, device=device))


def test_bad_input_is_named(device):
    x, w = torch.zeros(3, 5, device=device), torch.zeros(4, 5, device=device)
    with pytest.raises(ValueError, match=r"expected x \[M, K\] and w \[N, K\]"):
        matmul(x, w.T)
    with pytest.raises(ValueError, match="dtype"):
        matmul(x, w.half())
    with pytest.raises(ValueError, match="activation: expected one of"):
        matmul(x, w, activation="swish")
    with pytest.raises(ValueError, match="bias: expected shape"):
        matmul(x, w, bias=torch.zeros(5, device=device))
    with pytest.raises(ValueError, match="scales expect fp8"):
        matmul(x, w, x_scale=torch.ones(3, device=device), w_scale=torch.ones(4, device=device))


def test_the_interpreter_multiplies_bf16_wrongly_and_dot_does_not():
    """Why language.dot upcasts: tl.dot on bf16 in the interpreter reads bits as integers."""
    import triton
    import triton.language as tl

    from pyparallel.kernels.language import dot
    from pyparallel.kernels.launch import INTERPRETING

    if not INTERPRETING:
        pytest.skip("compiled: there is no interpreter to judge")

    @triton.jit
    def product_kernel(x_ptr, out_ptr, RAW: tl.constexpr):
        offs = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        x = tl.load(x_ptr + offs)
        if RAW:
            tl.store(out_ptr + offs, tl.dot(x, x))
        else:
            tl.store(out_ptr + offs, dot(x, x, tl.zeros((16, 16), tl.float32), "ieee"))

    product_kernel.fn.__globals__.update(tl=tl, dot=dot)
    x = integers(16, 16, dtype=torch.bfloat16)
    raw, ours = torch.empty(16, 16), torch.empty(16, 16)
    product_kernel[(1,)](x, raw, RAW=True)
    product_kernel[(1,)](x, ours, RAW=False)
    assert torch.equal(ours, x.float() @ x.float())
    assert (raw - ours).abs().max() > 1e3, "the interpreter is right now: dot need not upcast"
