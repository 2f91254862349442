"""Embeddings, whose update is looked up."""

import torch
from rankwise.variants.adapter.initialization import Start
from rankwise.variants.adapter.kinds.interface import Kind, Site
from torch import Generator, Tensor, nn


class Embedding(Kind):
    """nn.Embedding.  As in PEFT no dropout acts here, and a padding token gives A no gradient."""

    is_linear = False
    factors = "embedding"

    def holds(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        return module.num_embeddings, module.embedding_dim

    def fault(self, module: nn.Module) -> str | None:
        if type(module).forward is not nn.Embedding.forward:
            return "which has a forward pass of its own, and only nn.Embedding's is known: choose other targets"
        if module.max_norm is not None:
            return f"with max_norm = {module.max_norm}, which changes the frozen weight: make it None, or choose other targets"
        return super().fault(module)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def stored(self, matrix: Tensor, module: nn.Module) -> Tensor:
        return matrix.mT

    def start(self, draw: Start, module: nn.Module, rank: int, random: Generator) -> tuple[Tensor, Tensor]:
        """PEFT's: A at zero and B at N(0, 1).  A's draw is too small here: it falls with the size of the vocabulary."""
        out_features, in_features = self.size(module)
        return torch.zeros(rank, in_features), torch.empty(out_features, rank).normal_(generator=random)

    def adapted(self, site: Site, base: nn.Module, x: Tensor) -> Tensor:
        owners = site.draw.rows
        owners.check(site.name, x)
        y, tokens = base(x), x[..., None]
        ids = owners.by_member(tokens).mT  # (K, 1, N)
        with torch.autocast(y.device.type, enabled=False):
            A, B, c = site.operands()
            z = A.gather(2, ids.expand(-1, A.shape[1], -1))  # (K, R, N)
            if base.padding_idx is not None:
                z = torch.where(ids == base.padding_idx, z.detach(), z)
            update = torch.bmm((z * c[:, :, None]).mT, B.mT)  # (K, N, O)
        return (y + owners.as_input(update, tokens)).to(y.dtype)
