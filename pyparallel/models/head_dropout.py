"""Random numbers for work on shards: each rank its own, while what is replicated stays alike.

Dropout on replicated activations must drop the same elements on every rank, and dropout on a rank's
own heads must not drop what its peers drop on theirs. So all ranks draw from one generator state, and
between the two hooks of a region each rank continues from a seed of its own; afterwards the common
state goes on as if every rank had drawn one number.
Source: Shoeybi et al. 2019, "Megatron-LM", section 5 (model parallel random seeds).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pyparallel.comm.collectives import broadcast_raw
from pyparallel.comm.group import Group


class OwnRandomness:
    """The region of ``core``'s forward from its start to ``out``'s, or its end, in training.

    Args:
        core: the module whose own dropouts act on this rank's heads.
        out: the projection whose input is the last shard.
        group: the ranks.
    """

    # The region that the process is in; they are not nested.
    inside: OwnRandomness | None = None

    def __init__(self, core: nn.Module, out: nn.Module, group: Group) -> None:
        self.group = group
        self._common: tuple[torch.Generator, Tensor] | None = None
        core.register_forward_pre_hook(self.enter)
        out.register_forward_pre_hook(self.leave)
        core.register_forward_hook(self.leave, always_call=True)

    def enter(self, core: nn.Module, args: tuple) -> None:
        """Continue from a seed of this rank's own, if the core drops anything."""
        if not core.training or not _drops(core):
            return
        # Drawn on the CPU, where reading it does not wait for a device.
        seed = int(torch.randint(2**62, (1,)))
        generator = _generator(next(core.parameters()).device)
        self._common = generator, generator.get_state()
        generator.manual_seed(seed + self.group.rank)
        OwnRandomness.inside = self

    def leave(self, *_: object) -> None:
        """Back to what all ranks share."""
        if self._common is not None:
            generator, state = self._common
            self._common = OwnRandomness.inside = None
            generator.set_state(state)

    @contextmanager
    def draw_alike(self) -> Iterator[None]:
        """Inside, draw from what all ranks share, and go on with it behind the region."""
        generator, state = self._common
        own = generator.get_state()
        generator.set_state(state)
        try:
            yield
        finally:
            self._common = generator, generator.get_state()
            generator.set_state(own)


@contextmanager
def drawing_alike() -> Iterator[None]:
    """Inside, random numbers are the same on all ranks, within a region of their own too: for what acts
    on whole activations there."""
    region = OwnRandomness.inside
    if region is None:
        yield
        return
    with region.draw_alike():
        yield


def share_generator_state(group: Group, device: torch.device) -> None:
    """Give every rank of ``group`` the first one's states of the CPU's and ``device``'s generators."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(_generator(device))
    for generator in generators:
        state = broadcast_raw(generator.get_state(), group)
        generator.set_state(state)


def _drops(core: nn.Module) -> bool:
    """Whether a dropout inside the region is more than 0: modules, or numbers by that name.

    A dropout of what goes to the residual stream comes after the output projection.
    """
    rates = []
    for name, value in (*vars(core).items(), *core.named_children()):
        if "dropout" in name and not name.startswith("resid"):
            rates.append(value.p if isinstance(value, nn.Dropout) else value)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
