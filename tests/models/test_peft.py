"""LoRA of peft on cut models: values, gradients, files, merging and generation as the dense model's."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from pyparallel.launch import launch
from pyparallel.layers.parameters import ShardedModule
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.load import load
from pyparallel.models.parallelize import named_shardings, parallelize
from pyparallel.testing import assert_equal, poisoned_empty
from tests.models.peft_truth import (
    CASES,
    SEQUENCE,
    Truth,
    adapted,
    base_of,
    config_of,
    ends,
    near,
    step,
    truth_of,
)
from tests.transformers_models import inputs

pytestmark = pytest.mark.usefixtures("one_thread")

# Compared in the other order too; of the rest its files are.
AFTER = ("llama", "gpt2", "llama tied")


def compare(model: nn.Module, truth: Truth, mesh: Mesh, what: str) -> None:
    """Training, generation and merging of one case."""
    found = step(model, inputs(model))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert found.keys() == truth.step.keys() == {"loss", "logits", *trained}, what
    shardings = named_shardings(model)
    for n, exact in truth.step.items():
        part = shardings[n].split(exact, mesh.tp.rank) if n in shardings else exact
        near(found[n], part, f"{what} {n}", exact)
    tokens, logits, told = ends(model)
    assert_equal(tokens, truth.tokens, f"{what} tokens")
    near(logits, truth.logits, f"{what} merged")
    assert_equal(told, truth.told, f"{what} tokens, merged")


def check_both_orders(
    mesh: Mesh, root: Path, truths: dict[str, Truth], sequence: bool = False
) -> None:
    for name, truth in truths.items():
        out = root / f"{name} {mesh.tp.size} {sequence}"
        before = parallelize(adapted(name), mesh, sequence_parallel=sequence)
        before.save_pretrained(out)
        assert same_files(out, root / name), f"{name}: saved"
        # The other order, from the dense run's file: loading an adapter is a call of get_peft_model.
        after = parallelize(base_of(name), mesh, sequence_parallel=sequence)
        after = peft.PeftModel.from_pretrained(after, root / name, is_trainable=True)
        after.save_pretrained(out / "again")
        assert same_files(out / "again", root / name), f"{name}: loaded and saved"
        compare(before, truth, mesh, f"{name} before R={mesh.tp.size} {sequence}")
        if name in AFTER:
            compare(after, truth, mesh, f"{name} after R={mesh.tp.size} {sequence}")


def same_files(ours: Path, theirs: Path) -> bool:
    torch.distributed.barrier()
    ours_, theirs_ = (json.loads((f / "adapter_config.json").read_text()) for f in (ours, theirs))
    for config in (ours_, theirs_):
        # peft writes a set, in no order.
        config["target_modules"] = sorted(config["target_modules"])
    name = "adapter_model.safetensors"
    return ours_ == theirs_ and (ours / name).read_bytes() == (theirs / name).read_bytes()


def check_new_adapters(mesh: Mesh) -> None:
    """get_peft_model on a cut model draws what it draws on the dense one, whatever a rank's seed."""
    for name in ("llama", "gpt2"):
        model, dense = parallelize(base_of(name), mesh), base_of(name)
        torch.manual_seed(7)
        dense = peft.get_peft_model(dense, config_of(name))
        torch.manual_seed(7 + mesh.tp.rank)
        model = peft.get_peft_model(model, config_of(name))
        assert model.peft_config["default"].to_dict() == dense.peft_config["default"].to_dict()
        shardings, whole = named_shardings(model), dict(dense.named_parameters())
        assert shardings.keys() == whole.keys()
        for n, p in model.named_parameters():
            assert_equal(p.detach(), shardings[n].split(whole[n].detach(), mesh.tp.rank), n)
        matrices = [m for n, m in model.named_modules() if n.endswith(".default")]
        assert all(isinstance(m, ShardedModule | nn.Dropout) for m in matrices)


def check_attention_dropout(mesh: Mesh) -> None:
    """Masks of whole activations are alike on all ranks inside attention that drops on its own."""
    model = parallelize(adapted("llama", attention_dropout=0.5), mesh)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    seen: list[Tensor] = []
    layer.lora_dropout["default"].register_forward_hook(lambda m, a, y: seen.append(y.detach()))
    step(model, inputs(model))
    (dropped,) = seen
    assert bool((dropped == 0).any())
    everyone = [torch.empty_like(dropped) for _ in range(mesh.tp.size)]
    torch.distributed.all_gather(everyone, dropped)
    for other in everyone:
        assert_equal(other, dropped, "dropped")


