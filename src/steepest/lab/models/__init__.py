"""Models to train and to study: the lab's own, the papers' presets, and doors to all others."""

from steepest.lab.losses import logits_of, loss_of
from steepest.lab.models.building import build_model, is_model_of_images, sizes_of, smaller
from steepest.lab.models.exchange import from_hugging_face, to_hugging_face
from steepest.lab.models.gpt import GPT, GPTConfig
from steepest.lab.models.llama import Llama, LlamaConfig
from steepest.lab.models.presets import PRESETS, Preset, preset_context
from steepest.lab.models.recomputation import recompute_activations
from steepest.lab.models.start import load_start

__all__ = [
    "GPT",
    "PRESETS",
    "GPTConfig",
    "Llama",
    "LlamaConfig",
    "Preset",
    "build_model",
    "from_hugging_face",
    "is_model_of_images",
    "load_start",
    "logits_of",
    "loss_of",
    "preset_context",
    "recompute_activations",
    "sizes_of",
    "smaller",
    "to_hugging_face",
]
