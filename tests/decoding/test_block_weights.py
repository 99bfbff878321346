"""Models whose matrices are held as a GGUF's blocks, against the dense models of the same numbers."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor

from pyparallel import backend
from pyparallel.checkpoint.source import CheckpointError, open_checkpoint
from pyparallel.cut.quantize import BLOCK_BYTES, PackedWeight, weave_blocks_
from pyparallel.cut.shard import REPLICATED, HeadLayout, Sharding, even_parts, features
from pyparallel.decoding.cpu_decoder import CPUDecoder, compiled, reason_against
from pyparallel.decoding.generate import generate
from pyparallel.decoding.logits import teacher_forced_logits
from pyparallel.launch import launch
from pyparallel.layers import ColumnParallelLinear
from pyparallel.layers.parameters import ShardedModule
from pyparallel.mesh import init_mesh
from pyparallel.models.decoder import Decoder
from pyparallel.models.load import load
from pyparallel.ops.next_token import Sampling
from pyparallel.saving.save import save
from pyparallel.testing import assert_within, dense_bound, poisoned_empty
from tests.checkpoint.gguf_files import MODELS
from tests.decoding.decoder_checks import (
    FIXED_POINT,
    engine_logits,
    instruction_set,
    instruction_sets,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IDS = torch.randint(61, (44,), generator=torch.Generator().manual_seed(0)).tolist()
PROMPTS = [IDS[:6], IDS[6:9]]
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    made = {name: folder / f"{name}.gguf" for name in MODELS}
    for name, path in made.items():
        MODELS[name].write(path)
    return made


def kinds_of(model: Decoder) -> dict[str, str]:
    """What each of a model's matrices is held as."""
    modules = {n: m for n, m in model.named_modules() if isinstance(m, ShardedModule)}
    return {name: "dense" if m.packed is None else m.packed.kind for name, m in modules.items()}


def expected_kinds(name: str, shares: tuple[int, ...]) -> dict[str, str]:
    """What the matrices of ``MODELS[name]`` are held as over ranks of these shares."""
    kind = MODELS[name].kind.lower()
    found = dict.fromkeys(
        ("embedding", "head", "qkv_proj", "out_proj", "up_proj", "down_proj"), kind
    )
    if name == "mixed":
        found |= {"embedding": "q8_0", "head": "q8_0", "out_proj": "q4_0"}
        found |= {"qkv_proj": "dense", "down_proj": "dense"}
    # An odd number of its heads of 16 columns ends inside a block.
    if name == "narrow heads" and shares in ((1, 1), (3, 1), (5, 3, 1)):
        found["out_proj"] = "dense"
    return found


def as_dense(files: dict[str, Path], shares: tuple[int, ...] | None = None) -> None:
    mesh = init_mesh(tp=torch.distributed.get_world_size(), shares=shares)
    ids = torch.tensor([IDS])
    for name, path in files.items():
        with torch.inference_mode():
            exact = load(path, mesh).double()
            with backend.use("reference"):
                truth = exact(ids)[0]
        begin = exact.head._start
        shard = slice(begin, begin + exact.head.weight.shape[0])
        for dtype in DTYPES:
            with torch.inference_mode(), poisoned_empty():
                dense = load(path, mesh, dtype=dtype)
                held = load(path, mesh, dtype=dtype, weights="blocks")
                for module, kind in kinds_of(held).items():
                    expected = expected_kinds(name, mesh.tp.shares)[module.split(".")[-1]]
                    assert kind == expected, (name, module)
                rounded = whole_logits(dense, "torch")
                bound = FIXED_POINT * dense_bound(rounded, truth, mesh.tp.size, name)
                for isa in instruction_sets():
                    with instruction_set(isa):
                        # Prefilled by the kernel for few rows, and by that for many.
                        for prefilled in (5, 37):
                            ours = engine_logits(CPUDecoder(held, threads=1), IDS, prefilled)
                            what = f"{name} {dtype} {isa} {prefilled}"
                            assert_within(ours, truth[prefilled - 1 :, shard], bound, what)
                for row in (None, "torch", "reference"):
                    ours = whole_logits(held, row)
                    assert_within(ours, truth[-len(ours) :], bound, f"{name} {dtype} {row}")
            if dtype is not torch.float32:
                continue
            for sampling in (Sampling(), Sampling(temperature=0.9, seed=3)):
                said, ours = (
                    generate(model, PROMPTS, max_new_tokens=NEW_TOKENS, sampling=sampling).tokens
                    for model in (dense, held)
                )
                assert ours == said, name


