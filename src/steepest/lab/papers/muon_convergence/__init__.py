"""On the convergence analysis of Muon (arXiv 2505.23737)"""

from steepest.lab.papers.claim import Paper
from steepest.lab.papers.muon_convergence import (
    along_training,
    block_structure,
    full_batch,
    ill_conditioned,
    minibatches,
    nonconvex_rates,
    on_text,
    smoothness,
    star_convex,
)

PAPER = Paper(
    name="muon-convergence",
    title="On the Convergence Analysis of Muon",
    authors="Shen, Huang, Huang, Shen, Zhang",
    arxiv="2505.23737",
    claims=(
        *smoothness.CLAIMS,
        *nonconvex_rates.CLAIMS,
        *star_convex.CLAIMS,
        *ill_conditioned.CLAIMS,
        *along_training.CLAIMS,
        *block_structure.CLAIMS,
        *full_batch.CLAIMS,
        *minibatches.CLAIMS,
        *on_text.CLAIMS,
    ),
    checks={
        "B1": "The constants L and L_* of a quadratic are bounds, and are reached.",
        "B2": "Without noise the average gradient stays below its bounds.",
        "B3": "With noise, at several momenta, the average gradient stays below its bounds.",
        "B4": "The loss of star-convex problems stays below its bounds, at both kinds of rates.",
        "B5": "Muon beats GD on an ill-conditioned quadratic, and loses on a counter-case.",
        "B6": "The ratio of the bounds of GD and Muon is about 4 over random optima.",
        "B7": "Condition (4) holds along training on a few images.",
        "B8": "Five Newton-Schulz steps take singular values close to 1.",
        "B9": "For least squares J / L is a stable rank, and (4) the spectral condition.",
        "G5": "Muon beats Adam and GD on CIFAR-10, full batch and in batches.",
        "G6": "J / L, the nuclear rank and the stable rank of each layer of a transformer.",
    },
)
