"""Clarifying Shampoo: adapting spectral descent to noise and trajectory (arXiv 2602.09314)"""

from steepest.lab.papers.claim import Paper
from steepest.lab.papers.clarifying_shampoo import (
    along_a_run,
    bag_averages,
    batch_size,
    epsilon_and_grafting,
    instantaneous_kl,
    localization,
    noisy_least_squares,
    readings,
    single_updates,
    token_efficiency,
)

PAPER = Paper(
    name="clarifying-shampoo",
    title="Clarifying Shampoo: Adapting Spectral Descent to Stochasticity and the Parameter "
    "Trajectory",
    authors="Eschenhagen, Cai, Lee, Shi",
    arxiv="2602.09314",
    claims=(
        *single_updates.CLAIMS,
        *bag_averages.CLAIMS,
        *instantaneous_kl.CLAIMS,
        *readings.CLAIMS,
        *noisy_least_squares.CLAIMS,
        *along_a_run.CLAIMS,
        *token_efficiency.CLAIMS,
        *batch_size.CLAIMS,
        *localization.CLAIMS,
        *epsilon_and_grafting.CLAIMS,
    ),
    checks={
        "D1.1": "Without memory, Shampoo is spectral descent or inverts the spectrum.",
        "D1.2": "Shampoo's update is an adapted Muon, and Adam's an adapted Signum.",
        "D1.3": "A large ε turns Shampoo into momentum.",
        "D1.4": "Adam's squares are 1 on average over time, and one-sided Shampoo's products too.",
        "D1.5": "Of the optimizers KL-Shampoo alone is semi-orthogonal on average, on both sides.",
        "D1.6": "Instantaneous KL-Shampoo: its rate, its oscillation, one sweep, another exponent.",
        "D1.7": "KL-Shampoo's divergence falls, and singular values survive invertible maps.",
        "D1.8": "Muon, Shampoo and KL-Shampoo turn with the gradient; Adam and Signum do not.",
        "D1.9": "Shampoo is a Kronecker product, and on a vector full-matrix Adam.",
        "D1.10": "Grafting sets the length and keeps the direction.",
        "D1.15": "Gram Newton-Schulz equals Newton-Schulz.",
        "D1.16": "Muon and SOAP agree with optimizers of PyTorch.",
        "D1.17": "PolarGrad's scale is the nuclear norm.",
        "D2.a": "Adaptation gains by noise and trajectory on noisy least squares.",
        "D2.b": "ε turns the order of Shampoo and Muon.",
        "D2.c": "The gain comes from matrices alone.",
        "D2.d": "How semi-orthogonal updates are on average in training.",
        "D2.g": "Three optimizers without memory are one; with momentum Muon is ahead.",
        "D3.a": "The order of all optimizers on text.",
        "D3.b": "The gains by batch size.",
        "D3.e": "What roots cost by method and interval.",
    },
    left_out={
        "D1.15": "it is about products in bfloat16, where the tests of the library hold it",
        "D3.e": "the paper counts tokens, and time is measured in the folder of benchmarks",
    },
)
