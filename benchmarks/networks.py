"""Small networks of many kinds, each with batches to train on and fresh ones, and its loss.

Images are the 8 x 8 digits of scikit-learn (900 to train on, 897 fresh), text is Python's standard
library, tables are breast cancer; the rest is drawn. All of it is seeded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.lab.data import Sampler, load
from steepest.lab.models import GPT, GPTConfig

Batch = tuple[Tensor, Tensor]
Draw = Callable[[int], Batch]


class Problem(NamedTuple):
    """A model, its loss, and batches by number: to train on, and fresh ones."""

    model: nn.Module
    loss: Callable[[Any, Batch], Tensor]
    train: Draw
    fresh: Draw


@dataclass(frozen=True)
class Kind:
    """How to build one, for a number of examples in a batch."""

    model: Callable[[], nn.Module]
    data: Callable[[int], tuple[Draw, Draw]]
    loss: Callable[[Any, Batch], Tensor]


def problem(name: str, size: int) -> Problem:
    torch.manual_seed(0)
    kind = {**KINDS, **HUGGING_FACE}[name]
    model = kind.model()
    train, fresh = kind.data(size)
    return Problem(model, kind.loss, train, fresh)


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


# Losses.


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def of_logits(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch[0], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())


def squares(model: nn.Module, batch: Batch) -> Tensor:
    return 0.5 * (model(batch[0]) - batch[1]).square().sum(-1).mean()


def reconstruction(model: nn.Module, batch: Batch) -> Tensor:
    return 0.5 * (model(batch[0]) - batch[0]).square().sum(1).mean()


# Data.


def split(inputs: Tensor, targets: Tensor, parts: int, size: int) -> tuple[Draw, Draw]:
    """Batches from the first `parts` examples of a fixed order, and the others one by one."""
    order = torch.randperm(len(inputs), generator=seeded(7))

    def train(i: int) -> Batch:
        chosen = order[:parts][torch.randint(parts, (size,), generator=seeded(i))]
        return inputs[chosen], targets[chosen]

    def fresh(i: int) -> Batch:
        chosen = order[parts:][i * size : (i + 1) * size]
        if len(chosen) < size:
            raise ValueError(f"got batch {i} of {size}, more than the fresh examples there are")
        return inputs[chosen], targets[chosen]

    return train, fresh


def drawn(base: int, batch: Callable[[torch.Generator], Batch]) -> tuple[Draw, Draw]:
    """Batches without end."""

    def train(i: int) -> Batch:
        return batch(seeded(base + i))

    return train, lambda i: train(10**6 + i)


X, Y = load_digits(return_X_y=True)
IMAGES, DIGITS = torch.tensor(X, dtype=torch.float32) / 8 - 1, torch.tensor(Y)
VALUES = (DIGITS.float() - 4.5) / 2.87


def whitened() -> Tensor:
    U = torch.linalg.svd(IMAGES - IMAGES.mean(0), full_matrices=False)[0]
    return U[:, :32] * math.sqrt(len(IMAGES))


def digits(size: int) -> tuple[Draw, Draw]:
    return split(IMAGES, DIGITS, 900, size)


def white_digits(size: int) -> tuple[Draw, Draw]:
    return split(whitened(), DIGITS, 900, size)


def white_values(size: int) -> tuple[Draw, Draw]:
    return split(whitened(), VALUES[:, None], 900, size)


def value_and_parity(size: int) -> tuple[Draw, Draw]:
    return split(IMAGES, torch.stack([VALUES, (DIGITS % 2).float() - 0.5], 1), 900, size)


def patients(size: int) -> tuple[Draw, Draw]:
    A, b = load_breast_cancer(return_X_y=True)
    A = torch.tensor((A - A.mean(0)) / A.std(0), dtype=torch.float32)
    return split(A, torch.tensor(b), 300, min(size, 12))


def text(size: int) -> tuple[Draw, Draw]:
    sampler = Sampler(load("stdlib").train, max(2, size // 4), 32, 0)

    def train(i: int) -> Batch:
        tokens, following = sampler.batch(i)
        return tokens.clone(), following.clone()

    return train, lambda i: train(10**6 + i)


def white_noise(
    base: int, width: int, examples: int, target: Callable[[Tensor], Tensor]
) -> Callable[[int], tuple[Draw, Draw]]:
    def batch(size: int, g: torch.Generator) -> Batch:
        x = torch.randn(examples * size, width, generator=g)
        return x, target(x)

    return lambda size: drawn(base, lambda g: batch(size, g))


MANY = torch.randn(32, 12, generator=seeded(9)) / 5.6
ONE = torch.randn(32, 1, generator=seeded(10)) / 5.6
THREE = torch.randn(48, 3, generator=seeded(5)) / 7


def products(x: Tensor) -> Tensor:
    z = x @ THREE
    return torch.tanh(2 * z[:, :1]) + z[:, 1:2] * z[:, 2:]


def series(size: int) -> tuple[Draw, Draw]:
    """Of four numbers, each from the one before, with noise."""
    A = torch.randn(4, 4, generator=seeded(6))
    A = A / torch.linalg.matrix_norm(A, 2) * 0.95

    def batch(g: torch.Generator) -> Batch:
        x = torch.randn(max(2, size // 4), 4, generator=g)
        values = [x]
        for _ in range(24):
            x = torch.tanh(1.5 * x @ A.T) + 0.3 * torch.randn(x.shape, generator=g)
            values.append(x)
        whole = torch.stack(values, 1)
        return whole[:, :-1], whole[:, 1:]

    return drawn(2000, batch)


def ratings(size: int) -> tuple[Draw, Draw]:
    g = seeded(8)
    U, V = torch.randn(64, 6, generator=g), torch.randn(48, 6, generator=g)

    def batch(g: torch.Generator) -> Batch:
        u = torch.randint(64, (8 * size,), generator=g)
        v = torch.randint(48, (8 * size,), generator=g)
        noise = 0.3 * torch.randn(len(u), generator=g)
        return torch.stack([u, v], 1), ((U[u] * V[v]).sum(1) / 2.4 + noise)[:, None]

    return drawn(3000, batch)


# Models.


def chain(sizes: tuple[int, ...], activation: type[nn.Module]) -> nn.Sequential:
    layers = [m for i, o in itertools.pairwise(sizes) for m in (nn.Linear(i, o), activation())]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    layers = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 24, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(48, 48, 3, padding=1, groups=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(768, 10))


def group_normed_cnn() -> nn.Module:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for i, o, stride in ((1, 24, 1), (24, 32, 2), (32, 32, 1)):
        layers += [nn.Conv2d(i, o, 3, stride=stride, padding=1), nn.GroupNorm(4, o), nn.Tanh()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))


def batch_normed() -> nn.Module:
    sizes = (32, 64, 64, 64)
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.BatchNorm1d(64), nn.Linear(64, 10))


class Residual(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Gated(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.norm = nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.embedding = nn.Embedding(256, 48)
        self.recurrent = kind(48, 48, batch_first=True)
        self.head = nn.Linear(48, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embedding(tokens))[0])


class Forecast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(4, 24)
        self.core = nn.RNN(24, 32, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(self.inp(x))[0])


class Ratings(nn.Module):
    """Users and items as vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(64, 16), nn.Embedding(48, 16)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.users(x[:, 0]) * self.items(x[:, 1])).sum(-1, keepdim=True)