def whole_logits(model: Decoder, row: str | None) -> Tensor:
    """All logits, by the modules on a row of the table, or where it finds one by itself."""
    if row is None:
        return teacher_forced_logits(model, [IDS[:5]], [[*IDS[5:], 0]])[0]
    with backend.use(row):
        return model(torch.tensor([IDS]))[0]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_logits_and_tokens_are_the_dense_models(files: dict[str, Path], ranks: int) -> None:
    launch(as_dense, ranks, files, threads=1)


@pytest.mark.parametrize("shares", [(3, 1), (5, 3, 1)], ids=str)
def test_logits_and_tokens_are_the_dense_models_at_unequal_shares(
    files: dict[str, Path], shares: tuple[int, ...]
) -> None:
    launch(as_dense, len(shares), files, shares, threads=1)


def over_axes(path: Path) -> list[list[int]]:
    """Tokens with the context cut over two ranks, then with the layers in two stages."""
    made = []
    for axis in ("cp", "pp"):
        model = load(path, init_mesh(**{axis: 2}), weights="blocks")
        assert "dense" not in kinds_of(model).values()
        made.append(generate(model, PROMPTS[:1], max_new_tokens=NEW_TOKENS, stop_ids=()).tokens[0])
    return made


def test_other_axes_say_the_same(files: dict[str, Path]) -> None:
    """A tied table lies on both ends of a pipeline."""
    model = load(files["q4_1"], init_mesh(tp=1))
    tokens = generate(model, PROMPTS[:1], max_new_tokens=NEW_TOKENS, stop_ids=()).tokens[0]
    for made in launch(over_axes, 2, files["q4_1"], threads=1):
        assert made == [tokens, tokens]


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q8_0"])
def test_memory_is_the_files(files: dict[str, Path], name: str) -> None:
    model = load(files[name], init_mesh(tp=1), weights="blocks")
    stored = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(files[name]).tensors)
    assert sum(p.numel() * p.itemsize for p in model.parameters()) == stored
    assert (model.head.weight is model.embedding.weight) == MODELS[name].tied
    # All in one block of memory, each piece on a line of its own.
    addresses = sorted(p.data_ptr() for p in model.parameters())
    assert all(address % 64 == 0 for address in addresses)
    assert addresses[-1] - addresses[0] < stored + 64 * len(addresses)


def test_progress_counts_what_is_held(files: dict[str, Path]) -> None:
    told = []
    model = load(
        files["mixed"],
        init_mesh(tp=1),
        weights="blocks",
        progress=lambda done, total: told.append((done, total)),
    )
    held = sum(p.numel() * p.itemsize for p in model.parameters())
    assert told[-1] == (held, held)
    assert told[0][0] < held


