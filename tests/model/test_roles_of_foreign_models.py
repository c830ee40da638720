"""The right role of every matrix of foreign models, written by hand from their forward passes.

Each model stands with its table: a name pattern, a role, and for matrices how they are seen. What
is not in the table has fewer than two axes, or is a gain of normalization. `roles` must find all of
it with an example, and nine tenths without one, where each wrong row says that it is a guess.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steepest.model.parameter_roles import RoleTable, all_roles

transformers = pytest.importorskip("transformers")


@dataclass
class Foreign:
    """A model, what it is called with, and the right role of each of its matrices."""

    build: Callable[[], nn.Module]
    example: Callable[[], Any]
    right: str


FOREIGN: dict[str, Foreign] = {}


def foreign(example: Callable[[], Any], right: str) -> Callable[[Any], Any]:
    """Put a model into the list, under the first line of its docstring."""

    def add(build: Any) -> Any:
        FOREIGN[build.__doc__.splitlines()[0].rstrip(".")] = Foreign(build, example, right)
        return build

    return add


def images(size: int = 16, channels: int = 3) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, channels, size, size)


def tokens(length: int = 6, count: int = 20) -> Tensor:
    return torch.randint(1, count, (2, length))


# ----------------------------------------------------------------------------- networks of images


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.downsample = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        short = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + short)


@foreign(
    images(),
    """
    conv1.weight               conv  (8, 147)
    layer1.0.conv?.weight      conv  (8, 72)
    layer2.0.conv1.weight      conv  (12, 72)
    layer2.0.conv2.weight      conv  (12, 108)
    layer2.0.downsample.weight conv  (12, 8)
    fc.weight                  head
    """,
)
class ResNet(nn.Module):
    """ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Residual(8, 8))
        self.layer2 = nn.Sequential(Residual(8, 12))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


def two_convolutions(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
    )  # fmt: skip


