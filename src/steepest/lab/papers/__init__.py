"""The papers as claims with verdicts: what each says, what is measured for it, what is found.

A paper has a package of its own. Its claims stand in the file of the experiment that decides
them, with the criterion, which is fixed before anything is measured.
"""

from __future__ import annotations

from steepest.lab.arguments import did_you_mean
from steepest.lab.errors import InputError
from steepest.lab.papers.claim import Claim, Paper
from steepest.lab.papers.clarifying_shampoo import PAPER as CLARIFYING_SHAMPOO
from steepest.lab.papers.muon_convergence import PAPER as MUON_CONVERGENCE
from steepest.lab.papers.spectral_condition import PAPER as SPECTRAL_CONDITION
from steepest.lab.papers.super_consistency import PAPER as SUPER_CONSISTENCY
from steepest.lab.papers.teon import PAPER as TEON_PAPER

PAPERS: dict[str, Paper] = {
    paper.name: paper
    for paper in (
        SPECTRAL_CONDITION,
        CLARIFYING_SHAMPOO,
        TEON_PAPER,
        MUON_CONVERGENCE,
        SUPER_CONSISTENCY,
    )
}
"""Every paper by the name that it has on the command line."""


def paper_of(name: str) -> Paper:
    """Return a paper.

    Raises:
        InputError: for an unknown name.
    """
    if name not in PAPERS:
        raise InputError(
            f"got the paper {name!r}{did_you_mean(name, PAPERS)}, expected one of "
            f"{', '.join(PAPERS)}"
        )
    return PAPERS[name]


def claim_of(name: str) -> Claim:
    """Return a claim.

    Raises:
        InputError: for an unknown name.

    >>> claim_of("relu-features").quantity
    'stable rank of the features at the largest width'
    """
    claims = {claim.name: claim for paper in PAPERS.values() for claim in paper.claims}
    if name not in claims:
        raise InputError(
            f"got the claim {name!r}{did_you_mean(name, claims)}, expected one that `steepest "
            "reproduce --list` prints"
        )
    return claims[name]
