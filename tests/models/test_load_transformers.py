"""load(transformers=True): transformers' own class of every family, each rank with its slices alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import initialization

from pyparallel.checkpoint.source import open_checkpoint
from pyparallel.launch import launch
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.hugging_face import _empty_model
from pyparallel.models.load import load
from pyparallel.models.parallelize import named_shardings
from pyparallel.models.swap import roles
from pyparallel.models.swap.plans import parent_of
from pyparallel.testing import assert_equal, poisoned_empty
from tests.checkpoint.gguf_files import MODELS, Model
from tests.models.test_parallelize_loading import Recording
from tests.transformers_models import build, class_of, inputs

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("llama tied", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "phi3", "granite")
GGUFS = {
    "tied": Model("Q4_1", hidden=96, heads=3, kv_heads=1, intermediate=160, tied=True),
    "mixed": MODELS["mixed"],
}
FACTORS = torch.linspace(1.0, 8.0, 16).tolist()
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
WITH_TEXT = ("llama tied", "mixed.gguf")
PROMPT = [5, 17, 3, 42, 9]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words w0 to w60 for the ids."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w60")


def says(model: torch.nn.Module, name: str) -> tuple[Tensor, str]:
    """Tokens by the model's own generate(), and, of some models, a text by pipeline()."""
    tokens = model.generate(torch.tensor([PROMPT]), **GREEDY)
    if name not in WITH_TEXT:
        return tokens, ""
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer())
    text = pipe(" ".join(f"w{i}" for i in PROMPT), return_full_text=False, **GREEDY)
    return tokens, text[0]["generated_text"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        build(name).save_pretrained(path / name)
    for name, model in GGUFS.items():
        model.write(path / f"{name}.gguf")
    return path


@pytest.fixture(scope="module")
def said(root: Path) -> dict[str, tuple[Tensor, str]]:
    """What the dense models say."""
    found = {name: says(class_of(name).from_pretrained(root / name), name) for name in FAMILIES}
    for name in GGUFS:
        kind = transformers.AutoModelForCausalLM
        dense = kind.from_pretrained(root, gguf_file=f"{name}.gguf", dtype=torch.float32)
        found[f"{name}.gguf"] = says(dense.eval(), f"{name}.gguf")
    return found


def check_slices(root: Path, mesh: Mesh) -> None:
    """Parameters are the dense ones' parts, and not a byte more is read."""
    for name in FAMILIES:
        dense, checkpoint = build(name), Recording(root / name)
        model = load(checkpoint, mesh, transformers=True)
        assert isinstance(model, class_of(name)), name
        assert model.loaded_from == root / name
        shardings = named_shardings(model)
        for n, p in model.named_parameters():
            part = shardings[n].split(dense.get_parameter(n).detach(), mesh.tp.rank)
            assert_equal(p.detach(), part, f"{name} {n}")
        share = sum(p.numel() * p.itemsize for p in model.parameters())
        assert checkpoint.bytes == share, f"{name}: {checkpoint.bytes} read of {share}"


def check_says(root: Path, said: dict[str, tuple[Tensor, str]], mesh: Mesh) -> None:
    for name, (tokens, text) in said.items():
        model = load(root / name, mesh, transformers=True)
        found, written = says(model, name)
        assert_equal(found, tokens, name)
        assert written == text, name
        loss = model.train()(**inputs(model)).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters()), name


def check_listed_frequencies(root: Path, mesh: Mesh) -> None:
    """A GGUF's rope_freqs.weight divides the rotary frequencies, as in the library's own decoder."""
    checkpoint = open_checkpoint(root / "tied.gguf")
    plain = dict(checkpoint.config())
    assert "rope_factors" not in plain
    ids = torch.tensor([PROMPT])
    before = load(checkpoint, mesh)(ids)
    checkpoint.config = lambda: {**plain, "rope_factors": tuple(FACTORS)}
    with torch.inference_mode():
        truth, ours = (load(checkpoint, mesh, transformers=which)(ids) for which in (False, True))
    largest = float(truth.abs().max())
    assert float((truth - before).abs().max()) > 0.01 * largest
    assert float((ours.logits - truth).abs().max()) < 1e-5 * largest


def check_stages(root: Path) -> None:
    """A stage of a pipeline reads its own layers; a tied head, its copy of the embedding."""
    mesh = init_mesh(pp=3)
    for name in ("llama tied", "gpt2"):
        dense = build(name, num_hidden_layers=3)
        checkpoint = Recording(root / "three" / name)
        model = load(checkpoint, mesh, transformers=True)
        assert model.stage.index == mesh.pp.rank
        whole = dict(dense.named_parameters(remove_duplicate=False))
        for n, p in model.named_parameters():
            assert_equal(p.detach(), whole[n].detach(), f"{name} {n}")
        share = sum(p.numel() * p.itemsize for p in model.parameters())
        assert checkpoint.bytes == share, name


def on_three(root: Path, said: dict[str, tuple[Tensor, str]]) -> None:
    mesh = init_mesh(tp=3)
    with poisoned_empty():
        check_slices(root, mesh)
        check_says(root, said, mesh)
        check_listed_frequencies(root, mesh)
        check_stages(root)


def test_on_three_ranks(root: Path, said: dict[str, tuple[Tensor, str]]) -> None:
    for name in ("llama tied", "gpt2"):
        build(name, num_hidden_layers=3).save_pretrained(root / "three" / name)
    launch(on_three, 3, root, said, threads=1, timeout_s=240.0)


def test_what_it_can_not_be_asked_for(root: Path) -> None:
    mesh = init_mesh()
    with pytest.raises(
        ValueError, match="recompute: expected 'none' for a qwen3 model, got 'layers'"
    ):
        load(root / "qwen3", mesh, transformers=True, recompute="layers")
    with pytest.raises(ValueError, match="weights: expected None for a llama model"):
        load(root / "tied.gguf", mesh, transformers=True, weights="blocks")


def test_roles_are_found_in_a_look_at_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attention looked through the roles of all layers."""
    counts = []
    for layers in (2, 8):
        model, asked = build("llama", num_hidden_layers=layers), []

        def counted(name: str, asked: list[str] = asked) -> str:
            asked.append(name)
            return parent_of(name)

        monkeypatch.setattr(roles, "parent_of", counted)
        assert len(roles.roles_of(model).attentions) == layers
        counts.append(len(asked))
    assert counts[1] <= 4 * counts[0]


def test_no_values_are_drawn_for_tensors_without_storage(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setitem(
        initialization.TORCH_INIT_FUNCTIONS, "normal_", lambda *args, **options: drawn.append(args)
    )
    model = _empty_model(open_checkpoint(root / "qwen2"), None)
    assert not drawn
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
