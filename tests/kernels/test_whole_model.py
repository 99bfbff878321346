"""A small Llama over two ranks, forward and backward, through the Triton kernels alone."""

import pytest
import torch
from torch.nn import functional as F

from pyparallel import backend
from pyparallel.checkpoint import open_checkpoint
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.decoder import Decoder
from pyparallel.models.load import decoder_config, fill
from pyparallel.models.weights import sources
from pyparallel.testing import poisoned_empty
from tests.transformers_models import build

IDS = [5, 9, 2, 40, 33, 7, 18]
OPS = ("linear", "linear_dgrad", "linear_wgrad", "rms_norm", "rope", "attention")


def compare(folder: str, sequence_parallel: bool, expected: dict) -> list[str]:
    group = init_mesh(tp=torch.distributed.get_world_size()).tp
    checkpoint = open_checkpoint(folder)
    ran = []
    for op in OPS:
        row = backend._table[op]["triton"]

        def counted(*args, _run=row.run, _op=op, **kwargs):
            ran.append(_op)
            return _run(*args, **kwargs)

        backend._table[op]["triton"] = backend.Implementation(op, "triton", counted, row.supports)
    with poisoned_empty(), backend.use("triton"):
        config = decoder_config(checkpoint)
        model = Decoder(config, "meta", group=group, sequence_parallel=sequence_parallel)
        fill(model, checkpoint, device="cpu")
        ids = torch.tensor([IDS])
        logits = model(ids)
        F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)
    for name, wanted in sources(config, group.size).items():
        parts = []
        for source in wanted:
            part = source.sharding.split(expected["gradients"][source.name], group.rank)
            parts.append(part.t() if source.transposed else part)
        scale = max(part.abs().max().item() for part in parts) + 1e-3
        torch.testing.assert_close(
            model.get_parameter(name).grad,
            torch.cat(parts),
            rtol=1e-4,
            atol=1e-4 * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    return ran


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_equals_dense(sequence_parallel, tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path)
    ids = torch.tensor([IDS])
    logits = model(ids).logits
    F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    expected = {
        "logits": logits.detach(),
        "gradients": {name: p.grad for name, p in model.named_parameters()},
    }
    ran = launch(compare, 2, str(tmp_path), sequence_parallel, expected, threads=1)
    for ops in ran:
        # Two layers, and nothing of them ran elsewhere: use("triton") has no other way.
        assert ops.count("rms_norm") == 5 and ops.count("attention") == 2, ops
        assert set(ops) == set(OPS)
