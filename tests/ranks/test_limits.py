"""Numbers from flags, calls and the environment: refused by name before anything is started."""

from __future__ import annotations

import os
import resource
import time

import pytest
import torch

from pyparallel.cli import main
from pyparallel.launch import RankError, launch
from pyparallel.mesh import init_mesh
from pyparallel.native.cpu import ops as cpu_ops
from tests.transformers_models import build

HUGE = 10**30


def nothing(*args: object) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("limits") / "llama"
    build("llama").save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def no_rank_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*args: object, **options: object) -> None:
        raise AssertionError("a rank was started")

    monkeypatch.setattr("pyparallel.commands.generate.launch", started)
    monkeypatch.setattr("pyparallel.commands.train.launch", started)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate --prompt a --threads 2000", "--threads: expected at most"),
        ("generate --prompt a --threads -1", "--threads: expected at least 1"),
        ("generate --prompt a --tp 70", "--tp: expected at most 64 ranks"),
        ("generate --prompt a --cp 1000000000000", "--cp: expected at most 64 ranks"),
        ("generate --prompt a --tp 9 --pp 9", "= 81 ranks: expected at most 64"),
        ("generate --prompt a --timeout nan", "--timeout: expected more than 0 seconds"),
        ("generate --prompt a --timeout 0", "--timeout: expected more than 0 seconds"),
        (
            "generate --prompt a --timeout 1e18",
            "--timeout: expected more than 0 seconds and at most",
        ),
        (f"generate --prompt a --seed {HUGE}", "--seed: expected at most"),
        (f"generate --prompt a --top-k {HUGE}", "--top-k: expected at most"),
        (f"generate --prompt a --max-new-tokens {HUGE}", "--max-new-tokens: expected at most"),
        ("generate --prompt a --temperature inf", "--temperature: expected a finite number"),
        ("generate --prompt a --tp x", "argument --tp: invalid int value"),
        ("train --tp 70", "--tp: expected at most 64 ranks"),
        ("train --tp 40", "use at most tp=9"),
        ("train --pp 3", "stages: expected 1 to 2"),
        ("train --threads 2000", "--threads: expected at most"),
        ("train --micro-batches 0", "--micro-batches: expected at least 1"),
        ("train --micro-batches 5", "--micro-batches: expected at most 4"),
        (f"train --steps {HUGE}", "--steps: expected at most"),
        (f"train --batch {HUGE}", "--batch: expected at most"),
        (f"train --length {HUGE}", "--length: expected at most"),
        (f"train --chunks {HUGE}", "--chunks: expected at most"),
        ("train --lr nan", "--lr: expected a finite number"),
        ("train --max-norm nan", "--max-norm: expected more than 0, or inf"),
        ("train --timeout -1", "--timeout: expected more than 0 seconds"),
        (f"kernels --jobs {HUGE}", "--jobs: expected at most"),
    ],
)
def test_flags(folder: str, words: str, said: str, capsys: pytest.CaptureFixture) -> None:
    model = [] if words.startswith("kernels") else ["--model", folder]
    started = time.monotonic()
    try:
        status = main([*words.split(), *model])
    except SystemExit as ended:
        status = ended.code
    error = capsys.readouterr().err
    assert said in error
    assert status == 2 and error.count("\n") == 1 and len(error) < 400
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"world_size": 65}, "world_size: expected at most 64 ranks"),
        ({"world_size": HUGE}, "world_size: expected at most 64 ranks"),
        ({"world_size": 2.0}, "world_size: expected an integer"),
        ({"world_size": True}, "world_size: expected an integer"),
        ({"threads": 2000}, "threads: expected at most"),
        ({"threads": 0}, "threads: expected at least 1"),
        ({"world_size": 64, "threads": 16}, "threads"),
        ({"timeout_s": float("nan")}, "timeout_s: expected more than 0 seconds"),
        ({"timeout_s": float("inf")}, "timeout_s: expected more than 0 seconds"),
        ({"timeout_s": 0}, "timeout_s: expected more than 0 seconds"),
        ({"timeout_s": "5"}, "timeout_s: expected seconds"),
    ],
)
def test_launch(given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        launch(nothing, **{"world_size": 1, **given})


@pytest.mark.parametrize("text", ["100000", "-1", "many", "4,100000", "9" * 4000])
def test_thread_variables(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    with pytest.raises(ValueError, match="OMP_NUM_THREADS: expected"):
        launch(nothing, 1)


@pytest.mark.parametrize(
    ("name", "text"),
    [("WORLD_SIZE", "x"), ("WORLD_SIZE", "0"), ("RANK", "7"), ("LOCAL_WORLD_SIZE", "-1")],
)
def test_a_launchers_variables(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in {"RANK": "0", "WORLD_SIZE": "1", name: text}.items():
        monkeypatch.setenv(variable, value)
    # Another test may have made this process a mesh of one already.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match=f"{name}: expected"):
        init_mesh()


@pytest.mark.parametrize("timeout_s", [float("nan"), float("inf"), -1, 1e300])
def test_init_mesh_timeout(timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s: expected more than 0 seconds"):
        init_mesh(timeout_s=timeout_s)


def threads_under_a_limit() -> str:
    if os.geteuid() == 0:
        # Root has no such limit.
        os.setgroups([])
        os.setresuid(65533, 65533, 65533)
    # Three threads start, and wait; the fourth does not.
    most = len(os.listdir("/proc/self/task")) + 3
    resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
    try:
        cpu_ops.rms_norm(torch.ones(64, 512), torch.ones(512), threads=9)
    except RuntimeError as error:
        return str(error)
    return "no limit"


def test_threads_that_do_not_start_are_an_error_and_no_wait() -> None:
    started = time.monotonic()
    (said,) = launch(threads_under_a_limit, 1, threads=1, timeout_s=10)
    assert "threads: expected 9, the system started 4" in said and "ulimit -u" in said
    assert time.monotonic() - started < 20


def test_a_limit_on_processes_is_told_before_ranks_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (20, 20))
    with pytest.raises(
        ValueError, match=r"ulimit -u: this user may have 20 .* 4 ranks of 2 threads"
    ):
        launch(nothing, 4, threads=2)


def too_many_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))
    init_mesh(tp=2)


def test_a_limit_on_files_is_told() -> None:
    with pytest.raises(RankError, match=r"ulimit -n|[Tt]oo many open files") as caught:
        launch(too_many_files, 2, timeout_s=10)
    assert len(str(caught.value).splitlines()[0]) < 400


def test_a_prompt_is_utf_8(folder: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["generate", "--model", folder, "--prompt", "w1 \udcff"]) == 2
    assert "--prompt: expected text in UTF-8, got the bytes b'w1 \\xff'" in capsys.readouterr().err