def shards(name: str, parts: int) -> list[tuple[str, Sharding]]:
    """The matrices of the first layer, and the table, as the decoder cuts them."""
    model = MODELS[name]
    layout = HeadLayout.of(model.heads, model.kv_heads, parts)
    query, kv = (cut(model.head_dim) for cut in (layout.query_sharding, layout.kv_sharding))
    cut, layer = features(model.intermediate, parts), "model.layers.0."
    return [
        ("model.embed_tokens.weight", even_parts(model.vocab, parts)),
        ("model.embed_tokens.weight", REPLICATED),
        (layer + "self_attn.q_proj.weight", query),
        (layer + "self_attn.k_proj.weight", kv),
        (layer + "self_attn.v_proj.weight", kv),
        (layer + "self_attn.o_proj.weight", query.along(1)),
        (layer + "mlp.gate_proj.weight", cut),
        (layer + "mlp.down_proj.weight", cut.along(1)),
        # Several ranges of columns, out of order.
        (layer + "mlp.down_proj.weight", Sharding(1, model.intermediate, (((64, 96), (0, 32)),))),
    ]


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("name", list(MODELS))
def test_slices_are_the_dense_ones(files: dict[str, Path], name: str, parts: int) -> None:
    """Rows of queries and keys in Hugging Face's order too."""
    checkpoint = open_checkpoint(files[name])
    seen = set()
    for tensor, sharding in shards(name, parts):
        for rank in range(len(sharding.ranges) or 1):
            kind = checkpoint.block_kind(tensor, sharding, rank)
            seen.add(kind)
            dense = checkpoint.read(tensor, sharding, rank)
            rows, columns = dense.shape
            inside = kind or "q8_0"
            out = torch.zeros(rows, columns // 32 * BLOCK_BYTES[inside], dtype=torch.uint8)
            if kind is None:
                with pytest.raises(CheckpointError, match="is not one of blocks; read it densely"):
                    checkpoint.read_blocks_into(out, tensor, sharding, rank)
                continue
            checkpoint.read_blocks_into(out, tensor, sharding, rank)
            packed = PackedWeight(weave_blocks_(out, kind), kind, torch.bfloat16)
            assert packed.shape == (rows, columns)
            assert torch.equal(packed.dequantized(), dense), tensor
    partly = name == "mixed" or (name == "narrow heads" and parts == 2)
    assert (None in seen) == partly and len(seen) > partly


def test_blocks_of_another_model_are_named(files: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(files["q4_0"])
    out = torch.empty(61, 64 // 32 * 18, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"of shape \(61, 96\) does not give .* \(61, 64\)"):
        checkpoint.read_blocks_into(out, "model.embed_tokens.weight", even_parts(61, 1), 0)


def test_the_decoder_in_cpp_is_kept_while_the_blocks_are(files: dict[str, Path]) -> None:
    model = load(files["q8_0"], init_mesh(tp=1), weights="blocks")
    assert reason_against(model) is None
    decoder = compiled(model)
    assert compiled(model) is decoder
    down = model.layers[0].mlp.down_proj
    down.weight.data = down.weight.data.clone()
    assert compiled(model) is not decoder


def test_what_blocks_are_not_for(files: dict[str, Path], tmp_path: Path) -> None:
    mesh = init_mesh(tp=1)
    with pytest.raises(ValueError, match="weights: expected None with sequence_parallel, since bl"):
        load(files["q4_0"], mesh, weights="blocks", sequence_parallel=True)
    with pytest.raises(
        ValueError, match="weights: expected None or 'int8' on meta, since only CPU"
    ):
        load(files["q4_0"], mesh, weights="blocks", device="meta")
    model = load(files["q4_0"], mesh, weights="blocks")
    with pytest.raises(
        ValueError, match=r"x: expected one that wants no gradient, since q4_0 weig"
    ):
        model.layers[0].mlp(torch.ones(1, 96, requires_grad=True))
    with pytest.raises(
        ValueError, match=r"weight: expected a floating dtype, got q4_0 weights, wh"
    ):
        save(model, tmp_path / "saved", mesh)
    with pytest.raises(ValueError, match="weight: expected a dense one to hold as int8, got q4_0"):
        model.head.quantize_weight()
    module = ColumnParallelLinear(64, 7, group=mesh.tp)
    data = torch.zeros(7, 36, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"data: expected blocks of \(7, 64\), got \(6, 64\)"):
        module.hold_blocks(data[:6], "q4_0")
    with pytest.raises(ValueError, match=r"kind: expected one of int8, q4_0, .* got 'q5_0'"):
        module.hold_blocks(data, "q5_0")
    with pytest.raises(ValueError, match=r"data: expected torch\.uint8 for q4_0, got torch\.int8"):
        module.hold_blocks(data.to(torch.int8), "q4_0")
    with pytest.raises(ValueError, match="data: expected contiguous blocks, got a view"):
        module.hold_blocks(torch.zeros(36, 7, dtype=torch.uint8).T, "q4_0")
    with pytest.raises(ValueError, match="scale: int8 goes with one"):
        PackedWeight(data.to(torch.int8), "int8", torch.float32)
    module.sequence_parallel = True
    with pytest.raises(ValueError, match="sequence_parallel: expected False for q4_0 weights"):
        module.hold_blocks(data, "q4_0")


def test_other_checkpoints_have_none(files: dict[str, Path], tmp_path: Path) -> None:
    mesh = init_mesh(tp=1)
    save(load(files["q4_0"], mesh), tmp_path / "saved", mesh)
    with pytest.raises(ValueError, match=r"None or 'int8' for .*saved, since only a GGUF file has"):
        load(tmp_path / "saved", mesh, weights="blocks")
    checkpoint = open_checkpoint(tmp_path / "saved")
    name, whole = "model.embed_tokens.weight", even_parts(61, 1)
    assert checkpoint.block_kind(name, whole, 0) is None
