"""Take steps when told to by a line of input, and answer with their seconds.

`against.py` starts this file twice, once with each version of the package on PYTHONPATH. So it uses
nothing but what every version has: the names of the optimizers and their learning rate.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from torch import nn

import steepest


def main() -> None:
    setting = json.loads(sys.stdin.readline())
    torch.set_num_threads(setting["threads"])
    torch.zeros(2**23 - 2**12)  # from here on the C library keeps freed blocks, as in training
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, setting["dtype"])
    weights, gradients = [], []
    for shape in setting["shapes"]:
        weights.append(nn.Parameter(torch.randn(shape, generator=generator).mul(0.02).to(dtype)))
        gradients.append(torch.randn(shape, generator=generator).mul(1e-3).to(dtype))
    groups = [{"params": weights}]
    if setting["optimizer"] == "AdamW group":
        groups[0]["geometry"] = "adamw"
        optimizer = steepest.Muon(groups, lr=1e-4)
    else:
        optimizer = getattr(steepest, setting["optimizer"])(groups, lr=1e-4)
    print(json.dumps({"package": steepest.__file__}), flush=True)
    for line in sys.stdin:
        seconds = 0.0
        for _ in range(int(line)):
            for W, G in zip(weights, gradients, strict=True):
                W.grad = G.clone()
            began = time.perf_counter()
            optimizer.step()
            seconds += time.perf_counter() - began
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
