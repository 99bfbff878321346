"""The legal orders of tests/orders.py: they change roundings, never what is computed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pyparallel.testing import integers, normals
from tests.orders import _REORDERED, Exact, Reordered, farthest
from tests.processors import NUMERICAL
from tests.transformers_models import build

FAMILIES = ("llama", "gpt2", "bert")
# Their own subject is another: delays, meshes, engines; the numbers are those of a listed file.
OTHERS = (
    "training/test_data_parallel_engines.py",
    "training/test_mesh_training.py",
    "training/test_pipeline_documents.py",
    "models/test_load_training.py",
    "training/test_pipeline_errors.py",
    "training/test_pipeline_hugging_face.py",
    "models/test_whole_calls.py",
    # In fp64, whose roundings are far below its bound.
    "training/test_peft_training.py",
)


def step(model: torch.nn.Module) -> list[torch.Tensor]:
    ids = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    model.zero_grad(set_to_none=True)
    logits = model(ids).logits
    F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_results_stay_its_own_and_their_roundings_do_not(family: str) -> None:
    model = build(family).double()
    with Exact():
        exact = step(model)
        with Reordered(0, split_rows=True):
            wide = step(model)
    assert all(t.dtype is torch.float64 for t in exact)
    for a, b in zip(exact, wide, strict=True):
        # In fp64 all orders agree to its rounding, so that nothing was mixed up.
        assert float((a - b).abs().max()) <= 1e-12 * max(1.0, float(a.abs().max()))
    plain = step(build(family))
    with Reordered(0):
        other = step(build(family))
    assert sum(not torch.equal(a, b) for a, b in zip(plain, other, strict=True)) > len(plain) / 2


def test_no_op_that_sums_is_left_out() -> None:
    """What a model calls and orders.py doesn't know must not sum: a list of what was looked at."""
    seen: set[str] = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func not in _REORDERED:
                seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    for family in FAMILIES:
        model = build(family)
        with Names():
            step(model)
    elementwise = (
        "add add_ mul div neg pow rsqrt cos sin tanh tanh_backward silu silu_backward gelu "
        "gelu_backward eq any where masked_fill fill_ zeros zeros_like ones_like empty_like"
    )
    moves = (
        "embedding arange unsqueeze squeeze _to_copy cat detach view t transpose slice lift_fresh "
        "_unsafe_view alias expand slice_backward clone index split select select_backward gather "
        "_local_scalar_dense new_zeros copy_ permute scatter randint"
    )
    # The loss's mean over tokens: a sum of 18 terms, whose order nobody changes.
    assert seen - set(f"{elementwise} {moves}".split()) <= {"nll_loss_forward", "nll_loss_backward"}


def test_integers_stay_exact_and_the_farthest_is_kept() -> None:
    a, b = integers(5, 33, seed=1), integers(33, 7, seed=2)
    assert torch.equal(farthest(lambda: a @ b, a.double() @ b.double()), a @ b)
    a, b = normals(5, 999, seed=1), normals(999, 7, seed=2)
    truth = a.double() @ b.double()
    made = [a @ b]
    for seed in range(3):
        with Reordered(seed, split_rows=seed % 2 == 1):
            made.append(a @ b)
    worst = farthest(lambda: a @ b, truth)
    errors = torch.stack([(each - truth).abs() for each in made]).amax(0)
    assert bool(((worst - truth).abs() >= errors).all())
    assert float((worst - truth).abs().mean()) > float((made[0] - truth).abs().mean())


def test_every_bound_is_met_on_other_processors() -> None:
    """A file that compares with a bound of these is among the tests of `make test-processors`."""
    listed = {name.partition("::")[0] for name in NUMERICAL}
    here = Path(__file__).parent
    for path in here.rglob("test_*.py"):
        name = path.relative_to(here).as_posix()
        if name.startswith(("kernels/", "gpu/", "families/")):
            continue
        if re.search(
            r"^from tests\.(orders|bounds|pipeline_checks|training_truth|models\.dense_truth)",
            path.read_text(),
            re.M,
        ):
            assert name in listed or name in OTHERS, name
    for name in NUMERICAL:
        file, _, test = name.partition("::")
        assert f"def {test.partition('[')[0]}" in (here / file).read_text(), name


def test_inference_mode_takes_the_same_ways() -> None:
    model = build("llama").double()
    ids = torch.arange(2, 22).unsqueeze(0)
    with torch.inference_mode(), Exact():
        plain = model(ids).logits
        with Reordered(1):
            other = model(ids).logits
    assert not torch.equal(plain, other)
    torch.testing.assert_close(plain, other, rtol=1e-12, atol=1e-12)
