"""The decoder over sequence shards against transformers: logits, gradients, tokens, memory."""

from __future__ import annotations

import itertools
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch.nn import functional as F

from pyparallel.checkpoint.source import open_checkpoint
from pyparallel.comm.collectives import all_reduce_raw, count_collectives
from pyparallel.comm.group import Group
from pyparallel.comm.torch_engine import TorchCommunicator
from pyparallel.decoding import ranks_apart
from pyparallel.decoding.cpu_decoder import reason_against
from pyparallel.decoding.generate import generate
from pyparallel.decoding.stream import stream
from pyparallel.launch import launch
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.context_decoder import ContextDecoder
from pyparallel.models.fill import fill
from pyparallel.models.load import decoder_config, load
from pyparallel.models.weights import sources
from pyparallel.ops.next_token import Sampling
from pyparallel.testing import poisoned_empty
from tests.transformers_models import build

# Grouped heads tied, a window, normalised heads, learned positions, partial rotation.
FAMILIES = {
    "llama tied": {},
    "mistral": {},
    "qwen3": {},
    "gpt2": {},
    "gpt_neox": {"partial_rotary_factor": 0.5},
}
# (cp, tp)
MESHES = ((2, 1), (3, 1), (4, 1), (2, 2))
PROMPTS = [[5, 9, 2, 40, 33], [7], [11, 12, 13, 14, 15, 16, 17, 18, 3, 4, 6]]
NEW_TOKENS = 20
LENGTH = 13
DOCUMENTS = [[0, 4, 5, 13], [0, 13]]
SAMPLING = Sampling(temperature=0.8, top_k=20, seed=5)


