"""launch() where a program is in no file, from a script without a guard, and under torchrun."""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import tokenizers
from jupyter_client.manager import start_new_kernel

from pyparallel.launch import launch
from pyparallel.ranks import job
from tests.transformers_models import build

ROOT = Path(__file__).parents[2]
WAIT_S = 120
# Everything that a rank needs of this program: a function, what it calls, a class both ways, a constant.
DEFINITIONS = """
from dataclasses import dataclass
import torch.distributed as dist
import pyparallel

SCALE = 10

@dataclass
class Told:
    rank: int
    asked: object

class Mine(Exception):
    pass

def scaled(rank):
    return rank * SCALE

def work(asked):
    group = pyparallel.init_mesh(tp=2).tp
    pyparallel.all_reduce(__import__("torch").ones(1), group)
    return Told(scaled(group.rank), asked)

def fail():
    raise Mine(f"of rank {dist.get_rank()}")
"""
CALLS = """
told = pyparallel.launch(work, 2, Told(7, None), threads=1)
assert all(type(one) is Told and type(one.asked) is Told for one in told), told
print([one.rank for one in told], told[0].asked.rank)
try:
    pyparallel.launch(fail, 1)
except pyparallel.RankError as error:
    print(type(error.__cause__) is Mine, error.reason)
"""
PRINTED = ["[0, 10] 7", "True Mine: of rank 0"]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def python(*arguments: str, given: str = "", cwd: Path | None = None) -> list[str]:
    done = subprocess.run(
        [sys.executable, *arguments],
        input=given,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env=environment(),
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "start",
    [
        "stdin",
        pytest.param("-c", marks=pytest.mark.slow),
        pytest.param("-i with a script", marks=pytest.mark.slow),
    ],
)
def test_a_program_that_is_in_no_file(start: str, tmp_path: Path) -> None:
    if start == "-c":
        assert python("-c", DEFINITIONS + CALLS) == PRINTED
    elif start == "stdin":
        assert python("-", given=DEFINITIONS + CALLS) == PRINTED
    else:
        # The script's own functions, and one that is typed afterwards.
        (tmp_path / "script.py").write_text(DEFINITIONS + CALLS)
        typed = "def late(): return scaled(4)\n\nprint(pyparallel.launch(late, 1))\n"
        assert python("-i", str(tmp_path / "script.py"), given=typed) == [*PRINTED, "[40]"]


def test_a_notebook(tmp_path: Path) -> None:
    manager, client = start_new_kernel(cwd=str(tmp_path), env=environment())
    printed: list[str] = []

    def hear(message: dict) -> None:
        if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
            printed.append(message["content"]["text"])

    try:
        for cell in (DEFINITIONS, CALLS):
            reply = client.execute_interactive(cell, timeout=WAIT_S, output_hook=hear)
            assert reply["content"]["status"] == "ok", reply["content"]
    except queue.Empty:
        pytest.fail("the kernel did not answer")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert "".join(printed).splitlines() == PRINTED


def test_without_cloudpickle_a_line_says_the_way_out(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    # By name it goes as ever.
    assert job.pickled(json.dumps, ("text",))
    typed = type("Typed", (), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Typed", typed, raising=False)
    with pytest.raises(ValueError, match=r"or `pip install cloudpickle`$"):
        job.pickled(json.dumps, (typed,))


def test_a_missing_guard_is_one_line(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text("import json, pyparallel\npyparallel.launch(json.dumps, 2, 1, threads=1)\n")
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env=environment(),
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        "launch: called while a rank imports unguarded.py, which launches ranks in turn; put the call, "
        'and all that only the launcher does, under `if __name__ == "__main__":`'
    )
    assert done.stderr.count("Traceback") == 1


def small_model(folder: Path) -> Path:
    build("llama").save_pretrained(folder)
    words = {f"w{i}": i for i in range(60)} | {"[UNK]": 60}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    return folder


def test_generate_under_torchrun_answers_once(tmp_path: Path) -> None:
    model = small_model(tmp_path / "llama")
    asked = ["generate", "-m", str(model), "--tp", "2", "-p", "w5 w9 w2", "--max-new-tokens", "5"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr"]
    torchrun += ["127.0.0.1", "--master-port", port, "-m", "pyparallel"]
    printed = python(*torchrun, *asked, "--json", "--check", cwd=tmp_path)
    assert len(printed) == 1
    told = json.loads(printed[0])
    assert told["matches_dense"] and [row["rank"] for row in told["ranks"]] == [0, 1]


def test_torchrun_with_another_number_of_ranks_is_one_line(monkeypatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(
        ValueError, match=r"^world_size: expected 4, the ranks that torchrun started"
    ):
        launch(json.dumps, 2, 1)


def test_more_threads_than_cores_warns_once(monkeypatch) -> None:
    # The package's attribute of that name is the function.
    launch_module = import_module("pyparallel.launch")
    monkeypatch.setattr(launch_module, "cores", lambda: 1)
    monkeypatch.setattr(launch_module, "_warned", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert launch(json.dumps, 2, 1, threads=1) == ["1", "1"]
    assert [str(warning.message).split(":")[1] for warning in caught] == [
        " 2 ranks x 1 threads on 1 cores"
    ]
    assert caught[0].filename == __file__
