"""Labels that occur together as a graph, and attention along its edges; dense, no graph library.

A_ij = #(i,j) / Σ_{k≠i} #(i,k) for i ≠ j, the share that label j has of label i's company among the
training rows; A_ii = 1, so that a label weighs as much as all its company. Attention of label i
over j: e_ij = LeakyReLU(a·[W u_i ‖ W u_j]) + log A_ij, softmax over j; labels that never met give
each other none.

Reference: Veličković et al., Graph Attention Networks, 2018, equations 1-6 (additive attention,
heads joined side by side, or averaged in the last layer); Chen et al., Multi-Label Image
Recognition with Graph Convolutional Networks, 2019, section 3.3 (graph from co-occurrence). Departs
from both in log A_ij, which makes the observed frequency the prior of the attention.
"""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SLOPE = 0.2
"""Of LeakyReLU below 0, as in the paper."""


def adjacency(
    cooccurrence: npt.NDArray[np.int64], threshold: float = 0.0
) -> npt.NDArray[np.float64]:
    """(C, C) A as above.

    Args:
        cooccurrence: (C, C) training rows with both labels; the diagonal is not read.
        threshold: weaker edges, A_ij < threshold, are left out, 0..1.
    """
    company = cooccurrence.astype(np.float64)
    np.fill_diagonal(company, 0.0)
    total = company.sum(1, keepdims=True)
    result: npt.NDArray[np.float64] = np.divide(
        company, total, out=np.zeros_like(company), where=total > 0
    )
    result[result < threshold] = 0.0
    np.fill_diagonal(result, 1.0)
    return result


class GraphAttention(nn.Module):
    """One layer of multi-head attention among C labels."""

    def __init__(
        self, width: int, outputs: int, num_heads: int, *, average: bool = False, dropout: float = 0
    ) -> None:
        """Xavier-uniform weights.

        Args:
            width: of a label's vector coming in.
            outputs: of one going out; a multiple of `num_heads` unless heads are averaged.
            num_heads: attention heads.
            average: heads have `outputs` entries each and are averaged; otherwise they share them.
            dropout: share of attention weights dropped in training.
        """
        super().__init__()
        if not average and outputs % num_heads:
            raise ValueError(f"width {outputs} is no multiple of num_heads {num_heads}")
        self.average, self.dropout = average, dropout
        head_dim = outputs if average else outputs // num_heads
        self.weight = nn.Parameter(torch.empty(num_heads, width, head_dim))
        self.left = nn.Parameter(torch.empty(num_heads, head_dim))
        self.right = nn.Parameter(torch.empty(num_heads, head_dim))
        for head in self.weight:
            nn.init.xavier_uniform_(head)
        nn.init.xavier_uniform_(self.left)
        nn.init.xavier_uniform_(self.right)

    def forward(self, labels: Tensor, log_adjacency: Tensor) -> Tensor:
        """(C, outputs) new vectors.

        Args:
            labels: (C, width).
            log_adjacency: (C, C) log A, −inf where there is no edge.
        """
        inner = labels @ self.weight  # (heads, C, head_dim)
        left = (inner @ self.left[:, :, None]).squeeze(2)
        right = (inner @ self.right[:, :, None]).squeeze(2)
        scores = F.leaky_relu(left[:, :, None] + right[:, None, :], _SLOPE) + log_adjacency
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        joined = weights.to(inner.dtype) @ inner
        return joined.mean(0) if self.average else joined.transpose(0, 1).flatten(1)