class ViT(nn.Module):
    """4 patches a side of 2 x 2 pixels, two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 48, 2, stride=2)
        self.position = nn.Parameter(torch.randn(16, 48) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(48, 4, 96, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images.view(-1, 1, 8, 8)).flatten(2).mT + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Mixer(nn.Module):
    """As ViT, with MLPs over positions in place of attention."""

    def __init__(self) -> None:
        super().__init__()

        def mlp(width: int, inner: int) -> nn.Module:
            return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

        self.patches = nn.Conv2d(1, 48, 2, stride=2)
        self.tokens = nn.ModuleList(mlp(16, 32) for _ in range(2))
        self.channels = nn.ModuleList(mlp(48, 96) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(48) for _ in range(4))
        self.head = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images.view(-1, 1, 8, 8)).flatten(2).mT
        for i in range(2):
            x = x + self.tokens[i](self.norms[2 * i](x).mT).mT
            x = x + self.channels[i](self.norms[2 * i + 1](x))
        return self.head(x.mean(1))


class ConvNeXt(nn.Module):
    """Depthwise convolutions, and MLPs over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 2, stride=2)
        self.depthwise = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1, groups=32) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 32)) for _ in range(2)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images.view(-1, 1, 8, 8))
        for depthwise, norm, mlp in zip(self.depthwise, self.norms, self.mlps, strict=True):
            x = x + mlp(norm(depthwise(x).movedim(1, -1))).movedim(-1, 1)
        return self.head(x.mean((-2, -1)))


