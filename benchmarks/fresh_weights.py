"""Do weights look fresh where they are, and only there?

The first rule, written before any run: a hidden matrix looks fresh if the nuclear rank of its
gradient across batches is below 2, and weights do if more than half of their hidden matrices do.
It failed. It did not see an untrained GPT, LLaMA and LSTM, and took an MLP for fresh after 300
steps. The mean cosine between gradients of two batches failed as well: 0.45 for an MLP before and
after, 0.61 and 0.90 for a network with group norm.

The second rule, written before its run, looks at the weights alone. A matrix looks fresh if its
largest singular value is at most 1.2 times where that of independent entries ends (Marchenko and
Pastur, 1967): ||W||_op <= 1.2 (sqrt(m) + sqrt(n)) ||W||_F / sqrt(m n). Every optimizer adds
directions that stand out. Weights look fresh if more than half of their hidden matrices do. The
rule should say yes for networks that are untrained, and no after 300 steps of AdamW; after 30
steps either is right.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from networks import KINDS, problem
from steepest.diagnosis.evidence import Evidence, gather, matrices_of
from steepest.diagnosis.verdicts import _across

STAGES = (0, 30, 300)


def edge(place: Evidence) -> float:
    """The largest singular value of a weight over where that of independent entries ends."""
    W = matrices_of(place.row, place.row.parameter.detach())[place.index].double()
    m, n = W.shape
    bulk = (m**0.5 + n**0.5) * float(W.norm()) / (m * n) ** 0.5
    return float(torch.linalg.matrix_norm(W, 2)) / bulk if bulk else 0.0


def measured(name: str, size: int) -> list[dict[str, Any]]:
    """For each stage: nuclear rank across batches, sides and mean cosine of every matrix."""
    task = problem(name, size)
    optimizer = torch.optim.AdamW(task.model.parameters(), 3e-3, weight_decay=0.0)
    batches = [task.train(10**5 + i) for i in range(8)]
    stages = []
    for step in range(max(STAGES) + 1):
        if step in STAGES:
            task.model.eval()
            evidence = gather(task.model, task.loss, batches, None, curvature=False)
            task.model.train()
            rows = []
            for place in evidence:
                flat = torch.nn.functional.normalize(place.gradients.double().flatten(1), dim=1)
                cosines = flat @ flat.mT
                count = len(flat)
                mean = float((cosines.sum() - cosines.trace()) / (count * (count - 1)))
                rows.append(
                    [place.label, place.row.is_matrix, *place.shape,
                     _across(place, range(count)), mean, edge(place)]
                )  # fmt: skip
            stages.append({"network": name, "size": size, "step": step, "rows": rows})
        optimizer.zero_grad()
        task.loss(task.model, task.train(step)).backward()
        optimizer.step()
    return stages


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with out.open("w") as file:
        for size in (48, 8):
            for name in KINDS:
                for stage in measured(name, size):
                    file.write(json.dumps(stage) + "\n")
                    hidden = [row for row in stage["rows"] if row[1]] or stage["rows"]
                    low = fmean(not row[4] >= 2 for row in hidden)
                    ranks = median(row[4] for row in hidden)
                    cosine = median(row[5] for row in hidden)
                    random = fmean(row[6] <= 1.2 for row in hidden)
                    print(f"{name:20} {size:3} {stage['step']:4}  share below 2: {low:.2f}  "
                          f"median rank {ranks:6.2f}  median cosine {cosine:.2f}  share below the edge: "
                          f"{random:.2f}  {' '.join(f'{row[6]:.2f}' for row in hidden)[:60]}",
                          flush=True)  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
