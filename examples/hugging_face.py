"""A Hugging Face causal language model with its head replaced, trained by Trainer.

python examples/hugging_face.py                  # some seconds on a CPU
python examples/hugging_face.py --model llama    # the same with a Llama
python examples/hugging_face.py --full           # a larger model and all of the text

The text is the documentation that comes with Python, in bytes, so that no tokenizer is needed.
Needs Hugging Face transformers (pip install transformers accelerate).
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import tempfile
from pydoc_data.topics import topics
from typing import Any

# Ctrl-C ends the program with a sentence, also during the imports below.
signal.signal(signal.SIGINT, lambda *_: sys.exit("Stopped by Ctrl-C."))

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from softsphere.integrations.transformers import from_pretrained, replace_lm_head


def config(model: str, full: bool) -> Any:
    width, layers = (384, 6) if full else (32, 2)
    tokens = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0}
    if model == "gpt2":
        return GPT2Config(n_embd=width, n_layer=layers, n_head=4, **tokens)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    return LlamaConfig(**sizes, num_attention_heads=4, **tokens)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=["gpt2", "llama"], default="gpt2")
    parser.add_argument("--full", action="store_true", help="a larger model and all of the text")
    options = parser.parse_args()

    set_seed(0)
    text = "\n".join(topics.values()).encode("latin-1", "replace")
    length = 256 if options.full else 32
    tokens = torch.tensor(list(text if options.full else text[:20_000]))
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    data = [{"input_ids": row, "labels": row} for row in rows]
    train, test = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]

    model = AutoModelForCausalLM.from_config(config(options.model, options.full))
    replace_lm_head(model, "taylor_softmax")  # this line is all that is new
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=10 if options.full else 3,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            logging_steps=10,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=test)
        trainer.train()
        found = trainer.evaluate()
        print(f"perplexity of a byte in the test text: {math.exp(found['eval_loss']):.2f}")
        trainer.save_model(folder)
        model = from_pretrained(folder).eval()
    start = torch.tensor([list(b"The ")])
    sampled = model.generate(start, do_sample=True, max_new_tokens=40, pad_token_id=0)
    print("sampled:", repr(bytes(sampled[0].tolist()).decode("latin-1")))


if __name__ == "__main__":
    main()
