"""A small GPT, written module by module, learns characters on a mesh of ranks.

    python examples/train_gpt.py                         # four CPU ranks of this machine: dp 2, tp 2
    torchrun --nproc-per-node 4 examples/train_gpt.py    # the same, started by torchrun

The text is the source of Python's own argparse. Every module takes the group that it is cut over; dense
weights are the same at every number of ranks, and so is the loss.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import pyparallel

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 96, 6, 3, 64, 16


class Block(nn.Module):
    def __init__(self, group: pyparallel.Group) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = pyparallel.ParallelAttention(WIDTH, HEADS, causal=True, group=group)
        self.mlp = pyparallel.ParallelMLP(WIDTH, 4 * WIDTH, "gelu", bias=True, group=group)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, group: pyparallel.Group) -> None:
        super().__init__()
        self.embedding = pyparallel.VocabParallelEmbedding(vocabulary, WIDTH, group=group)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block(group) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        # Each rank's part of the logits: the loss needs no more.
        self.head = pyparallel.ParallelLMHead(
            WIDTH, vocabulary, bias=False, gather_output=False, group=group
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, S, this rank's part of the vocabulary]."""
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.head(self.norm(self.blocks(self.embedding(ids) + self.positions(places))))


def batch_of(text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and targets [BATCH, LENGTH], the same on every rank."""
    starts = torch.randint(len(text) - LENGTH - 1, (BATCH,), generator=generator)
    rows = torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()])
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def continued(model: GPT, ids: list[int], count: int) -> list[int]:
    """``count`` more characters, each the likeliest."""
    model.head.gather_output = True
    for _ in range(count):
        logits = model(torch.tensor([ids[-LENGTH:]]))
        ids = [*ids, int(logits[0, -1].argmax())]
    model.head.gather_output = False
    return ids


def train(steps: int) -> tuple[list[float], str]:
    """What every rank runs; the losses and a continuation."""
    mesh = pyparallel.init_mesh(dp=2, tp=2)
    text = Path(argparse.__file__).read_text()
    letters = sorted(set(text))
    encoded = torch.tensor([letters.index(letter) for letter in text])
    generator = torch.Generator().manual_seed(1)

    torch.manual_seed(0)
    model = GPT(len(letters), mesh.tp)
    # Gradients of a loss that is a mean over this replica's tokens: averaged over replicas.
    replica = pyparallel.data_parallel(model, mesh, average=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, start = [], time.perf_counter()
    for step in range(steps):
        ids, targets = pyparallel.split_batch(batch_of(encoded, generator), mesh)
        loss = pyparallel.vocab_parallel_cross_entropy(
            replica(ids), targets, group=mesh.tp, vocab_size=len(letters)
        )
        loss.backward()
        pyparallel.clip_grad_norm_(model, 1.0, mesh)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(pyparallel.all_reduce(loss.detach(), mesh.dp)) / mesh.dp.size)
        if mesh.dp.rank == mesh.tp.rank == 0 and (step + 1) % 20 == 0:
            speed = (step + 1) * BATCH * LENGTH / (time.perf_counter() - start)
            print(f"step {step + 1:4d}  loss {losses[-1]:.3f}  {speed:.0f} tokens/s", flush=True)
    said = continued(model, encoded[:20].tolist(), 60)
    return losses, "".join(letters[number] for number in said)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    losses, said = pyparallel.launch(train, 4, parser.parse_args().steps)[0]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}\n{said}")