def hugging_face(name: str, inner: int, **more: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=256,
        hidden_size=48,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
        **more,
    )
    return getattr(transformers, f"{name}ForCausalLM")(config)


def tiny_gpt2() -> nn.Module:
    """Hugging Face's GPT-2, with a fused query, key and value; no dropout."""
    import transformers

    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=256, n_positions=32, n_embd=48, n_layer=2, n_head=4,
            bos_token_id=0, eos_token_id=0, **drop,
        )
    )  # fmt: skip


def tiny_neox() -> nn.Module:
    """Hugging Face's GPT-NeoX: attention and MLP side by side, query, key and value by heads."""
    import transformers

    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=256, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=192, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


class TinyViT(nn.Module):
    """Hugging Face's ViT on digits."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        config = transformers.ViTConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            image_size=8, patch_size=2, num_channels=1, num_labels=10,
        )  # fmt: skip
        self.vit = transformers.ViTForImageClassification(config)

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(images.view(-1, 1, 8, 8)).logits


KINDS = {
    "mlp": Kind(lambda: chain((64, 96, 96, 96, 10), nn.ReLU), digits, cross_entropy),
    "cnn": Kind(cnn, digits, cross_entropy),
    "vit": Kind(ViT, digits, cross_entropy),
    "autoencoder": Kind(lambda: chain((64, 96, 12, 96, 64), nn.Tanh), digits, reconstruction),
    "whitened": Kind(lambda: chain((32, 64, 64, 64, 1), nn.Tanh), white_values, squares),
    "residual": Kind(
        lambda: nn.Sequential(
            nn.Linear(32, 64), *(Residual(64, 64) for _ in range(3)), nn.Linear(64, 1)
        ),
        white_values,
        squares,
    ),
    "batch norm": Kind(batch_normed, white_digits, cross_entropy),
    "group norm": Kind(group_normed_cnn, value_and_parity, squares),
    "softmax regression": Kind(
        lambda: nn.Sequential(nn.Linear(32, 10)), white_digits, cross_entropy
    ),
    "table": Kind(lambda: chain((30, 48, 48, 2), nn.ReLU), patients, cross_entropy),
    "single index": Kind(
        lambda: chain((32, 64, 64, 64, 1), nn.Tanh),
        white_noise(4000, 32, 4, lambda x: torch.sin(2 * x @ ONE)),
        squares,
    ),
    "least squares": Kind(
        lambda: nn.Sequential(nn.Linear(32, 12)),
        white_noise(4000, 32, 4, lambda x: x @ MANY + 0.5 * torch.sin(3 * x[:, :12])),
        squares,
    ),
    "deep linear": Kind(
        lambda: nn.Sequential(
            *(nn.Linear(i, o, bias=False) for i, o in ((32, 32), (32, 32), (32, 12)))
        ),
        white_noise(4000, 32, 4, lambda x: x @ MANY),
        squares,
    ),
    "gated": Kind(
        lambda: nn.Sequential(nn.Linear(48, 64), Gated(64, 128), Gated(64, 128), nn.Linear(64, 1)),
        white_noise(1000, 48, 1, products),
        squares,
    ),
    "forecast": Kind(Forecast, series, squares),
    "ratings": Kind(Ratings, ratings, squares),
    "gpt": Kind(
        lambda: GPT(GPTConfig(width=48, depth=2, heads=4, context=32), 256), text, cross_entropy
    ),
    "llama": Kind(lambda: hugging_face("Llama", 96), text, of_logits),
    "lstm": Kind(lambda: Recurrent(nn.LSTM), text, cross_entropy),
    "gru": Kind(lambda: Recurrent(nn.GRU), text, cross_entropy),
    "convnext": Kind(ConvNeXt, digits, cross_entropy),
    "mixer": Kind(Mixer, digits, cross_entropy),
    "mixtral": Kind(
        lambda: hugging_face("Mixtral", 64, num_local_experts=4, num_experts_per_tok=2),
        text,
        of_logits,
    ),
}
HUGGING_FACE = {
    "hf gpt2": Kind(tiny_gpt2, text, of_logits),
    "hf vit": Kind(TinyViT, digits, cross_entropy),
    "hf neox": Kind(tiny_neox, text, of_logits),
}
"""From scratch, for plans against Muon alone; the benchmark of verdicts was made without them."""
