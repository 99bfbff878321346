"""Symmetric memory: every rank's region, reached through a table of int64 addresses.

A region, the same size on every rank and zeroed before the first call, holds

    flags  2 x NUM_FLAGS int32          data  2 x capacity bytes

in two halves that calls take in turn. A flag is raised by storing the call's epoch with
release order at system scope, and waited for with acquire order until it equals the epoch.

Protocol. Epochs grow by one a call and are the same on every rank. In call k a rank waits for
a flag of call k from every peer (directly or through a peer that did); a peer raises it in
call k, so it has finished call k - 1. Hence whoever enters call k + 1 knows that call k - 1 is
read everywhere, and may overwrite its half: no trailing barrier. For the same reason a flag is
not overwritten before it is seen, so equality is the whole test and wrapping is harmless.
Program i waits only for program i of its peers, or for an earlier program of its own rank, so
nothing hangs on which programs run at once.

Every wait is bounded. A program whose wait runs out notes the missing rank in `state`, goes on
without waiting, and the host raises TimeoutError from check().
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl

from pyparallel.kernels.launch import INTERPRETING

NUM_FLAGS = 65536
_NUM_FLAGS = tl.constexpr(NUM_FLAGS)
FLAG_BYTES = 2 * 4 * NUM_FLAGS
_FLAG_BYTES = tl.constexpr(FLAG_BYTES)
# Triton before 3.8 has no polling wait with a clock. A polling atomic takes longer than this many
# nanoseconds (on a GPU; in the interpreter), so that counting them waits at least as long as asked for.
HAS_POLL = hasattr(tl, "atomic_poll")
_HAS_POLL = tl.constexpr(HAS_POLL)
_POLL_NS = tl.constexpr(20_000 if INTERPRETING else 250)


@triton.jit
def region_data(addresses_ptr, rank, epoch, capacity, like_ptr):
    """This call's half of a rank's data, as a pointer to like_ptr's element type."""
    base = tl.load(addresses_ptr + rank) + _FLAG_BYTES + (epoch & 1).to(tl.int64) * capacity
    return tl.multiple_of(base, 16).to(tl.pointer_type(like_ptr.dtype.element_ty))


@triton.jit
def _flag(addresses_ptr, rank, epoch, index):
    base = tl.load(addresses_ptr + rank).to(tl.pointer_type(tl.int32))
    return base + (epoch & 1) * _NUM_FLAGS + index


@triton.jit
def signal(addresses_ptr, rank, epoch, index):
    """Raise flag `index` of a rank, after all that this program stored before."""
    tl.debug_barrier()
    tl.atomic_xchg(_flag(addresses_ptr, rank, epoch, index), epoch, sem="release", scope="sys")


@triton.jit
def _poll(flag, epoch, budget):
    """Whether the flag came to equal the epoch within about `budget` nanoseconds."""
    polls = budget // _POLL_NS
    seen = tl.atomic_cas(flag, epoch, epoch, sem="acquire", scope="sys") == epoch
    while (not seen) & (polls > 0):
        seen = tl.atomic_cas(flag, epoch, epoch, sem="acquire", scope="sys") == epoch
        polls -= 1
    return seen


@triton.jit
def wait(addresses_ptr, own_rank, epoch, index, missing, state_ptr, timeout_ns):
    """Wait for this rank's flag `index`, which rank `missing` raises; at most timeout_ns."""
    # After a first failure nobody waits again: one timeout bounds the whole kernel.
    failed = tl.load(state_ptr + 2, volatile=True)
    budget = tl.where(failed == 0, timeout_ns, 0).to(tl.int64)
    flag = _flag(addresses_ptr, own_rank, epoch, index)
    if _HAS_POLL:
        seen = tl.atomic_poll(flag, epoch, sem="acquire", scope="sys", timeout_ns=budget)
    else:
        seen = _poll(flag, epoch, budget)
    if not seen:
        if failed == 0:
            tl.store(state_ptr + 3, epoch)
            tl.store(state_ptr + 2, missing + 1)
    tl.debug_barrier()


@triton.jit
def signal_peers(addresses_ptr, own_rank, epoch, index, R: tl.constexpr):
    """Raise flag index * R + own_rank of every peer."""
    for step in tl.static_range(1, R):
        signal(addresses_ptr, (own_rank + step) % R, epoch, index * R + own_rank)


