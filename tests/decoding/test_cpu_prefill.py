"""Long prompts in the C++ decoder: chunks of which only the last row goes on, and halves in turns."""

from __future__ import annotations

from functools import partial

import torch

from pyparallel import backend
from pyparallel.comm.group import Group
from pyparallel.decoding.cpu_decoder import CPUDecoder
from pyparallel.testing import assert_as_dense, run_ranks
from tests.decoding.test_cpu_decoder import (
    CONFIGS,
    LLAMA,
    build,
    check_logits,
    engine_logits,
    random_ids,
)
from tests.orders import farthest

# From 512 rows on the rows of several ranks go in two halves; over 1024 are several chunks.
LONG = 531


def check_long(group: Group, names: list[str], threads: int) -> None:
    check_logits(group, names, LONG + 3, LONG, threads)


def test_halves_in_turns_give_the_modules_logits() -> None:
    run_ranks(check_long, 2, list(CONFIGS), 1)
    run_ranks(check_long, 3, ["parallel residual"], 1)
    run_ranks(check_long, 2, ["windows and biases"], 2)


def cached(group: Group, threads: int, pieces: list[int]) -> list[torch.Tensor]:
    """Keys, values and logits after a prompt that is read in pieces."""
    with torch.inference_mode():
        decoder = CPUDecoder(build(LLAMA, group), threads=threads)
        ids, start = random_ids(sum(pieces)), 0
        decoder.start(1, len(ids))
        for piece in pieces:
            decoder.prefill(ids[start : start + piece], start=start)
            start += piece
        found = [part for layer in decoder.cache for part in (layer.keys, layer.values)]
        return [*(part[:, :, : len(ids)].clone() for part in found), decoder.logits().clone()]


def by_modules(group: Group) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same by the modules: in fp32, as far off as an order of the sums takes them, and in fp64."""

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        model = build(LLAMA, group, dtype)
        cache = model.new_cache(1, LONG)
        hidden = model.hidden(torch.tensor([random_ids(LONG)]), [0], cache)
        found = [part for layer in cache for part in (layer.keys, layer.values)]
        return [*found, model.head.local_logits(hidden[:, -1])]

    with torch.inference_mode(), backend.use("torch"):
        exact = run(torch.float64)
        return farthest(partial(run, torch.float32), exact), exact


def test_the_cache_holds_every_layers_keys_and_values() -> None:
    """Also the last layer's, of whose rows only one goes on; whatever the pieces of the prompt."""
    for ranks in (1, 2):
        by_rank = run_ranks(by_modules, ranks)
        # All ranks' keys of all layers are made alike, and values; and the logits.
        pairs = [list(zip(*both, strict=True)) for both in by_rank]
        kinds = [i % 2 if i < len(pairs[0]) - 1 else 2 for i in range(len(pairs[0]))]
        for pieces in ([LONG], [LONG - 200, 200], [1] * 3 + [LONG - 3], [LONG - 1, 1]):
            ours = run_ranks(cached, ranks, 1, pieces)
            for rank in range(ranks):
                for i, found in enumerate(ours[rank]):
                    what = f"rank {rank} of {ranks}, {pieces}, tensor {i}"
                    alike = [
                        pair
                        for held in pairs
                        for pair, kind in zip(held, kinds, strict=True)
                        if kind == kinds[i]
                    ]
                    assert_as_dense(found, *pairs[rank][i], ranks, what, family=alike)


def test_bits_of_a_long_prompt_do_not_depend_on_threads() -> None:
    for a, b in zip(run_ranks(cached, 2, 1, [LONG]), run_ranks(cached, 2, 3, [LONG]), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_prompt_of_several_chunks_decodes_on() -> None:
    ids = random_ids(1105)
    with torch.inference_mode():
        model = build(LLAMA, Group.single())
        once = engine_logits(CPUDecoder(model, threads=2), ids, 1100)
        again = engine_logits(CPUDecoder(model, threads=1), ids, 1100)
    assert torch.equal(once, again)
