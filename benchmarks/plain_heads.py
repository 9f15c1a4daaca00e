"""Linear probe and router as the earlier systems train them: modules of torch, batches of rows."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def mlp(width: int, outputs: int) -> nn.Sequential:
    """Linear(D→D), ReLU, Linear(D→outputs)."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))


class PlainRouter(nn.Module):
    """z = Σ_m w_m head_m(f_m), w = softmax over modalities of r_m(f_m)."""

    def __init__(self, width: int, num_classes: int, modalities: int = 2) -> None:
        super().__init__()
        self.heads = nn.ModuleList(mlp(width, num_classes) for _ in range(modalities))
        self.routers = nn.ModuleList(mlp(width, 1) for _ in range(modalities))

    def forward(self, *features: Tensor) -> Tensor:
        """(B, C) logits of one (B, D) tensor a modality."""
        pairs = list(zip(self.routers, features, strict=True))
        weights = torch.cat([router(part) for router, part in pairs], 1).softmax(1)
        parts = [head(part) for head, part in zip(self.heads, features, strict=True)]
        return (torch.stack(parts, 1) * weights[..., None]).sum(1)


def train_plainly(
    model: nn.Module,
    features: list[Tensor],
    targets: Tensor,
    batch_size: int,
    *,
    epochs: int,
    lr: float,
    criterion: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """A loop over a DataLoader of rows, with AdamW as torch gives it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    rows = TensorDataset(*features, targets)
    model.train()
    for _ in range(epochs):
        for *batch, wanted in DataLoader(rows, batch_size, shuffle=True):
            optimizer.zero_grad()
            criterion(model(*batch), wanted).backward()
            optimizer.step()
    model.eval()
