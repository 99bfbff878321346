"""The messages of one layer: what its modules ask of their group, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyparallel.comm.recorded import RecordedCommunicator
from pyparallel.drawing.svg import MARGIN, WIDTH, Block, arrow, human_bytes, rect, text
from pyparallel.layers.span import Span
from pyparallel.models.decoder import Decoder

HALVES = ("attention", "mlp")


@dataclass(frozen=True)
class Message:
    """One collective of a layer.

    Attributes:
        phase: "forward" or "backward"; half: of the layer, "attention" or "mlp".
        whole_bytes: of the reduced tensor, or the gathered one.
    """

    phase: str
    half: str
    operation: str
    whole_bytes: int


def messages_of(
    model: Decoder, communicator: RecordedCommunicator, *, sequences: int, tokens: int
) -> list[Message]:
    """Run one layer on the meta device, forward and backward, and hear what it says.

    Args:
        sequences, tokens: of the batch, B and S.
    """
    found: list[Message] = []
    now = ["forward", HALVES[0]]

    def hear() -> None:
        """What was said since the last time belongs to where the layer was until now."""
        told = ((op.replace("_", "-"), size) for op, size in communicator.in_turn)
        found.extend(Message(*now, op, size) for op, size in told)
        communicator.in_turn.clear()

    def enter(half: str) -> None:
        hear()
        now[1] = half

    layer, hooks = model.layers[0], []
    for half in HALVES:
        module = getattr(layer, half)
        hooks.append(module.register_forward_pre_hook(lambda *_, half=half: enter(half)))
        hooks.append(module.register_full_backward_pre_hook(lambda *_, half=half: enter(half)))
    communicator.in_turn.clear()
    kind = {"device": "meta", "dtype": model.head.dtype}
    shape = (sequences, model.own_tokens(tokens), model.config.hidden_size)
    x = torch.empty(shape, requires_grad=True, **kind)
    y = layer(x, Span.of([0] * sequences, tokens, device="meta", rotary=model.rotary))
    hear()
    now[0] = "backward"
    y.backward(torch.empty_like(y))
    hear()
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    return found


def messages_block(
    messages: list[Message], *, sequences: int, tokens: int, ranks: int, context: int
) -> Block:
    """A line a phase: the halves of the layer as frames, the messages in them in their order."""
    beside = "; attention's along cp come beside these" if context > 1 else ""
    shapes = [
        text(MARGIN, 12, "Messages of one layer", style="head"),
        text(
            MARGIN,
            28,
            f"{sequences} x {tokens} tokens over {ranks} tp ranks; bytes are those of the whole: "
            f"reduced, or gathered{beside}",
            style="note",
        ),
    ]
    if not messages:
        shapes.append(text(MARGIN, 52, "none: one rank of tp holds all of it"))
        return Block(60, tuple(shapes))
    y = 40.0
    for phase, order in (("forward", HALVES), ("backward", HALVES[::-1])):
        shapes.append(text(MARGIN, y + 34, phase))
        x = MARGIN + 80.0
        own = [[m for m in messages if (m.phase, m.half) == (phase, half)] for half in order]
        # As much room for a half as it has messages, and some for one that has fewer.
        parts = [max(2, len(each)) for each in own]
        for place, (half, each) in enumerate(zip(order, own, strict=True)):
            room = (WIDTH - 2 * MARGIN - 80 - 24) * parts[place] / sum(parts)
            shapes += _half(each, half, x, y, room)
            x += room + 24
            if place == 0:
                shapes.append(arrow(x - 22, y + 30, x - 3, y + 30))
        y += 70
    return Block(y, tuple(shapes))


def _half(messages: list[Message], half: str, x: float, y: float, room: float) -> list[str]:
    name = "attention" if half == "attention" else "MLP"
    shapes = [rect(x, y, room, 60, style="frame"), text(x + 8, y + 15, name, style="note")]
    width = min(130.0, (room - 8) / max(1, len(messages)) - 8)
    style = "on" if width >= 90 else "tight"
    for place, message in enumerate(messages):
        left = x + 8 + place * (width + 8)
        tip = f"{message.operation}, {message.whole_bytes} bytes"
        data = f"{message.phase} {half}/{message.operation}/{message.whole_bytes}"
        shapes.append(rect(left, y + 22, width, 32, style="box", tip=tip, data=data))
        middle = left + width / 2
        shapes.append(text(middle, y + 36, message.operation, style=style, anchor="middle"))
        size = human_bytes(message.whole_bytes)
        shapes.append(text(middle, y + 49, size, style=style, anchor="middle"))
    return shapes
