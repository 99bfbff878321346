"""The sweep: every type, plain and with drawn settings, on meshes of two and three ranks."""

from __future__ import annotations

import json
import traceback
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from tests.families.compare import continued, loaded, staged, truths, whole_calls
from tests.families.settings import OWN, Case, built, draw, kinds
from tests.truths import truths_of

# A mesh, and whether between the matmuls each rank has its own tokens.
MESHES = (
    ({"tp": 2}, False),
    ({"tp": 3}, False),
    ({"tp": 2}, True),
    ({"cp": 2}, False),
    ({"pp": 2}, False),
)
# Of the types that transformers runs.
SOME = (*OWN, "cohere", "gemma3_text", "glm", "granite", "olmo2", "phi3")
# Refused with a reason, by the words of the refusal: what can't be right is said, once.
REFUSALS = (
    # Plans: of the embedding alone, of two row-wise outputs, of a bare parameter.
    "no plan for the layers of model type",
    "and one row-wise output in its plan",
    "the plan cuts this bare parameter",
    # Layers that are not one stack, or draw masks for what is cut.
    "sequence_parallel: expected one stack of layers whose attention is cut by",
    "expected 0 with sequence_parallel",
    "cp: expected 1 for a",
    "changes its hidden states outside of its layers",
    "mesh: expected pp=1",
    "can't be cut into",
    "stages: expected 1 to 1, a layer each",
    "scale_attn_weights: expected True",
    "scale_attn_by_inverse_layer_idx: expected False",
    "hidden_act: expected one of",
    "activation_function: expected one of",
    # load(): stored otherwise than held, or read by transformers itself alone.
    "is stored in another layout than the model's",
    "transformers makes no FalconH1ForCausalLM",
    "num_experts of its config",
)


def said(folder: str, orders: int) -> tuple[dict, list[list[int]] | None]:
    """What the dense model of a folder says: its steps, and its tokens."""
    dense = from_folder(folder)
    return truths(dense, orders), continued(dense)


def on_ranks(
    cases: list[dict], folders: list[str], dense_said: list, sizes: dict, sequence_parallel: bool
):
    """What each case got wrong, or how it is refused: (wrong, refused)."""
    mesh = init_mesh(**sizes)
    wrong, refused = [], []
    for content, folder, (truth, expected) in zip(cases, folders, dense_said, strict=True):
        case = Case(content["kind"], content["options"], tuple(content["dropped"]))
        if False not in truth:
            continue
        dense = from_folder(folder)
        doors = []
        if mesh.pp.size > 1:
            doors.append(lambda c=case, d=dense, t=truth: staged(c, d, mesh, t))
        else:
            doors.append(
                lambda c=case, d=dense, t=truth: whole_calls(c, d, mesh, t, sequence_parallel)
            )
        if not sequence_parallel and mesh.pp.size == 1:
            doors.append(
                lambda c=case, f=folder, t=truth, e=expected: loaded(c, Path(f), mesh, t, e)
            )
        for door in doors:
            try:
                wrong += door()
            except ValueError as error:
                refused.append((case.kind, str(error)))
            except Exception:
                wrong.append(f"{case} {mesh}: {traceback.format_exc(limit=-3)}")
    return wrong, refused


def from_folder(folder: str) -> torch.nn.Module:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


_folders: dict[str, Path | None] = {}


def folder_of(case: Case, root: Path) -> Path | None:
    """Of the case's checkpoint, written at its first mention; None if transformers makes none."""
    key = repr(case)
    if key not in _folders:
        folder = root / f"family-{len(_folders)}"
        _folders[key] = None if built(case, folder) is None else folder
    return _folders[key]


def sweep(
    cases: list[Case], factory: pytest.TempPathFactory, meshes: tuple, orders: int = 1
) -> dict[str, set[str]]:
    """Asserts that nothing is wrong; the types that were refused, by the reason."""
    made = [(case, folder_of(case, factory.getbasetemp())) for case in cases]
    made = [(case, folder) for case, folder in made if folder is not None]
    assert len(made) > len(cases) / 3, "most settings are to be ones that transformers has"
    contents = [{"kind": c.kind, "options": c.options, "dropped": list(c.dropped)} for c, _ in made]
    json.dumps(contents)
    folders = [str(folder) for _, folder in made]
    dense_said = truths_of(said, [(folder, orders) for folder in folders])
    wrong: list[str] = []
    reasons: dict[str, set[str]] = {}
    for sizes, sequence_parallel in meshes:
        ranks = max(sizes.values())
        results = launch(
            on_ranks,
            ranks,
            contents,
            folders,
            dense_said,
            sizes,
            sequence_parallel,
            threads=1,
            timeout_s=300.0,
        )
        for found, refused in results:
            wrong += found
            for kind, reason in refused:
                assert "\n" not in reason, reason
                reasons.setdefault(reason, set()).add(kind)
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:40])
    return reasons


def check_refusals(reasons: dict[str, set[str]]) -> None:
    for reason, found in reasons.items():
        assert any(words in reason for words in REFUSALS), (reason, found)
        # Our own decoder lacks these, which parallelize() has.
        own = "can't be cut into", "stages:", "scale_attn_", "hidden_act", "activation_function"
        assert not found & set(OWN) or any(words in reason for words in own), (reason, found)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_plain_models_of_some_types(mesh: tuple, tmp_path_factory: pytest.TempPathFactory) -> None:
    cases = [draw(kind, 0) for kind in SOME]
    check_refusals(sweep(cases, tmp_path_factory, (mesh,), orders=0))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_plain_models_of_every_type(mesh: tuple, tmp_path_factory: pytest.TempPathFactory) -> None:
    cases = [draw(kind, 0) for kind in kinds()]
    check_refusals(sweep(cases, tmp_path_factory, (mesh,), orders=0))


@pytest.mark.parametrize("seed", range(1, 4))
def test_drawn_settings_of_our_own_decoders(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cases = [draw(kind, seed) for kind in OWN]
    check_refusals(sweep(cases, tmp_path_factory, (MESHES[seed - 1],)))


# Shrinking would launch ranks a hundred times more: a case that is found is data, and can be run alone.
@pytest.mark.slow
@settings(
    max_examples=5,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    mesh=st.sampled_from(MESHES),
    drawn=st.lists(
        st.tuples(st.sampled_from(kinds()), st.integers(1, 1 << 20)), min_size=12, max_size=12
    ),
)
def test_drawn_settings_of_any_type(
    mesh: tuple, drawn: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    cases = [draw(kind, seed) for kind, seed in drawn]
    check_refusals(sweep(cases, tmp_path_factory, (mesh,), orders=1))
