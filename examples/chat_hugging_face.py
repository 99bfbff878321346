"""Talk to a transformers model whose layers two ranks share; its own generate and chat template answer.

    python examples/chat_hugging_face.py --model DIR|GGUF --say "What is ...?" --say "And of Italy?"

Each rank reads its slices of the checkpoint. `pyparallel generate --chat` is the same as a command, with
the library's own, faster decoder.
"""

from __future__ import annotations

import argparse

import torch

import pyparallel
from pyparallel.models.dense import load_tokenizer


def chat(path: str, questions: list[str], max_new_tokens: int) -> list[dict[str, str]]:
    """What both ranks run: the conversation."""
    mesh = pyparallel.init_mesh(tp=2)
    model = pyparallel.load(path, mesh, transformers=True).eval()
    tokenizer = load_tokenizer(path)
    messages: list[dict[str, str]] = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        with torch.inference_mode():
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        answer = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
    return messages


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hugging Face folder, or a GGUF file")
    parser.add_argument("--say", action="append", required=True, help="a question; may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    args = parser.parse_args()
    for message in pyparallel.launch(chat, 2, args.model, args.say, args.max_new_tokens)[0]:
        print(f"{message['role']}: {message['content']}")
