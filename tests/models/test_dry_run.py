"""A dry run counts what the same modules hold and send on real ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from pyparallel.comm.collectives import count_collectives
from pyparallel.comm.group import Group
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.config import from_hugging_face
from pyparallel.models.context_decoder import ContextDecoder
from pyparallel.models.decoder import Decoder
from pyparallel.models.dry_run import Counted, dry_run_inference, dry_run_training
from pyparallel.ops.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy

LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
BATCH, LENGTH = 2, 13
# What the operation that a rank of the ring makes is called where it is counted.
NAMES = {"ring_shift": "all_to_all"}


def totals(counter: Counter) -> dict[str, tuple[int, int]]:
    """(calls, bytes) of each collective of a real rank."""
    names = {name for name in counter if isinstance(name, str)}
    return {NAMES.get(n, n): (counter[n], counter[n, "bytes"]) for n in names}


def counted(found: Counted, phase: str) -> dict[str, tuple[int, int]]:
    """The same of a dry run's stage, over all axes."""
    sums: dict[str, tuple[int, int]] = {}
    for axis, calls in found.calls[phase].items():
        for (op, num_bytes), times in calls.items() if axis != "pp" else ():
            before = sums.get(op, (0, 0))
            sums[op] = before[0] + times, before[1] + times * num_bytes
    return sums


def real(sizes: dict[str, int], options: dict[str, Any]) -> list:
    """Bytes of parameters and cache, and the collectives of each phase, on every rank."""
    mesh, config = init_mesh(**sizes), from_hugging_face(LLAMA)
    options = {"group": mesh.tp, **options}
    if mesh.cp.size > 1:
        model = ContextDecoder(config, dtype=torch.bfloat16, context=mesh.cp, **options)
    else:
        model = Decoder(config, dtype=torch.bfloat16, **options)
    model.eval().head.gather_output = False
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
    with count_collectives() as forward:
        logits = model(ids)
        loss = vocab_parallel_cross_entropy(
            logits,
            torch.zeros(logits.shape[:-1], dtype=torch.long),
            reduction="sum",
            group=mesh.tp,
            vocab_size=config.vocab_size,
        )
    with count_collectives() as backward:
        loss.backward()
    found = [sum(p.numel() * p.itemsize for p in model.parameters())]
    found += [totals(forward), totals(backward)]
    if not options.get("sequence_parallel"):
        with torch.inference_mode():
            cache = model.new_cache(BATCH, LENGTH + 2)
            with count_collectives() as prefill:
                model.hidden(ids, [0] * BATCH, cache)
            with count_collectives() as token:
                model.hidden(ids[:, :1], [LENGTH] * BATCH, cache)
        found.append(sum(t.numel() * t.itemsize for c in cache for t in (c.keys, c.values)))
        found += [totals(prefill), totals(token)]
    return found


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"tp": 2}, {}),
        ({"tp": 3}, {"recompute": "attention"}),
        ({"tp": 4}, {"recompute": "layers"}),
        ({"tp": 2}, {"sequence_parallel": True}),
        ({"cp": 2}, {}),
        ({"cp": 3, "tp": 1}, {}),
    ],
)
def test_counts_are_those_of_real_ranks(sizes, options) -> None:
    config = from_hugging_face(LLAMA)
    ranks = sizes.get("tp", 1) * sizes.get("cp", 1)
    weights, forward, backward, *rest = launch(real, ranks, sizes, options, threads=1)[0]
    (trained,) = dry_run_training(config, micro_batch=BATCH, sequence=LENGTH, **sizes, **options)
    assert trained.weight_bytes == weights
    assert counted(trained, "forward") == forward
    assert counted(trained, "backward") == backward
    if not options.get("sequence_parallel"):
        (served,) = dry_run_inference(config, batch=BATCH, prompt=LENGTH, output=2, **sizes)
        cache, prefill, token = rest
        assert served.weight_bytes == weights and served.cache_bytes == cache
        assert counted(served, "prefill") == prefill
        assert counted(served, "token") == token


def test_stages_hand_on_their_tokens() -> None:
    config = from_hugging_face(LLAMA)
    message = BATCH * LENGTH * config.hidden_size * 2
    first, second, last = dry_run_training(config, pp=3, micro_batch=BATCH, sequence=LENGTH)
    sends = Counter({("send", message): 1})
    assert first.calls["forward"]["pp"] == sends and "pp" not in first.calls["backward"]
    assert second.calls["forward"]["pp"] == second.calls["backward"]["pp"] == sends
    assert "pp" not in last.calls["forward"] and last.calls["backward"]["pp"] == sends
    whole = Decoder(config, "meta", torch.bfloat16, group=Group.single())
    held = sum(stage.weight_bytes for stage in (first, second, last))
    assert held == sum(p.numel() * p.itemsize for p in whole.parameters())
    token = dry_run_inference(config, pp=3, batch=BATCH, prompt=LENGTH)[0].calls["token"]["pp"]
    assert token == Counter({("send", BATCH * config.hidden_size * 2): 1})
