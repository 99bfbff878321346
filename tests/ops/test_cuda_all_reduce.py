"""The cuda rows of sums over peer memory: when they are offered, and how they are wired."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pyparallel import backend, reference
from pyparallel.comm.cuda.peers import SLOT_BYTES, PeerMemory
from pyparallel.comm.group import Group
from pyparallel.native.cuda import extension as cuda_extension
from pyparallel.native.cuda.tuning import DECLARED
from pyparallel.ops.cuda import _peers

H = 16


def test_cpu_tensors_are_refused_with_the_reason() -> None:
    x, group = torch.zeros(2, H), Group.single()
    calls = {
        "linear_all_reduce": (x, torch.zeros(3, H), None, group),
        "all_reduce_residual_rms_norm": (x, x, torch.ones(H), 1e-5, group),
    }
    for op, arguments in calls.items():
        assert "cuda" in backend.table()[op]
        with (
            backend.use("cuda"),
            pytest.raises(ValueError, match=f"{op}.*cuda: the input is on cpu"),
        ):
            backend.call(op, *arguments)


def test_only_small_messages_are_taken() -> None:
    group = Group.single()
    most = DECLARED["peer_norm_bytes"].value
    rows = most // (4 * H)
    weight = torch.empty(H, device="meta")
    x, more = (torch.empty(n, H, device="meta") for n in (rows, rows + 1))
    assert PeerMemory.reason_against_norm(x, x, weight) is None
    assert f"bytes are more than {most}" in PeerMemory.reason_against_norm(more, more, weight)
    assert "more than" in _peers.norm_reason(more, more, weight, 1e-5, group)
    most = DECLARED["peer_all_reduce_bytes"].value
    wide = torch.empty(most // 4, H, device="meta")
    for columns, taken in ((1, True), (2, False)):
        reason = _peers.linear_reason(wide, torch.empty(columns, H, device="meta"), None, group)
        assert ("more than" not in reason) == taken


@pytest.mark.parametrize(
    ("residual", "weight", "message"),
    [
        (torch.zeros(3, H), torch.ones(H), "shapes"),
        (torch.zeros(2, H), torch.ones(H + 1), "shapes"),
        (torch.zeros(2, H).half(), torch.ones(H), "dtypes"),
        (torch.zeros(2, H), None, "needs a weight"),
    ],
)
def test_what_does_not_fit_is_not_offered(residual, weight, message) -> None:
    x = torch.zeros(2, H)
    assert message in _peers.norm_reason(x, residual, weight, 1e-5, Group.single())
    row = torch.empty(1, SLOT_BYTES, device="meta")
    assert "does not fit a slot" in PeerMemory.reason_against_norm(row, row, row[0])


class TorchPeers:
    """The peer kernel's equations in torch, of one rank."""

    def all_reduce_residual_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float
    ) -> tuple[Tensor, Tensor]:
        h = x + residual
        return reference.rms_norm(h, weight, eps), h


@pytest.mark.skipif(not cuda_extension.is_built(), reason="run `make cuda`")
def test_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """dx = dresidual = the norm's gradient and that of h as the next residual; dweight."""
    from pyparallel.native.cuda import ops as cuda_ops
    from pyparallel.ops.cuda import all_reduce_residual_rms_norm

    def norm_backward(dy: Tensor, h: Tensor, weight: Tensor, *, eps: float) -> tuple:
        with torch.enable_grad():
            leaves = h.detach().requires_grad_(), weight.detach().requires_grad_()
            y = reference.rms_norm(*leaves, eps)
        return torch.autograd.grad(y, leaves, dy)

    monkeypatch.setattr(cuda_ops, "rms_norm_backward", norm_backward)
    communicator = SimpleNamespace(peers=TorchPeers(), call=lambda call, *args: call(*args))
    group = SimpleNamespace(communicator=communicator)
    generator = torch.Generator().manual_seed(0)
    x, residual, dy, dh = (torch.randn(2, 3, H, generator=generator) for _ in range(4))
    weight = torch.randn(H, generator=generator)
    leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
    y, h = all_reduce_residual_rms_norm.run(*leaves, 1e-5, group)
    got = torch.autograd.grad((y, h), leaves, (dy, dh))
    truths = [t.clone().requires_grad_() for t in (x, residual, weight)]
    summed = truths[0] + truths[1]
    want = torch.autograd.grad(
        (reference.rms_norm(summed, truths[2], 1e-5), summed), truths, (dy, dh)
    )
    assert y.shape == x.shape and torch.equal(h, x + residual)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_one_shot_up_to_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = object.__new__(PeerMemory)
    peers.size = 8
    peers.extension = SimpleNamespace(Algorithm=SimpleNamespace(one_shot=1, two_shot=2))
    most = DECLARED["one_shot_read_bytes"].value // 7
    assert [peers.algorithm(n) for n in (0, most, most + 1)] == [1, 1, 2]
