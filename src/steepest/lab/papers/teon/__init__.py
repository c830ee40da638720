"""TEON: tensorized orthonormalization beyond layer-wise Muon (arXiv 2601.23261)."""

from steepest.lab.papers.claim import Paper
from steepest.lab.papers.teon import (
    against_muon,
    alignment,
    guarantee,
    identities,
    polar_methods,
)

PAPER = Paper(
    name="teon",
    title="TEON: Tensorized Orthonormalization Beyond Layer-Wise Muon for LLM Pre-Training",
    authors="Zhang et al.",
    arxiv="2601.23261",
    claims=(
        *identities.CLAIMS,
        *guarantee.CLAIMS,
        *alignment.CLAIMS,
        *against_muon.CLAIMS,
        *polar_methods.CLAIMS,
    ),
    checks={
        "D1.11": "TEON's step for one layer, equal layers, shared left and aligned right vectors.",
        "D1.12": "TEON's norm and dual norm lie between multiples of Muon's.",
        "D1.13": "Mode 2 is mode 1 of transposed layers.",
        "D1.14": "Errors of the polynomials, and their steps beside the exact ones.",
        "theorem-4.5": "TEON's rate and smoothness, and those of Muon.",
        "D2.e": "TEON and Muon with steps of equal length, modes, K, matrices, and alignments.",
        "D2.f": "The polar methods against each other.",
        "D3.c": "TEON against Muon with steps of equal length at 30 to 60 million parameters.",
        "D3.d": "Times of Newton-Schulz and of its Gram form by shape on one GPU.",
    },
    left_out={
        "D3.d": "a question of kernels and of a machine, with no claim of the paper behind it",
    },
)