@triton.jit
def wait_peers(addresses_ptr, own_rank, epoch, index, state_ptr, timeout_ns, R: tl.constexpr):
    """Wait for flag index * R + peer of every peer."""
    for step in tl.static_range(1, R):
        peer = (own_rank + step) % R
        wait(addresses_ptr, own_rank, epoch, index * R + peer, peer, state_ptr, timeout_ns)


@triton.jit
def enter(state_ptr):
    """The epoch of this call, the same in every program of it."""
    return tl.load(state_ptr, volatile=True)


@triton.jit
def leave(state_ptr, epoch):
    """The last program to leave moves the epoch on: no host counter, so graphs replay."""
    tl.debug_barrier()
    left = tl.atomic_add(state_ptr + 1, 1, sem="acq_rel", scope="gpu")
    if left == tl.num_programs(0) - 1:
        tl.store(state_ptr + 1, 0)
        tl.store(state_ptr, epoch + 1)


class SymmetricMemory:
    """One rank's side of the regions of its group; kernels get its tensors, not this.

    addresses: where each rank's region is mapped in this process, 16-byte aligned. Who maps
    them (shared memory, CUDA peer memory) keeps them mapped and zeroes them before the first
    call. num_bytes: of a region.
    """

    def __init__(
        self, rank: int, addresses: Sequence[int], num_bytes: int, *,
        device: torch.device | str = "cpu", timeout_s: float = 30.0, first_epoch: int = 1,
    ) -> None:
        if not 0 <= rank < len(addresses):
            raise ValueError(f"rank: expected 0 to {len(addresses) - 1}, got {rank}")
        if any(address % 16 for address in addresses):
            raise ValueError("addresses: expected multiples of 16; align the regions")
        if num_bytes < FLAG_BYTES + 32:
            raise ValueError(f"num_bytes: expected over {FLAG_BYTES + 32}, got {num_bytes}")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s: expected a positive time, got {timeout_s}")
        self.rank, self.size = rank, len(addresses)
        self.capacity = (num_bytes - FLAG_BYTES) // 2 // 16 * 16
        self.timeout_ns = int(timeout_s * 1e9)
        self.addresses = torch.tensor(list(addresses), dtype=torch.int64, device=device)
        # Next epoch, programs that left, 1 + missing rank, epoch of the failure.
        self.state = torch.tensor([first_epoch, 0, 0, 0], dtype=torch.int32, device=device)

        # A GPU's state as it was after some earlier call, which the host can look at for nothing.
        self._noted = self.state.cpu().pin_memory() if self.state.is_cuda else self.state
        self._starts: dict[tuple[int, ...], torch.Tensor] = {}

    def starts(self, counts: Sequence[int]) -> torch.Tensor:
        """[R + 1] int64: where the parts of these sizes begin, and their end. Kept on the device."""
        key = tuple(counts)
        if key not in self._starts:
            edges = [0, *accumulate(key)]
            self._starts[key] = torch.tensor(edges, dtype=torch.int64, device=self.state.device)
        return self._starts[key]

    def need(self, name: str, num_bytes: int, num_flags: int) -> None:
        """ValueError unless a call of this size fits the region; TimeoutError where a wait of an
        earlier call is known to have run out."""
        self._raise(name, self._noted)
        if num_bytes > self.capacity:
            raise ValueError(f"{name}: expected at most {self.capacity} bytes of symmetric memory, "
                             f"got {num_bytes}; make the regions larger or the call smaller")
        if num_flags > NUM_FLAGS:
            raise ValueError(f"{name}: expected at most {NUM_FLAGS} flags, got {num_flags}; "
                             "make the call smaller")

    def check(self, name: str) -> None:
        """Raise TimeoutError if a wait ran out; waits for the device."""
        self._raise(name, self.state)

    def launched(self, name: str) -> None:
        """After every launch: the interpreter's failures are raised here, a GPU's by a later call."""
        if INTERPRETING:
            self.check(name)
        else:
            self._noted.copy_(self.state, non_blocking=True)

    def _raise(self, name: str, state: torch.Tensor) -> None:
        _, _, missing, epoch = state.tolist()
        if missing:
            raise TimeoutError(
                f"{name}: rank {self.rank} of {self.size} waited {self.timeout_ns / 1e9:g} s in "
                f"call {epoch} for rank {missing - 1}, which did not come"
            )
