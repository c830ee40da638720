"""Muon in Hugging Face's Trainer, made by you and handed over: `optimizers=(optimizer, schedule)`.

With `None` for the schedule the Trainer makes its own, from its arguments. The rates are those of
the optimizer, not `TrainingArguments.learning_rate`.

Run it with `python examples/hugging_face_instance.py`; a few seconds on a CPU, no download.
"""

import tempfile

import torch
import transformers

import steepest

CLASSES, LENGTH, WORDS = 4, 12, 64


def sentences(count: int) -> list[dict]:
    """Draw sequences of words; each class has a favourite quarter of the vocabulary."""
    labels = torch.randint(CLASSES, (count,))
    favourites = labels[:, None] * 16 + torch.randint(16, (count, LENGTH))
    others = torch.randint(WORDS, (count, LENGTH))
    words = torch.where(torch.rand(count, LENGTH) < 0.5, favourites, others)
    return [{"input_ids": w, "labels": y} for w, y in zip(words, labels, strict=True)]


def main() -> transformers.Trainer:
    """Train a small BERT to tell the classes apart."""
    transformers.set_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=LENGTH, num_labels=CLASSES,
        )
    )  # fmt: skip
    print(steepest.roles(model))  # which parameters get the matrix update, and why
    optimizer = steepest.Muon(model, lr=0.02, weight_decay=0.01)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 5, 60)
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=folder, max_steps=60, per_device_train_batch_size=32, logging_steps=10,
                report_to=[], save_strategy="no", disable_tqdm=True,
            ),
            train_dataset=sentences(2048),
            optimizers=(optimizer, schedule),
        )  # fmt: skip
        trainer.train()
    return trainer


if __name__ == "__main__":
    main()
