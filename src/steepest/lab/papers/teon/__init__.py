"""TEON: tensorized orthonormalization beyond layer-wise Muon (arXiv 2601.23261)."""

from steepest.lab.papers.claim import Paper
from steepest.lab.papers.teon import identities

PAPER = Paper(
    name="teon",
    title="TEON: Tensorized Orthonormalization Beyond Layer-Wise Muon for LLM Pre-Training",
    authors="Zhang et al.",
    arxiv="2601.23261",
    claims=(*identities.CLAIMS,),
    checks={
        "D1.11": "TEON's step for one layer, equal layers, shared left and aligned right vectors.",
        "D1.12": "TEON's norm and dual norm lie between multiples of Muon's.",
        "D1.13": "Mode 2 is mode 1 of transposed layers.",
        "D1.14": "Errors of the polynomials, and their steps beside the exact ones.",
    },
)