def text() -> torch.Tensor:
    return torch.randint(2, 60, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def targets() -> torch.Tensor:
    """The next token; none after the last of a text."""
    return torch.cat([text()[:, 1:], torch.full((2, 1), -100)], 1)


def loss_of(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """This part's share of the mean over all targets."""
    total = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
    return total / int((targets() >= 0).sum())


def truth(model: torch.nn.Module, documents: list[list[int]] | None) -> dict:
    """transformers on the whole texts, or on each document as a text of its own."""
    model.zero_grad()
    rows = []
    for row, ids in enumerate(text()):
        cuts = documents[row] if documents else [0, LENGTH]
        pieces = [ids[a:b].unsqueeze(0) for a, b in itertools.pairwise(cuts)]
        rows.append(torch.cat([model(piece).logits for piece in pieces], 1))
    logits = torch.cat(rows)
    loss_of(logits, targets()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    gradients["embed_out.weight"] = gradients.get("lm_head.weight")
    return {"logits": logits.detach(), "gradients": gradients}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    folders, truths = {}, {}
    for family, changes in FAMILIES.items():
        model = build(family, **changes)
        folders[family] = str(tmp_path_factory.mktemp("model"))
        model.save_pretrained(folders[family])
        truths[family] = [truth(model, None), truth(model, DOCUMENTS)]
    return folders, truths


def check_training(
    model: ContextDecoder, mesh: Mesh, expected: dict, documents: list | None, what: str
) -> None:
    shards = model.shards(LENGTH, documents=documents)
    model.zero_grad()
    logits = model(text(), shards)
    close = {"rtol": 1e-4, "atol": 1e-4}
    dense = shards.split(expected["logits"])
    torch.testing.assert_close(logits.detach(), dense, **close, msg=lambda m: f"{what}: {m}")
    loss_of(logits, shards.split(targets())).backward()
    wanted = sources(model.config, mesh.tp.shares)
    for name, parameter in model.named_parameters():
        gradient = all_reduce_raw(parameter.grad.clone(), mesh.cp)
        parts = []
        for source in wanted[name]:
            part = source.sharding.split(expected["gradients"][source.name], mesh.tp.rank)
            parts.append(part.t() if source.transposed else part)
        scale = max(part.abs().max().item() for part in parts) + 1e-3
        torch.testing.assert_close(
            gradient,
            torch.cat(parts),
            rtol=1e-4,
            atol=1e-4 * scale,
            msg=lambda m, name=name: f"{what} {name}: {m}",
        )


def train(cp: int, tp: int, folders: dict, truths: dict) -> None:
    mesh = init_mesh(cp=cp, tp=tp)
    for family, folder in folders.items():
        with poisoned_empty():
            model = load(folder, mesh)
            for algorithm in ("ring", "auto"):
                model.algorithm = algorithm
                for documents, expected in zip((None, DOCUMENTS), truths[family], strict=True):
                    what = f"{family} cp={cp} tp={tp} {algorithm} documents={documents}"
                    check_training(model, mesh, expected, documents, what)


@pytest.mark.parametrize(("cp", "tp"), MESHES)
def test_logits_and_gradients_are_the_dense_ones(checkpoints, cp: int, tp: int) -> None:
    launch(train, cp * tp, cp, tp, *checkpoints, threads=1)


def train_with(folder: str, truths: list[dict]) -> None:
    mesh = init_mesh(cp=2, tp=2)
    checkpoint = open_checkpoint(folder)
    for sequence_parallel, recompute in ((True, "none"), (False, "attention"), (True, "layers")):
        model = ContextDecoder(
            decoder_config(checkpoint),
            "meta",
            torch.float32,
            group=mesh.tp,
            context=mesh.cp,
            sequence_parallel=sequence_parallel,
            recompute=recompute,
        )
        fill(model, checkpoint, device="cpu")
        what = f"sequence_parallel={sequence_parallel} recompute={recompute}"
        check_training(model, mesh, truths[1], DOCUMENTS, what)
        if sequence_parallel:
            with pytest.raises(ValueError, match="sequence_parallel: expected False"):
                model.new_cache(1, 4)


def test_sequence_parallel_and_recomputation_compose(checkpoints) -> None:
    folders, truths = checkpoints
    launch(train_with, 4, folders["llama tied"], truths["llama tied"], threads=1)


def continuations(cp: int, tp: int, folders: dict) -> dict:
    mesh = init_mesh(cp=cp, tp=tp)
    made = {}
    for family, folder in folders.items():
        model = load(folder, mesh)
        assert reason_against(model, PROMPTS, 64) is None, "the C++ decoder is not used"
        options = {"max_new_tokens": NEW_TOKENS, "stop_ids": ()}
        with poisoned_empty():
            made[family] = [
                generate(model, PROMPTS, **options).tokens,
                # Five tokens alone: on four ranks, three of them hold one.
                generate(model, PROMPTS[:1], **options).tokens,
                generate(model, PROMPTS, sampling=SAMPLING, **options).tokens,
            ]
            by_turns = [stream(model, PROMPTS[:1], **options) for _ in range(2)]
            first, second = zip(*(map(next, by_turns) for _ in range(NEW_TOKENS)), strict=True)
            assert [piece.token for piece in first] == made[family][1][0], "streams are mixed"
            assert [piece.token for piece in second] == made[family][1][0], "streams are mixed"
    return made


def test_generated_tokens_do_not_depend_on_the_ranks(checkpoints) -> None:
    folders, _ = checkpoints
    expected = launch(continuations, 1, 1, 1, folders, threads=1)[0]
    assert expected["mistral"][0][0] == expected["mistral"][1][0]
    for cp, tp in MESHES:
        for made in launch(continuations, cp * tp, cp, tp, folders, threads=1):
            assert made == expected, (cp, tp)


def apart_on_some(folder: str) -> str | None:
    mesh = init_mesh(cp=2, tp=2)
    model = load(folder, mesh)
    if mesh.cp.rank + mesh.tp.rank > 0:
        return reason_against(model, PROMPTS, 64)
    # As where one rank's neighbours are on another host and the others' are not.
    with patch.object(ranks_apart, "SharedMemoryCommunicator", TorchCommunicator):
        return reason_against(model, PROMPTS, 64)


def test_all_ranks_decode_the_same_way(checkpoints) -> None:
    folders, _ = checkpoints
    for reason in launch(apart_on_some, 4, folders["llama tied"], threads=1):
        assert reason.startswith("expected ranks that share memory")


def spread(folder: str) -> None:
    mesh = init_mesh(cp=3)
    model = load(folder, mesh)
    single = load(folder, replace(mesh, cp=Group.single()))
    batch, prompt, total = 2, LENGTH, LENGTH + 9
    cache, whole = model.new_cache(batch, total), single.new_cache(batch, total)
    own, all_slots = (
        sum(layer.keys.numel() + layer.values.numel() for layer in c) for c in (cache, whole)
    )
    assert own == all_slots // total * -(-total // 3)

    ids = torch.randint(2, 60, (batch, total), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        with pytest.raises(
            ValueError, match="expected 0 for the first call of a cache, got \\[1, 1\\]"
        ):
            model.hidden(ids[:, :2], [1, 1], cache)
        # A prompt, several tokens at once, rows at different positions, then one at a time.
        calls = [(0, prompt, [0, 0]), (prompt, 4, [prompt, prompt])]
        calls += [(step, 1, [step, step]) for step in range(prompt + 4, total)]
        for first, count, starts in calls:
            new = ids[:, first : first + count]
            with count_collectives() as counter:
                hidden = model.hidden(new, starts, cache)
            expected = single.hidden(new, starts, whole)
            torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
            if count == 1:
                # Softmax sums and outputs of the ranks, whatever the length of the context.
                layers, heads, size = (
                    len(model.layers),
                    model.config.num_heads,
                    model.config.head_dim,
                )
                part = 3 * batch * heads * (size + 1) * 4
                assert counter == {"all_gather": layers, ("all_gather", "bytes"): layers * part}
        slots = cache[0].slots
        assert slots.filled(total) <= cache[0].keys.shape[2]
        with pytest.raises(
            ValueError, match=f"position {total} does not fit its {total} positions"
        ):
            model.hidden(ids[:, :1], [total, total], cache)
        with pytest.raises(ValueError, match=f"a prompt of {total} does not fit its 5 positions"):
            model.hidden(ids, [0, 0], model.new_cache(batch, 5))


def test_the_cache_is_spread_and_takes_chunks(checkpoints) -> None:
    folders, _ = checkpoints
    for family in ("llama tied", "mistral"):
        launch(spread, 3, folders[family], threads=1)


def refuse(folder: str) -> None:
    mesh = init_mesh(cp=2)
    with pytest.raises(ValueError, match="cp: expected 1 for a olmo2 model"):
        load(folder, mesh)


def test_a_model_with_its_own_attention_is_refused(tmp_path) -> None:
    build("olmo2").save_pretrained(tmp_path)
    launch(refuse, 2, str(tmp_path), threads=1)
