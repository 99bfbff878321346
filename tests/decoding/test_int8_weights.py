"""Models loaded with int8 weights, against dense models whose weights are rounded the same way."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch

from pyparallel import _C, backend
from pyparallel.comm.group import Group
from pyparallel.cut.quantize import PackedWeight, quantize_rows
from pyparallel.decoding.cpu_decoder import CPUDecoder
from pyparallel.decoding.generate import generate
from pyparallel.decoding.logits import teacher_forced_logits
from pyparallel.launch import launch
from pyparallel.layers import ParallelMLP, RowParallelLinear
from pyparallel.mesh import init_mesh
from pyparallel.models.dense import round_to_int8
from pyparallel.models.load import load
from pyparallel.testing import assert_as_dense, assert_within, normals, poisoned_empty, run_ranks
from tests.decoding.decoder_checks import (
    ISAS,
    KeptIn,
    engine_logits,
    instruction_set,
    instruction_sets,
)
from tests.orders import Exact, farthest
from tests.transformers_models import build

# Biases, tied and untied, transposed weights, heads cut unevenly; 3 KV heads on 4 ranks are replicated.
FAMILIES = ("llama", "llama tied", "qwen3", "gpt2", "gpt_neox")
IDS = [5, 9, 2, 40, 33, 7, 1, 1, 58, 20, 31, 3]
PROMPTS = [IDS[:6], [11, 12, 13]]
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {}
    for family in FAMILIES:
        made[family] = str(tmp_path_factory.mktemp("int8") / "model")
        build(family).save_pretrained(made[family])
    return made


def against_rounded(folders: dict[str, str]) -> None:
    mesh = init_mesh(tp=torch.distributed.get_world_size())
    for family, folder in folders.items():
        dense = build(family).eval()
        round_to_int8(dense)
        with torch.inference_mode(), poisoned_empty():
            model = load(folder, mesh, weights="int8")
            # The same rounded weights: what is left is fp32 sums in another order.
            with Exact():
                exact = deepcopy(dense).double()(torch.tensor([IDS])).logits[0]
            plain = farthest(lambda d=dense: d(torch.tensor([IDS])).logits[0], exact)
            ranks, begin = model.group.size, model.head._start
            shard = slice(4, None), slice(begin, begin + model.head.weight.shape[0])
            ours = engine_logits(CPUDecoder(model, threads=1), IDS, 5)
            assert_as_dense(ours, plain, exact, ranks, family, part=lambda t, s=shard: t[s])
            for name in ("torch", "reference"):
                with backend.use(name):
                    got = model(torch.tensor([IDS]))[0]
                assert_as_dense(got, plain, exact, ranks, f"{family} {name}")
            forced = teacher_forced_logits(model, [IDS[:5]], [[*IDS[5:], 0]])[0]
            assert_as_dense(forced, plain, exact, ranks, f"{family} forced", part=lambda t: t[4:])
        made = generate(model, PROMPTS, max_new_tokens=NEW_TOKENS, stop_ids=()).tokens
        for prompt, tokens in zip(PROMPTS, made, strict=True):
            expected = dense.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
            )
            assert tokens == expected[0, len(prompt) :].tolist(), family


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_logits_and_tokens_of_the_rounded_model(folders: dict[str, str], ranks: int) -> None:
    if ranks == 3:
        # 2 layers' 8 heads and 5 heads: the others cut into 3 as they are.
        folders = {name: path for name, path in folders.items() if name != "gpt2"}
    launch(against_rounded, ranks, folders, threads=1)


def over_axes(folder: str) -> list[list[int]]:
    """Tokens with the context cut over two ranks, then with the layers in two stages."""
    made = []
    for axis in ("cp", "pp"):
        model = load(folder, init_mesh(**{axis: 2}), weights="int8")
        assert all(p.dtype is torch.int8 for p in model.parameters() if p.dim() == 2)
        made.append(generate(model, PROMPTS[:1], max_new_tokens=NEW_TOKENS, stop_ids=()).tokens[0])
    return made


def test_other_axes_say_the_same(folders: dict[str, str]) -> None:
    """A tied table lies on both ends of a pipeline, rounded alike."""
    model = load(folders["llama tied"], init_mesh(tp=1), weights="int8")
    tokens = generate(model, PROMPTS[:1], max_new_tokens=NEW_TOKENS, stop_ids=()).tokens[0]
    for made in launch(over_axes, 2, folders["llama tied"], threads=1):
        assert made == [tokens, tokens]


def shards_of_rows(group: Group) -> None:
    dense = normals(37, 53, seed=0) * normals(37, 1, seed=1)
    dense[4] = 0
    # A row's largest value on the last rank, so that no other rank's own scale would do.
    dense[:, -1] = 9.0
    module = RowParallelLinear(53, 37, False, group=group).load_dense({"weight": dense})
    part = module.shardings["weight"]
    module.quantize_weight()
    data, scale = quantize_rows(dense)
    assert module.weight.dtype is torch.int8 and module.dtype is torch.float32
    assert torch.equal(module.weight_scale, scale)
    assert torch.equal(module.weight, part.split(data, group.rank))
    x = normals(5, 53, seed=2)
    with torch.inference_mode():
        y = module(part.split(x.t().contiguous().t(), group.rank))
    rounded = PackedWeight(data, "int8", dense.dtype, scale).dequantized()
    truth = x.double() @ rounded.double().t()
    # 53 products in fp32 in any order, a scale, and the sum over ranks.
    terms = float((x.double().abs() @ rounded.double().abs().t()).max())
    assert_within(y, truth, (53 + 1 + group.size) * 2**-24 * terms, "rows cut over ranks")


def test_row_cut_matrices_have_the_whole_rows_scales() -> None:
    run_ranks(shards_of_rows, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(folders: dict[str, str], isa: str, dtype: torch.dtype) -> None:
    if isa not in instruction_sets():
        pytest.skip(f"this processor has {_C.isa()}")
    dense = build("llama tied").eval()
    # Rounded to int8 as the checkpoint is read: in dtype first.
    dense = dense.to(dtype).float()
    round_to_int8(dense)
    with instruction_set(isa), torch.inference_mode():
        model = load(folders["llama tied"], init_mesh(tp=1), dtype=dtype, weights="int8")
        ours = engine_logits(CPUDecoder(model, threads=1), IDS, 5)
        with Exact():
            exact = deepcopy(dense).double()(torch.tensor([IDS])).logits[0]

        def rounding() -> torch.Tensor:
            with KeptIn(dtype):
                return dense(torch.tensor([IDS])).logits[0]

        rounded = farthest(rounding, exact)
    assert_as_dense(ours, rounded, exact, 1, f"{isa} {dtype}", part=lambda t: t[4:])


def test_memory_falls(folders: dict[str, str]) -> None:
    mesh = init_mesh(tp=1)
    sizes = {}
    for weights in (None, "int8"):
        model = load(folders["llama tied"], mesh, weights=weights)
        sizes[weights] = sum(p.numel() * p.itemsize for p in model.parameters())
        assert model.head.weight is model.embedding.weight
    vectors = sum(p.numel() for p in build("llama tied").parameters() if p.dim() == 1)
    assert sizes["int8"] - 4 * vectors == (sizes[None] - 4 * vectors) / 4


def test_what_int8_is_not_for(folders: dict[str, str], tmp_path: Path) -> None:
    mesh = init_mesh(tp=1)
    with pytest.raises(
        ValueError, match=r"weights: expected None .* 'int8' or 'blocks', got 'int4'"
    ):
        load(folders["llama"], mesh, weights="int4")
    with pytest.raises(ValueError, match="weights: expected None with sequence_parallel"):
        load(folders["llama"], mesh, weights="int8", sequence_parallel=True)
    build("cohere").save_pretrained(tmp_path / "cohere")
    with pytest.raises(ValueError, match="weights: expected None for a cohere model"):
        load(tmp_path / "cohere", mesh, weights="int8")
    mlp = ParallelMLP(8, 12, group=mesh.tp, sequence_parallel=True)
    with pytest.raises(ValueError, match="sequence_parallel: expected False for int8 weights"):
        mlp.up_proj.quantize_weight()
    model = load(folders["llama"], mesh, weights="int8")
    with pytest.raises(ValueError, match="x: expected one that wants no gradient"):
        model.layers[0].mlp(torch.ones(1, 36, requires_grad=True))
