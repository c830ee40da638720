"""Stable ranks of what the matrices of a transformer multiply, before any training.

Section 2.4 bounds them for one decoder block with Gaussian weights (Proposition 2.14): tokens by
the frequency 1 / p_max of the commonest one, states by a constant times that, and what enters the
second matrix of the MLP by 2 π.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.papers.spectral_condition.least_squares import DTYPE
from steepest.linalg import stable_rank

_ZIPF = 0.86
"""The exponent of the frequencies of tokens that the paper names for V = 50,257."""


def zipf_tokens(vocabulary: int, length: int) -> Tensor:
    """Return tokens (length,) whose frequencies fall as a power of their rank."""
    frequencies = torch.arange(1, vocabulary + 1, dtype=DTYPE) ** -_ZIPF
    return torch.multinomial(frequencies, length, replacement=True)


def token_ranks(seed: int, vocabulary: int, length: int, width: int) -> Numbers:
    """The stable rank of the token indicator, and of Gaussian embeddings of the tokens."""
    tokens = zipf_tokens(vocabulary, length)
    counts = torch.bincount(tokens, minlength=vocabulary)
    inverse_frequency = length / int(counts.max())
    indicator = torch.zeros(vocabulary, length, dtype=DTYPE)
    indicator[tokens, torch.arange(length)] = 1.0
    embedded = torch.randn(width, vocabulary, dtype=DTYPE)[:, tokens]
    return {
        "inverse_frequency": inverse_frequency,
        "indicator": float(stable_rank(indicator)),
        "embedded": float(stable_rank(embedded)),
    }


def _normalized(X: Tensor) -> Tensor:
    """RMSNorm without a gain, of columns."""
    return X / X.square().mean(0).sqrt()


def _decoder_block(X: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of the matrices of one block, by name, and its output; X is (width, tokens)."""
    d, n = X.shape
    query, key, value, out, first = (
        torch.randn(rows, d, dtype=X.dtype) / math.sqrt(d) for rows in (d, d, d, d, 4 * d)
    )
    second = torch.randn(d, 4 * d, dtype=X.dtype) / math.sqrt(4 * d)
    A = _normalized(X)
    scores = (query @ A).T @ (key @ A) / math.sqrt(d)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    weights = scores.masked_fill(~causal, -math.inf).softmax(1)
    X = X + out @ (value @ A) @ weights.T
    inner = F.relu(first @ _normalized(X))
    inputs = {"into attention": A, "into the MLP": _normalized(X), "behind ReLU": inner}
    return inputs, X + second @ inner


def block_ranks(seed: int, width: int, depth: int, length: int, vocabulary: int) -> Numbers:
    """Stable ranks of the inputs of every block of a decoder with Gaussian weights."""
    tokens = zipf_tokens(vocabulary, length)
    X = torch.randn(width, vocabulary, dtype=DTYPE)[:, tokens]
    ranks: dict[str, list[float]] = {}
    for _ in range(depth):
        inputs, X = _decoder_block(X)
        for name, A in inputs.items():
            ranks.setdefault(name, []).append(float(stable_rank(A)))
    figure = curve(
        "Stable rank by block, before training", list(range(1, depth + 1)), ranks,
        across="block", up="stable rank of the input",
    )  # fmt: skip
    inverse_frequency = length / int(torch.bincount(tokens).max())
    return {"ranks": ranks, "inverse_frequency": inverse_frequency, "curves": [figure]}


def _layers(activation: str, X: Tensor, width: int, layers: int) -> list[float]:
    """Stable ranks behind each layer, with PyTorch's own initialization of linear layers."""
    ranks, H = [], X
    for _ in range(layers):
        first, gate = (torch.nn.Linear(len(H), width, bias=False, dtype=H.dtype) for _ in range(2))
        with torch.no_grad():
            Z = first(H.T).T
            H = F.relu(Z).square() if activation == "relu-squared" else F.silu(Z) * gate(H.T).T
        ranks.append(float(stable_rank(H)))
    return ranks


def batch_ranks(seed: int, inputs: int, width: int, batches: tuple[int, ...]) -> Numbers:
    """Stable ranks behind three layers by the number of examples (Fig. 17)."""
    state = torch.get_rng_state()
    ranks: dict[str, list[list[float]]] = {"relu-squared": [], "swiglu": []}
    for activation, rows in ranks.items():
        for batch in batches:
            torch.set_rng_state(state)  # the same layers for every batch
            rows.append(_layers(activation, torch.randn(inputs, batch, dtype=DTYPE), width, 3))
    lines = {
        f"{activation}, layer {i + 1}": [row[i] for row in rows]
        for activation, rows in ranks.items()
        for i in range(3)
    }
    figure = curve(
        "Stable rank by the number of examples", list(batches), lines,
        across="examples", up="stable rank", log=True, log_across=True,
    )  # fmt: skip
    return {"ranks": ranks, "curves": [figure]}


