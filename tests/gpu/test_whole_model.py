"""Whole transformers models on one GPU: after parallelize() at tp = 1 they say what the dense one says,
forward, backward and in generate(), on the backends chosen for CUDA tensors and on each by name."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from pyparallel import backend
from pyparallel.mesh import init_mesh
from pyparallel.models.parallelize import parallelize
from pyparallel.testing import assert_as_dense, poisoned_empty
from tests.orders import Exact, farthest
from tests.transformers_models import build

pytestmark = pytest.mark.gpu
IDS = torch.tensor([[0, 0, 0, 40, 33, 7, 18], [5, 9, 2, 11, 24, 3, 50]])
SEEN = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
FAMILIES = ("llama", "llama tied", "mistral", "qwen3", "gpt2", "gpt_neox")


@pytest.fixture(scope="module", autouse=True)
def world():
    mesh = init_mesh(tp=1)
    yield mesh
    dist.destroy_process_group()


def on(name: str):
    return nullcontext() if name == "chosen" else backend.use(name)


def step(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    device = next(model.parameters()).device
    ids, seen = IDS.to(device), SEEN.to(device)
    targets = ids.masked_fill(seen == 0, -100)
    logits = model(ids, attention_mask=seen).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()).backward()
    gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return logits[seen == 1].detach().cpu(), gradients


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["chosen", "triton", "torch"])
def test_a_padded_step_equals_dense(world, family, name) -> None:
    with Exact():
        exact_logits, exact_gradients = step(build(family).double())
    # Orders of the CPU's: what the GPU's matmuls round beside them is in the rest of the bound.
    logits, _ = farthest(lambda: step(build(family)), (exact_logits, exact_gradients))
    model = parallelize(build(family).cuda(), world)
    with poisoned_empty(), on(name):
        ours, gradients = step(model)
    assert_as_dense(ours, logits, exact_logits, 2, "logits")
    table = next(
        n for n in gradients if n.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))
    )
    truth = exact_gradients[table]
    error = (gradients[table][: truth.shape[0]].double() - truth).abs().max()
    assert error <= 2**-15 * truth.abs().max(), f"{table}: {error}"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_says_what_dense_says(world, family, cache) -> None:
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    how["cache_implementation"] = cache
    dense = build(family).eval()
    expected = dense.generate(IDS, attention_mask=SEEN, **how)
    model = parallelize(build(family).eval().cuda(), world)
    got = model.generate(IDS.cuda(), attention_mask=SEEN.cuda(), **how)
    assert torch.equal(got.cpu(), expected)


def test_half_precision_is_no_further_off_than_dense(world) -> None:
    """Heads of 128 and rows of 1024 in bf16: the kernels' own shapes, against fp64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, head_dim=128, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16().cuda().eval()
    ids = torch.randint(1024, (2, 333), generator=torch.Generator().manual_seed(1)).cuda()
    state = {n: p.clone() for n, p in model.state_dict().items()}
    with torch.no_grad():
        dense = model(ids).logits.double()
        exact = model.double()(ids).logits
        model = LlamaForCausalLM(config).bfloat16().cuda().eval()
        model.load_state_dict(state)
        ours = parallelize(model, world)(ids).logits.double()
    scale = exact.abs().max()
    apart, allowed = (ours - exact).abs().max() / scale, (dense - exact).abs().max() / scale
    assert apart <= 1.5 * allowed, f"{apart:.2e}, dense {allowed:.2e}"
