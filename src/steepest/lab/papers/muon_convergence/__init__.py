"""On the convergence analysis of Muon (arXiv 2505.23737)"""

from steepest.lab.papers.claim import Paper
from steepest.lab.papers.muon_convergence import (
    ill_conditioned,
    nonconvex_rates,
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
    ),
)