@foreign(
    images(),
    """
    inc.0.weight   conv  (4, 27)
    inc.3.weight   conv  (4, 36)
    down.0.weight  conv  (8, 36)
    down.3.weight  conv  (8, 72)
    up.weight      conv  (16, 8)
    merge.0.weight conv  (4, 72)
    merge.3.weight conv  (4, 36)
    outc.weight    head
    """,
)
class UNet(nn.Module):
    """U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.outc = nn.Conv2d(4, 2, 1)
        self.inc, self.down = two_convolutions(3, 4), two_convolutions(4, 8)
        self.up, self.merge = nn.ConvTranspose2d(8, 4, 2, 2), two_convolutions(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        high = self.inc(x)
        low = self.down(F.max_pool2d(high, 2))
        return self.outc(self.merge(torch.cat([high, self.up(low)], 1)))


@foreign(
    images(8, 1),
    """
    encoder.0.weight  conv   (4, 16)
    encoder.2.weight  conv   (8, 64)
    to_latent.weight  hidden (2 x 6, 32)
    expand.weight     hidden (32, 6)
    decoder.0.weight  conv   (64, 8)
    decoder.2.weight  head
    """,
)
class VAE(nn.Module):
    """Variational autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        conv, back = nn.Conv2d, nn.ConvTranspose2d
        self.encoder = nn.Sequential(conv(1, 4, 4, 2, 1), nn.ReLU(), conv(4, 8, 4, 2, 1), nn.ReLU())
        self.decoder = nn.Sequential(back(8, 4, 4, 2, 1), nn.ReLU(), back(4, 1, 4, 2, 1))
        self.to_latent, self.expand = nn.Linear(32, 12), nn.Linear(6, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.to_latent(self.encoder(x).flatten(1)).chunk(2, 1)
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
        return self.decoder(self.expand(z).view(-1, 8, 2, 2)).sigmoid(), mu, logvar


@foreign(
    lambda: torch.randn(2, 8, 1, 1),
    """
    main.0.weight conv (128, 8)
    main.3.weight conv (64, 8)
    main.6.weight head
    """,
)
class DCGAN(nn.Module):
    """Generator of DCGAN."""

    def __init__(self) -> None:
        super().__init__()
        back = nn.ConvTranspose2d
        self.main = nn.Sequential(
            back(8, 8, 4, 1, 0, bias=False), nn.BatchNorm2d(8), nn.ReLU(True),
            back(8, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(True),
            back(4, 3, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z)


@foreign(
    images(),
    """
    main.0.parametrizations.weight.original conv   (4, 48)
    main.2.parametrizations.weight.original conv   (8, 64)
    classify.parametrizations.weight.original head
    """,
)
class Discriminator(nn.Module):
    """Discriminator with spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.classify = norm(nn.Linear(128, 1))
        first, second = norm(nn.Conv2d(3, 4, 4, 2, 1)), norm(nn.Conv2d(4, 8, 4, 2, 1))
        self.main = nn.Sequential(first, nn.LeakyReLU(), second, nn.LeakyReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.main(x).flatten(1))


class StyleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.in1 = nn.Conv2d(8, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True)
        self.conv2, self.in2 = nn.Conv2d(8, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.in2(self.conv2(F.relu(self.in1(self.conv1(x)))))


@foreign(
    images(),
    """
    conv1.weight      conv (8, 243)
    res?.conv?.weight conv (8, 72)
    deconv1.weight    conv (4, 72)
    deconv2.weight    head
    """,
)
class StyleNetwork(nn.Module):
    """Style transfer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 9, 2, 4)
        self.res1, self.res2 = StyleBlock(), StyleBlock()
        self.deconv1, self.deconv2 = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 3, 9, padding=4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.res2(self.res1(F.relu(self.conv1(x))))
        x = F.relu(self.deconv1(F.interpolate(x, scale_factor=2)))
        return self.deconv2(x)


@foreign(
    images(8, 1),
    """
    conv1.weight conv (8, 25)
    conv2.weight conv (8, 72)
    conv3.weight head
    """,
)
class ESPCN(nn.Module):
    """Super-resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 5, padding=2), nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv2(torch.tanh(self.conv1(x))))
        return F.pixel_shuffle(self.conv3(h), 2) + F.interpolate(x, scale_factor=2)


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(8, 4, 1), nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.adaptive_avg_pool2d(x, 2)).flatten(1)
        return self.fc2(F.dropout(F.relu(self.fc1(x)), 0.5, self.training))


@foreign(
    images(),
    """
    conv1.weight        conv   (8, 27)
    inception?.*.weight conv   *
    aux?.conv.weight    conv   (4, 8)
    aux?.fc1.weight     hidden (12, 16)
    aux?.fc2.weight     head
    fc.weight           head
    """,
)
class GoogLeNet(nn.Module):
    """Auxiliary classifiers, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        branches = {"one": nn.Conv2d(8, 4, 1), "three": nn.Conv2d(8, 4, 3, padding=1)}
        self.inception1, self.inception2 = (
            nn.ModuleDict(branches),
            nn.ModuleDict({"one": nn.Conv2d(8, 4, 1), "three": nn.Conv2d(8, 4, 3, padding=1)}),
        )
        self.aux1, self.aux2, self.fc = Auxiliary(), Auxiliary(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = F.relu(self.conv1(x))
        first = self.aux1(x)
        x = F.relu(torch.cat([branch(x) for branch in self.inception1.values()], 1))
        second = self.aux2(x)
        x = F.relu(torch.cat([branch(x) for branch in self.inception2.values()], 1))
        return self.fc(x.mean((2, 3))), second, first


@foreign(
    images(),
    """
    backbone.?.weight                conv *
    extra.weight                     conv (8, 72)
    classification_head.*.weight     head
    regression_head.*.weight         head
    """,
)
class SSD(nn.Module):
    """Box predictors at several scales, as in SSD."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        )
        self.classification_head = nn.ModuleList([nn.Conv2d(8, 6, 3, padding=1) for _ in "ab"])
        self.regression_head = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in "ab"])
        self.extra = nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        high = self.backbone(x)
        scales = [high, F.relu(self.extra(high))]
        parts: dict[str, list[Tensor]] = {"boxes": [], "classes": []}
        for features, boxes, classes in zip(
            scales, self.regression_head, self.classification_head, strict=True
        ):
            parts["boxes"].append(boxes(features).permute(0, 2, 3, 1).flatten(1))
            parts["classes"].append(classes(features).permute(0, 2, 3, 1).flatten(1))
        return {name: torch.cat(tensors, 1) for name, tensors in parts.items()}


class Boxes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x).sigmoid()


@foreign(
    images(),
    """
    transformer.*.in_proj_weight         qkv       (3 x 16, 16)
    transformer.*.out_proj.weight        hidden    (16, 16)
    transformer.*.linear1.weight         hidden    (24, 16)
    transformer.*.linear2.weight         hidden    (16, 24)
    class_embed.weight                   head
    bbox_embed.layers.[01].weight        hidden    (16, 16)
    bbox_embed.layers.2.weight           head
    query_embed.weight                   embedding
    input_proj.weight                    conv      (16, 48)
    """,
)
class DETR(nn.Module):
    """Queries and box predictors, as in DETR."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(16, 2, 1, 1, 24, batch_first=True)
        self.class_embed, self.bbox_embed = nn.Linear(16, 5), Boxes()
        self.query_embed, self.input_proj = nn.Embedding(3, 16), nn.Conv2d(3, 16, 4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        source = self.input_proj(x).flatten(2).mT
        queries = self.query_embed.weight[None].expand(len(x), -1, -1)
        h = self.transformer(source, queries)
        return {"pred_logits": self.class_embed(h), "pred_boxes": self.bbox_embed(h)}


class DiTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(16, 96))
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        parts = self.adaLN_modulation(condition)[:, None].chunk(6, -1)
        h = F.layer_norm(x, (16,)) * (1 + parts[0]) + parts[1]
        q, k, v = self.qkv(h).reshape(*h.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + parts[2] * self.proj(h)
        h = F.layer_norm(x, (16,)) * (1 + parts[3]) + parts[4]
        return x + parts[5] * self.mlp(h)


@foreign(
    lambda: (torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 2])),
    """
    patches.weight                     conv      (16, 48)
    pos_embed                          embedding
    time.0.weight                      hidden    (16, 8)
    time.2.weight                      hidden    (16, 16)
    labels.weight                      embedding
    blocks.*.adaLN_modulation.1.weight hidden    (6 x 16, 16)
    blocks.*.qkv.weight                qkv       (3 x 16, 16)
    blocks.*.proj.weight               hidden    (16, 16)
    blocks.*.mlp.0.weight              hidden    (24, 16)
    blocks.*.mlp.2.weight              hidden    (16, 24)
    modulate.weight                    hidden    (2 x 16, 16)
    final.weight                       head
    """,
)
class DiT(nn.Module):
    """Diffusion transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.pos_embed = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 4, 16))
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.labels = nn.Embedding(4, 16)
        self.blocks = nn.ModuleList([DiTBlock() for _ in range(2)])
        self.final, self.modulate = nn.Linear(16, 48), nn.Linear(16, 32)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-torch.arange(4.0))
        condition = self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.labels(y)
        x = self.patches(x).flatten(2).mT + self.pos_embed
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulate(F.silu(condition))[:, None].chunk(2, -1)
        return self.final(F.layer_norm(x, (16,)) * (1 + scale) + shift)


# ------------------------------------------------------------------- networks of vectors and graphs


@foreign(
    lambda: torch.randn(4, 8),
    """
    value.weight  head
    body.0.weight hidden (16, 8)
    body.2.weight hidden (16, 16)
    policy.weight head
    """,
)
class ActorCritic(nn.Module):
    """Policy and value."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.policy = nn.Linear(16, 1), nn.Linear(16, 4)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())

    def forward(self, x: Tensor) -> tuple[torch.distributions.Categorical, Tensor]:
        h = self.body(x)
        return torch.distributions.Categorical(logits=self.policy(h)), self.value(h)


class GraphConvolution(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return torch.sparse.mm(adjacency, x @ self.weight) + self.bias


@foreign(
    lambda: (torch.randn(5, 40), torch.eye(5).to_sparse()),
    """
    gc1.weight hidden (16, 40)
    gc2.weight hidden (12, 16)
    gc3.weight head
    """,
)
class GCN(nn.Module):
    """Graph convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.gc1, self.gc2 = GraphConvolution(40, 16), GraphConvolution(16, 12)
        self.gc3 = GraphConvolution(12, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        h = F.relu(self.gc1(x, adjacency))
        return self.gc3(F.relu(self.gc2(h, adjacency)), adjacency).log_softmax(1)


@foreign(
    lambda: (torch.randn(4, 6), torch.randint(5, (4, 3))),
    """
    tables.*.weight embedding
    bottom.0.weight hidden (12, 6)
    bottom.2.weight hidden (8, 12)
    top.0.weight    hidden (12, 14)
    top.2.weight    head
    """,
)
class DLRM(nn.Module):
    """Recommendation by embeddings and products, as DLRM."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.EmbeddingBag(5, 8, mode="sum") for _ in range(3)])
        self.bottom = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(14, 12), nn.ReLU(), nn.Linear(12, 1), nn.Sigmoid())

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        rows = [table(sparse[:, i : i + 1]) for i, table in enumerate(self.tables)]
        T = torch.stack([x, *rows], 1)
        products = T @ T.mT
        i, j = torch.tril_indices(4, 4, -1)
        return self.top(torch.cat([x, products[:, i, j]], 1))


@foreign(
    lambda: (
        lambda model: (
            (model(torch.randn(4, 1, 8, 8)) - model(torch.randn(4, 1, 8, 8))).square().sum()
        )
    ),
    """
    convolution.weight conv   (4, 9)
    fc.0.weight        hidden (12, 64)
    fc.2.weight        head
    """,
)
class Siamese(nn.Module):
    """Siamese network in a contrastive loss."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 6))
        self.convolution = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.convolution(x)), 2)
        return self.fc(h.flatten(1))


@foreign(
    lambda: (torch.randn(3, 3, 8, 8), tokens(5)[:1].repeat(3, 1)),
    """
    image.0.weight      conv      (8, 48)
    image_proj.weight   head
    words.weight        embedding
    text.weight_?h_l0   hidden    *
    text_proj.weight    head
    """,
)
class TwoTowers(nn.Module):
    """Two towers of images and text."""

    def __init__(self) -> None:
        super().__init__()
        self.image_proj, self.text_proj = nn.Linear(32, 10), nn.Linear(12, 10)
        self.image = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Flatten())
        self.words, self.text = nn.Embedding(20, 6), nn.GRU(6, 12, batch_first=True)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        a = F.normalize(self.image_proj(self.image(image)), dim=1)
        b = F.normalize(self.text_proj(self.text(self.words(text))[1][0]), dim=1)
        return self.logit_scale.exp() * a @ b.mT


@foreign(
    lambda: torch.randn(4, 8),
    """
    experts.*.0.weight hidden (12, 8)
    experts.*.2.weight hidden (10, 12)
    gates.*.weight     head
    towers.*.0.weight  hidden (6, 10)
    towers.*.2.weight  head
    """,
)
class MMoE(nn.Module):
    """Several tasks with gates over common experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10)) for _ in range(3)]
        )
        self.gates = nn.ModuleList([nn.Linear(8, 3) for _ in range(2)])
        self.towers = nn.ModuleList(
            [nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 1)) for _ in range(2)]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        experts = torch.stack([expert(x) for expert in self.experts], 1)
        mixed = [(gate(x).softmax(-1)[..., None] * experts).sum(1) for gate in self.gates]
        return [tower(h) for tower, h in zip(self.towers, mixed, strict=True)]