TOKENS = Experiment(
    name="token-ranks",
    title="Tokens with Zipf's frequencies, and their embeddings",
    kind="theory",
    measure=token_ranks,
    scales={
        "quick": Setting(
            sizes={"vocabulary": 300, "length": 2000, "width": 256}, seeds=3, minutes=0.1
        ),
        "cpu": Setting(
            sizes={"vocabulary": 1000, "length": 8000, "width": 512}, seeds=5, minutes=1
        ),
        "paper": Setting(
            sizes={"vocabulary": 50257, "length": 8192, "width": 768},
            seeds=3,
            minutes=10,
            gigabytes=8,
        ),
    },
)
DECODER_BLOCKS = Experiment(
    name="decoder-blocks",
    title="Inputs of decoder blocks with Gaussian weights",
    kind="theory",
    measure=block_ranks,
    scales={
        "quick": Setting(
            sizes={"width": 128, "depth": 4, "length": 256, "vocabulary": 500},
            seeds=3,
            minutes=0.1,
        ),
        "cpu": Setting(
            sizes={"width": 256, "depth": 6, "length": 1024, "vocabulary": 5000},
            seeds=5,
            minutes=1,
        ),
        "paper": Setting(
            sizes={"width": 768, "depth": 12, "length": 8192, "vocabulary": 50257},
            seeds=3,
            minutes=20,
            gigabytes=8,
        ),
    },
)
BATCHES = Experiment(
    name="batch-ranks",
    title="ReLU² and SwiGLU by the number of examples (Fig. 17)",
    kind="theory",
    measure=batch_ranks,
    scales={
        "quick": Setting(
            sizes={"inputs": 64, "width": 256, "batches": (64, 256, 2048)}, seeds=6, minutes=0.2
        ),
        "cpu": Setting(
            sizes={"inputs": 128, "width": 512, "batches": (128, 512, 1024, 4096)},
            seeds=5,
            minutes=2,
        ),
        "paper": Setting(
            sizes={"inputs": 128, "width": 512, "batches": (128, 512, 1024, 4096, 16384, 65536)},
            seeds=1,
            minutes=10,
            gigabytes=4,
        ),
    },
)

CLAIMS = (
    Claim(
        name="token-indicator",
        sentence="The token indicator has exactly the stable rank 1 / p_max.",
        place="Section 2.3, p. 27",
        source="first-hand",
        experiment=TOKENS,
        quantity="relative difference from the inverse frequency of the commonest token",
        value=lambda numbers: abs(numbers["indicator"] / numbers["inverse_frequency"] - 1),
        high=1e-9,
        judged="every seed",
        paper="0",
        checks=("A7",),
    ),
    Claim(
        name="embedded-tokens",
        sentence="Gaussian embeddings of tokens have a stable rank of at most about 1 / p_max.",
        place="Lemma 2.9",
        source="first-hand",
        experiment=TOKENS,
        quantity="stable rank of the embeddings over the inverse frequency",
        value=lambda numbers: numbers["embedded"] / numbers["inverse_frequency"],
        high=1.2,
        paper="at most (1 + ε) / (1 - ε)",
        checks=("A7",),
    ),
    Claim(
        name="behind-relu-in-a-block",
        sentence="Before training, inputs of the second MLP matrix stay below 2 π in each block.",
        place="Proposition 2.14, Corollary 2.15",
        source="first-hand",
        experiment=DECODER_BLOCKS,
        quantity="largest stable rank behind ReLU over all blocks",
        value=lambda numbers: max(numbers["ranks"]["behind ReLU"]),
        high=2 * math.pi,
        judged="every seed",
        paper="at most 6.28",
        checks=("A8",),
    ),
    Claim(
        name="states-in-a-block",
        sentence="Before training, the inputs of attention stay below the tokens' 1 / p_max.",
        place="Proposition 2.14",
        source="first-hand",
        experiment=DECODER_BLOCKS,
        quantity="largest stable rank into attention over 1 / p_max",
        value=lambda numbers: (
            max(numbers["ranks"]["into attention"]) / numbers["inverse_frequency"]
        ),
        high=1.2,
        paper="at most a constant",
        checks=("A8",),
    ),
    Claim(
        name="squared-relu-by-batch",
        sentence="Behind ReLU² the stable rank does not depend on the number of examples.",
        place="Fig. 17",
        source="first-hand",
        experiment=BATCHES,
        quantity="largest over smallest stable rank behind the first layer",
        value=lambda numbers: _spread([row[0] for row in numbers["ranks"]["relu-squared"]]),
        high=1.15,
        paper="about 1",
        checks=("A9",),
    ),
    Claim(
        name="gated-by-batch",
        sentence="Behind SwiGLU the stable rank grows with the number of examples.",
        place="Fig. 17",
        source="first-hand",
        experiment=BATCHES,
        quantity="largest over smallest stable rank behind the second layer",
        value=lambda numbers: _spread([row[1] for row in numbers["ranks"]["swiglu"]]),
        low=5.0,
        paper="about 11 from 128 to 4096",
        checks=("A9",),
    ),
)


def _spread(ranks: list[float]) -> float:
    return max(ranks) / min(ranks)
