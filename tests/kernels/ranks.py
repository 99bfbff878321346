"""Run a function on forked ranks that share symmetric memory, and return what each returned."""

import ctypes
import mmap
import os
import pickle
import select
import signal
import time
import traceback

import torch
from triton.runtime import interpreter

from pyparallel.kernels.collective.symmetric import FLAG_BYTES, SymmetricMemory


class YieldingClock:
    """The time module for the interpreter's polls: a rank that waits lets the others run."""

    @staticmethod
    def perf_counter_ns():
        time.sleep(1e-5)
        return time.perf_counter_ns()


def run_ranks(size, body, *, capacity=1 << 16, timeout_s=20.0, first_epoch=1, limit_s=120.0):
    """body(memory) on `size` forked processes; re-raises the first failure with its rank."""
    num_bytes = FLAG_BYTES + 2 * capacity
    maps = [mmap.mmap(-1, num_bytes) for _ in range(size)]
    views = [ctypes.c_char.from_buffer(m) for m in maps]
    addresses = [ctypes.addressof(v) for v in views]
    children = {}
    for rank in range(size):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            try:
                torch.set_num_threads(1)
                interpreter.time = YieldingClock
                memory = SymmetricMemory(
                    rank, addresses, num_bytes, timeout_s=timeout_s, first_epoch=first_epoch
                )
                result = ("ok", body(memory))
            except BaseException as error:
                result = (type(error).__name__, f"{error}\n{traceback.format_exc()}")
            with os.fdopen(write, "wb") as pipe:
                pickle.dump(result, pipe)
            os._exit(0)
        os.close(write)
        children[rank] = (pid, read)
    deadline = time.monotonic() + limit_s
    results, failures = {}, []
    for rank, (pid, read) in children.items():
        chunks = []
        while True:
            ready, _, _ = select.select([read], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                failures.append(f"rank {rank} still ran after {limit_s} s")
                os.kill(pid, signal.SIGKILL)
                break
            chunk = os.read(read, 1 << 16)
            if not chunk:
                break
            chunks.append(chunk)
        os.close(read)
        os.waitpid(pid, 0)
        if chunks:
            kind, value = pickle.loads(b"".join(chunks))
            if kind == "ok":
                results[rank] = value
            else:
                failures.append(f"rank {rank}: {kind}: {value}")
    del views
    for m in maps:
        m.close()
    if failures:
        raise RuntimeError("\n".join(failures))
    return [results[rank] for rank in range(size)]
