"""Muon in Hugging Face's Trainer, which makes the optimizer itself: `optimizer_cls_and_kwargs`.

The Trainer calls a factory with the model, once it is where it is to be trained. A factory is a
function without arguments that returns the class. (The class alone would get lists of parameters
instead of the model, so that nobody knows which ones are embeddings.)

Run it with `python examples/hugging_face_factory.py`; a few seconds on a CPU, no download.
"""

import tempfile

import torch
import transformers

import steepest

TEXT = b"""\
Beautiful is better than ugly. Explicit is better than implicit. Simple is better than complex.
Complex is better than complicated. Flat is better than nested. Sparse is better than dense.
Readability counts. Special cases aren't special enough to break the rules.
"""
BLOCK = 32


def main() -> transformers.Trainer:
    """Train a small LLaMA on the bytes of the text."""
    transformers.set_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=BLOCK,
        )
    )  # fmt: skip
    data = torch.tensor(list(TEXT)).unfold(0, BLOCK, 1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=folder, max_steps=50, per_device_train_batch_size=16,
                lr_scheduler_type="cosine", warmup_steps=5, logging_steps=10, report_to=[],
                save_strategy="no", disable_tqdm=True,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in data],
            optimizer_cls_and_kwargs=(lambda: steepest.Muon, {"lr": 0.02, "weight_decay": 0.01}),
        )  # fmt: skip
        trainer.train()
    return trainer


if __name__ == "__main__":
    main()