@foreign(
    lambda: torch.randn(6, 8),
    """
    w_gate  head
    w_noise head
    w1      experts   4 x (12, 8)
    w2      experts   4 x (8, 12)
    out.weight head
    """,
)
class NoisyTopK(nn.Module):
    """Noisy top-k gates of bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.w_gate, self.w_noise = (nn.Parameter(torch.randn(8, 4)) for _ in "ab")
        self.w1, self.w2 = nn.Parameter(torch.randn(4, 8, 12)), nn.Parameter(torch.randn(4, 12, 8))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ self.w_gate
        scores = scores + torch.randn_like(scores) * F.softplus(x @ self.w_noise)
        values, indices = scores.topk(2, dim=-1)
        gates = torch.zeros_like(scores).scatter(1, indices, values.softmax(-1))
        h = torch.relu(torch.einsum("bi,eih->ebh", x, self.w1))
        return self.out(torch.einsum("ebh,eho,be->bo", h, self.w2, gates))


@foreign(
    lambda: torch.randn(6, 8),
    """
    experts.w1         experts   4 x (12, 8)
    experts.v1         experts   4 x (12, 8)
    experts.w2         experts   4 x (8, 12)
    router.weight      head
    embed.weight       hidden    (8, 8)
    classify.weight    head
    """,
)
class MegaBlocks(nn.Module):
    """Experts stored as (experts x hidden, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.classify, self.router, self.embed = (nn.Linear(8, n) for n in (3, 4, 8))
        self.experts = nn.Module()
        self.experts.n_experts = 4
        for name in ("w1", "v1", "w2"):
            self.experts.register_parameter(name, nn.Parameter(torch.randn(48, 8)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        gates = self.router(x).softmax(-1)
        w1, v1, w2 = (getattr(self.experts, n).view(4, 12, 8) for n in ("w1", "v1", "w2"))
        h = F.silu(torch.matmul(x, w1.mT)) * torch.matmul(x, v1.mT)
        return self.classify((gates.mT[..., None] * torch.bmm(h, w2)).sum(0))


# ------------------------------------------------------------------------------ sequences and text


@foreign(
    lambda: tokens(),
    """
    words.weight      embedding
    lstm.weight_ih_l0 hidden (4 x 12, 8)
    lstm.weight_hh_l0 hidden (4 x 12, 12)
    hidden2tag.weight head
    """,
)
class Tagger(nn.Module):
    """Tags by an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden2tag = nn.Linear(12, 5)
        self.words, self.lstm = nn.Embedding(20, 8), nn.LSTM(8, 12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden2tag(self.lstm(self.words(x))[0]).log_softmax(-1)


@foreign(
    lambda: (torch.randn(2, 5, 8), torch.randn(2, 4, 8)),
    """
    transformer.*.in_proj_weight  qkv    (3 x 8, 8)
    transformer.*.out_proj.weight hidden (8, 8)
    transformer.*.linear1.weight  hidden (16, 8)
    transformer.*.linear2.weight  hidden (8, 16)
    """,
)
class Torso(nn.Module):
    """Transformer of torch without a head."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(8, 2, 2, 2, 16, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.transformer(source, target)


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(16, 48, bias=False), nn.Linear(24, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * up)


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_kv = nn.Linear(16, 16, bias=False), nn.Linear(16, 32, bias=False)
        self.to_out = nn.Linear(16, 16)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, (k, v) = self.to_q(x), self.to_kv(context).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@foreign(
    lambda: torch.randn(2, 7, 16),
    """
    latents                     embedding
    layers.*.0.to_q.weight      hidden (16, 16)
    layers.*.0.to_kv.weight     hidden (2 x 16, 16)
    layers.*.0.to_out.weight    hidden (16, 16)
    layers.*.1.w12.weight       hidden (2 x 24, 16)
    layers.*.1.w3.weight        hidden (16, 24)
    to_logits.weight            head
    """,
)
class Perceiver(nn.Module):
    """Latents, keys and values in one, gate and up in one."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(4, 16))
        self.layers = nn.ModuleList([nn.ModuleList([CrossAttention(), SwiGLU()]) for _ in range(2)])
        self.norm, self.to_logits = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, data: Tensor) -> Tensor:
        x = self.latents.expand(len(data), -1, -1)
        for attention, feed_forward in self.layers:
            x = x + attention(self.norm(x), data)
            x = x + feed_forward(x)
        return self.to_logits(x.mean(1))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(16, 2, 8)) for _ in "qkv")
        self.o = nn.Parameter(torch.randn(2, 8, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,dnh->bnth", x, w) for w in (self.q, self.k, self.v))
        scores = torch.einsum("bnth,bnsh->bnts", q, k) / math.sqrt(8)
        return torch.einsum("bnts,bnsh,nho->bto", scores.softmax(-1), v, self.o)


@foreign(
    lambda: torch.randn(2, 5, 16),
    """
    attention.q hidden (16, 16)
    attention.k hidden (16, 16)
    attention.v hidden (16, 16)
    attention.o hidden (16, 16)
    shift       vector
    table       embedding
    kernel      hidden (32, 16)
    back        hidden (16, 32)
    readout     head
    """,
)
class Einsums(nn.Module):
    """Bare parameters in einsum and matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Heads()
        self.readout = nn.Parameter(torch.randn(16, 3))
        self.kernel, self.back = (
            nn.Parameter(torch.randn(16, 32)),
            nn.Parameter(torch.randn(16, 32)),
        )
        self.shift, self.table = nn.Parameter(torch.randn(5, 16)), nn.Parameter(torch.randn(9, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.shift + self.table[torch.arange(5)]
        x = x + self.attention(x)
        x = x + F.linear(torch.relu(x @ self.kernel), self.back)
        return torch.einsum("btd,dc->bc", x, self.readout)


# ------------------------------------------------------------------------------------ Hugging Face

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "vocab_size": 40,
}
GPT2 = {
    "n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 16,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
IMAGES = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_labels": 3}


def hugging(name: str, example: Callable[[], Any], right: str, **config: Any) -> None:
    def build() -> nn.Module:
        model = getattr(transformers, name, None) or pytest.skip(f"no {name} in transformers")
        return model(model.config_class(**config))

    FOREIGN[name] = Foreign(build, example, right)


def text() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "labels": tokens()}


hugging(
    "GPT2LMHeadModel",
    text,
    """
    transformer.wte.weight         embedding
    transformer.wpe.weight         embedding
    *.attn.c_attn.weight           qkv       (3 x 16, 16)
    *.attn.c_proj.weight           hidden    (16, 16)
    *.mlp.c_fc.weight              hidden    (64, 16)
    *.mlp.c_proj.weight            hidden    (16, 64)
    """,
    **GPT2,
)
hugging(
    "LlamaForCausalLM",
    text,
    """
    model.embed_tokens.weight embedding
    *.[qo]_proj.weight        hidden (16, 16)
    *.[kv]_proj.weight        hidden (8, 16)
    *.gate_proj.weight        hidden (24, 16)
    *.up_proj.weight          hidden (24, 16)
    *.down_proj.weight        hidden (16, 24)
    lm_head.weight            head
    """,
    **TINY,
    num_key_value_heads=2,
)
hugging(
    "MixtralForCausalLM",
    text,
    """
    model.embed_tokens.weight embedding
    *.[qo]_proj.weight        hidden  (16, 16)
    *.[kv]_proj.weight        hidden  (8, 16)
    *.mlp.gate.weight         head
    *.experts.gate_up_proj    experts 3 x (2 x 24, 16)
    *.experts.down_proj       experts 3 x (16, 24)
    lm_head.weight            head
    """,
    **TINY,
    num_key_value_heads=2,
    num_local_experts=3,
)
hugging(
    "DbrxForCausalLM",
    text,
    """
    transformer.wte.weight         embedding
    *.attn.Wqkv.weight             qkv     (16+8+8, 16)
    *.attn.out_proj.weight         hidden  (16, 16)
    *.ffn.router.layer.weight      head
    *.mlp.w1                       experts 3 x (24, 16)
    *.mlp.v1                       experts 3 x (24, 16)
    *.mlp.w2                       experts 3 x (16, 24)
    lm_head.weight                 head
    """,
    d_model=16,
    n_heads=4,
    n_layers=1,
    vocab_size=40,
    max_seq_len=16,
    attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 3, "moe_top_k": 2},
)
T5 = {
    "num_layers": 2, "num_decoder_layers": 2, "d_model": 16, "d_ff": 24, "num_heads": 4, "d_kv": 4,
    "vocab_size": 40, "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
hugging(
    "SwitchTransformersForConditionalGeneration",
    text,
    """
    shared.weight                            embedding
    *.relative_attention_bias.weight         embedding
    *.[qkvo].weight                          hidden (16, 16)
    *.router.classifier.weight               head
    *.wi.weight                              hidden (24, 16)
    *.wo.weight                              hidden (16, 24)
    """,
    **T5,
    num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1,
    num_experts=3,
)
hugging(
    "T5ForConditionalGeneration",
    text,
    """
    shared.weight                            embedding
    *.relative_attention_bias.weight         embedding
    *.[qkvo].weight                          hidden (16, 16)
    *.wi.weight                              hidden (24, 16)
    *.wo.weight                              hidden (16, 24)
    """,
    **T5,
)
hugging(
    "BertForPreTraining",
    lambda: {"input_ids": tokens()},
    """
    bert.embeddings.*.weight            embedding
    *.self.*.weight                     hidden (16, 16)
    *.attention.output.dense.weight     hidden (16, 16)
    *.intermediate.dense.weight         hidden (24, 16)
    *.output.dense.weight               hidden (16, 24)
    bert.pooler.dense.weight            hidden (16, 16)
    cls.predictions.transform.dense.weight hidden (16, 16)
    cls.seq_relationship.weight         head
    """,
    **TINY,
)
hugging(
    "ViTForImageClassification",
    images(),
    """
    vit.embeddings.cls_token            embedding
    vit.embeddings.position_embeddings  embedding
    *.projection.weight                 conv   (16, 192)
    *.[qkvo]_proj.weight                hidden (16, 16)
    *.fc1.weight                        hidden (24, 16)
    *.fc2.weight                        hidden (16, 24)
    classifier.weight                   head
    """,
    **{key: value for key, value in TINY.items() if key != "vocab_size"},
    image_size=16,
    patch_size=8,
    num_labels=3,
)
hugging(
    "SwinForImageClassification",
    images(32),
    """
    *.projection.weight                  conv   (8, 48)
    *.layers.0.*.[qkvo]_proj.weight      hidden (8, 8)
    *.layers.1.*.[qkvo]_proj.weight      hidden (16, 16)
    *.relative_position_bias_table       vector
    *.layers.0.*.fc1.weight              hidden (32, 8)
    *.layers.0.*.fc2.weight              hidden (8, 32)
    *.layers.1.*.fc1.weight              hidden (64, 16)
    *.layers.1.*.fc2.weight              hidden (16, 64)
    *.reduction.weight                   hidden (16, 32)
    classifier.weight                    head
    """,
    **IMAGES,
    num_heads=[2, 2],
    window_size=4,
)
hugging(
    "Swinv2ForImageClassification",
    images(32),
    """
    *.projection.weight                  conv   (8, 48)
    *.logit_scale                        vector
    *.continuous_position_bias_mlp.0.weight hidden (512, 2)
    *.continuous_position_bias_mlp.2.weight hidden (2, 512)
    *.layers.0.*.self.*.weight           hidden (8, 8)
    *.layers.1.*.self.*.weight           hidden (16, 16)
    *.layers.0.*.attention.output.dense.weight hidden (8, 8)
    *.layers.1.*.attention.output.dense.weight hidden (16, 16)
    *.layers.0.*.intermediate.dense.weight hidden (32, 8)
    *.layers.1.*.intermediate.dense.weight hidden (64, 16)
    *.layers.0.*.output.dense.weight     hidden (8, 32)
    *.layers.1.*.output.dense.weight     hidden (16, 64)
    *.reduction.weight                   hidden (16, 32)
    classifier.weight                    head
    """,
    **IMAGES,
    num_heads=[2, 2],
    window_size=4,
)
hugging(
    "WhisperForConditionalGeneration",
    lambda: {"input_features": torch.randn(2, 8, 16), "labels": tokens()},
    """
    model.encoder.conv1.weight     conv (16, 24)
    model.encoder.conv2.weight     conv (16, 48)
    *.embed_positions.weight       embedding
    *.embed_tokens.weight          embedding
    *.[qkv]_proj.weight            hidden (16, 16)
    *.out_proj.weight              hidden (16, 16)
    *.fc1.weight                   hidden (24, 16)
    *.fc2.weight                   hidden (16, 24)
    """,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    vocab_size=40,
    num_mel_bins=8,
    max_source_positions=8,
    max_target_positions=8,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
    decoder_start_token_id=0,
)
hugging(
    "MambaForCausalLM",
    text,
    """
    backbone.embeddings.weight embedding
    *.A_log                    vector
    *.conv1d.weight            vector
    *.in_proj.weight           hidden (2 x 32, 16)
    *.x_proj.weight            hidden (2+4+4, 32)
    *.dt_proj.weight           hidden (32, 2)
    *.out_proj.weight          hidden (16, 32)
    """,
    hidden_size=16,
    num_hidden_layers=2,
    state_size=4,
    time_step_rank=2,
    vocab_size=40,
)
hugging(
    "Mamba2ForCausalLM",
    text,
    """
    backbone.embeddings.weight embedding
    *.conv1d.weight            vector
    *.in_proj.weight           hidden (32+40+4, 16)
    *.out_proj.weight          hidden (16, 32)
    lm_head.weight             head
    """,
    hidden_size=16,
    num_hidden_layers=2,
    state_size=4,
    vocab_size=40,
    num_heads=4,
    head_dim=8,
    n_groups=1,
    chunk_size=4,
)


@foreign(
    text,
    """
    *.wte.weight                     embedding
    *.wpe.weight                     embedding
    *.c_attn.base_layer.weight       qkv    (3 x 16, 16)
    *.c_attn.lora_A.default.weight   hidden (4, 16)
    *.c_attn.lora_B.default.weight   hidden (3 x 16, 4)
    *.attn.c_proj.weight             hidden (16, 16)
    *.c_fc.weight                    hidden (64, 16)
    *.mlp.c_proj.weight              hidden (16, 64)
    """,
)
def lora() -> nn.Module:
    """LoRA adapters on GPT-2."""
    peft = pytest.importorskip("peft")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    return peft.get_peft_model(model, config)


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )


@foreign(
    lambda: torch.randn(3, 8),
    """
    *.0.weight            hidden (16, 8)
    *.2.base_layer.weight hidden (16, 16)
    *.oft_R.*             vector
    *.4.weight            head
    """,
)
def oft() -> nn.Module:
    """Rotations of OFT."""
    peft = pytest.importorskip("peft")
    config = peft.OFTConfig(r=0, oft_block_size=4, target_modules=["2"])
    return peft.get_peft_model(_mlp(), config)


@foreign(
    lambda: torch.randn(3, 8),
    """
    *.0.weight            hidden (16, 8)
    *.2.base_layer.weight hidden (16, 16)
    *.boft_[Rs].*         vector
    *.4.weight            head
    """,
)
def boft() -> nn.Module:
    """Rotations of BOFT."""
    peft = pytest.importorskip("peft")
    config = peft.BOFTConfig(boft_block_size=4, target_modules=["2"])
    return peft.get_peft_model(_mlp(), config)


# ---------------------------------------------------------------------------------------- the tests


def right_of(model: Foreign, name: str) -> tuple[str, str]:
    """The right role of a parameter, and how it is seen."""
    for line in model.right.strip().splitlines():
        pattern, role, *view = line.split(maxsplit=2)
        if fnmatchcase(name, pattern):
            return role, "".join(view).strip()
    raise AssertionError(f"no right role was written down for {name}")


def wrong_rows(model: Foreign, table: RoleTable) -> list[str]:
    wrong = []
    for row in table:
        if row.parameter.ndim < 2 or re.search(r"Norm gain", row.reason):
            continue
        role, view = right_of(model, row.name)
        seen = str(row.view) if row.is_matrix else ""
        if row.role != role or (row.is_matrix and view not in ("*", seen)):
            wrong.append(f"{row.name}: {row.role} {seen} ({row.reason}), expected {role} {view}")
    return wrong


@pytest.mark.parametrize("name", FOREIGN)
def test_with_an_example_every_role_is_right(name: str) -> None:
    torch.manual_seed(0)
    model = FOREIGN[name].build()
    table = all_roles(model, example=FOREIGN[name].example())
    assert wrong_rows(FOREIGN[name], table) == []
    assert not [row for row in table.matrices if "a guess" in row.reason]


def test_without_an_example_nine_tenths_are_right_and_the_others_say_that_they_are_guesses() -> (
    None
):
    wrong, count = [], 0
    for model in FOREIGN.values():
        table = all_roles(model.build())
        wrong += wrong_rows(model, table)
        count += sum(row.parameter.ndim > 1 for row in table)
    assert [line for line in wrong if "a guess" not in line] == []
    assert len(wrong) <= 0.1 * count, "\n".join([f"{len(wrong)} of {count}", *wrong])


def test_there_are_enough_models() -> None:
    assert len(FOREIGN) >= 25