REFUSED = {
    "use_dora": "DoraLinearVariant",
    "lora_bias": "lora_bias: expected False",
}
REFUSED_BESIDE = {"trainable_token_indices": [1], "layer_replication": [[0, 2], [1, 2]]}
REFUSED_AFTER = {
    "init_lora_weights": ("pissa", "init_lora_weights: expected True"),
    "trainable_token_indices": ([1], "trainable_token_indices: expected none"),
}


def check_refused(mesh: Mesh, root: Path) -> None:
    if mesh.tp.rank == 0:
        base_of("llama").save_pretrained(root / "base")
    torch.distributed.barrier()
    with pytest.raises(
        ValueError, match=r"got the library's own Decoder; load it .*transformers=True"
    ):
        peft.get_peft_model(load(root / "base", mesh), peft.LoraConfig(target_modules=["up_proj"]))
    for option, words in REFUSED.items():
        options = {"target_modules": ["q_proj"], "r": 2, option: True}
        model = peft.get_peft_model(base_of("llama"), peft.LoraConfig(**options))
        before = {n: type(m) for n, m in model.named_modules()}
        with pytest.raises(ValueError, match=f"q_proj: .*{words}"):
            parallelize(model, mesh)
        assert {n: type(m) for n, m in model.named_modules()} == before
    for option, (value, words) in {
        **{k: (True, v) for k, v in REFUSED.items()},
        **REFUSED_AFTER,
    }.items():
        config = peft.LoraConfig(target_modules=["q_proj"], r=2, **{option: value})
        with pytest.raises(ValueError, match=words):
            peft.get_peft_model(parallelize(base_of("llama"), mesh), config)
    for option, value in REFUSED_BESIDE.items():
        config = peft.LoraConfig(target_modules=["q_proj"], r=2, **{option: value})
        with pytest.raises(ValueError, match=f"{option}: expected none"):
            parallelize(peft.get_peft_model(base_of("llama"), config), mesh)
    ia3 = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    with pytest.raises(ValueError, match="expected LoRA of a PeftModel, got IA3"):
        parallelize(peft.get_peft_model(base_of("llama"), ia3), mesh)
    whole = nn.Module()
    whole.model, whole.config = base_of("llama"), base_of("llama").config
    whole.tp_plan = whole.model.tp_plan
    with pytest.raises(ValueError, match=r"cut no layer of a Module: .* model type 'llama'"):
        parallelize(whole, mesh)
    model = parallelize(adapted("llama"), mesh)
    with pytest.raises(ValueError, match="adapter_names: expected None"):
        model.eval()(**inputs(model), adapter_names=["default", "default"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense runs' adapter files."""
    path = tmp_path_factory.mktemp("adapters")
    for name in CASES:
        adapted(name).save_pretrained(path / name)
    return path


@pytest.fixture(scope="module")
def truths() -> dict[str, Truth]:
    return {name: truth_of(name) for name in CASES}


def on_three(root: Path, truths: dict[str, Truth]) -> None:
    mesh = init_mesh(tp=3)
    with poisoned_empty():
        check_both_orders(mesh, root, truths)
        check_both_orders(mesh, root, {name: truths[name] for name in SEQUENCE}, sequence=True)
        check_new_adapters(mesh)
        check_attention_dropout(mesh)
    check_refused(mesh, root)


def test_equals_dense_in_both_orders(root: Path, truths: dict[str, Truth]) -> None:
    launch(on_three, 3, root, truths, threads=1, timeout_s=240.0)


def on_four(root: Path, truths: dict[str, Truth]) -> None:
    """Fewer KV heads than ranks."""
    mesh = init_mesh(tp=4, shares=(3, 1, 2, 1))
    with poisoned_empty():
        check_both_orders(mesh, root, {name: truths[name] for name in ("llama", "phi3")})


def test_replicated_heads_and_unequal_shares(root: Path, truths: dict[str, Truth]) -> None:
    launch(on_four, 4, root, truths, threads=1, timeout_s=240.0)
