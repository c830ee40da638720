"""When do spectral gradient updates help in deep learning? (arXiv 2512.04299)"""

from steepest.lab.papers.claim import Paper
from steepest.lab.papers.spectral_condition import feature_ranks

PAPER = Paper(
    name="spectral-condition",
    title="When do spectral gradient updates help in deep learning?",
    authors="Davis, Drusvyatskiy",
    arxiv="2512.04299",
    claims=(*feature_ranks.CLAIMS,),
    checks={
        "A1": "The stable rank of random features is bounded, except behind gates and tanh.",
        "A12": "With exact line search, GD's direction can beat the spectral one.",
    },
    left_out={
        "A12": "exact line search has no criterion in the paper",
    },
)
