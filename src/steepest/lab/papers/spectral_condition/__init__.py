"""When do spectral gradient updates help in deep learning? (arXiv 2512.04299)"""

from steepest.lab.papers.claim import Paper
from steepest.lab.papers.spectral_condition import (
    block_condition,
    block_inputs,
    feature_ranks,
    random_features,
    sparse_regression,
    spiked_models,
    transformer_on_text,
)

PAPER = Paper(
    name="spectral-condition",
    title="When do spectral gradient updates help in deep learning?",
    authors="Davis, Drusvyatskiy",
    arxiv="2512.04299",
    claims=(
        *feature_ranks.CLAIMS,
        *random_features.CLAIMS,
        *spiked_models.CLAIMS,
        *block_inputs.CLAIMS,
        *block_condition.CLAIMS,
        *sparse_regression.CLAIMS,
        *transformer_on_text.CLAIMS,
    ),
    checks={
        "A1": "The stable rank of random features is bounded, except behind gates and tanh.",
        "A2": "One step of GD and one of SpecGD decrease the loss by their guarantees.",
        "A3": "On ReLU features SpecGD wins, as in Fig. 3.",
        "A4": "On SwiGLU features GD wins, as in Fig. 11.",
        "A5": "In both spiked models the nuclear rank is linear in the width after the first step.",
        "A6": "Features with a growing spike turn the order of GD and SpecGD.",
        "A7": "Tokens have the stable rank 1 / p_max, and their embeddings no more.",
        "A8": "The inputs of a decoder's blocks have small stable ranks before training.",
        "A9": "SwiGLU's stable rank grows with the batch, that of ReLU² does not.",
        "A10": "SpecGD on the two inner matrices wins on sparse regression.",
        "A11": "The exact condition of a block compares the two guarantees.",
        "A12": "With exact line search, the gradient can beat the polar factor.",
        "G1": "In a GPT in training the condition holds for all inner matrices.",
        "G2": "Gated MLPs gain less from Muon on the second matrix alone.",
        "G3": "Spectral steps only where the condition holds are as good as everywhere.",
        "G4": "The figures in full size.",
        "G7": "The ratio nr(G) / st(A) predicts the gain of one real step.",
    },
    left_out={
        "G2": "the cited ablation is another paper's, and needs 160M parameters and 10,000 steps",
        "G3": "`steepest diagnose` and its benchmarks measure plans by layer already",
        "G4": "these are the experiments above at the scales gpu and paper",
    },
)
