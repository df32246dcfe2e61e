"""A cluster in numbers, and how long it takes to carry bytes between its ranks."""

import torch
from torch import Tensor

from moetrain.config import UserError, config
from moetrain.layouts import divisors


@config
class Cluster:
    """Nodes of equal ranks. Bandwidths are what a rank gets each way where all ranks of a node send at once."""

    nodes: int = 1
    ranks_per_node: int = 8
    ranks_per_nic: int = 1  # that share a network card: one of them alone may use all of it
    intra: float = 300.0  # GB/s a rank, inside a node
    inter: float = 25.0  # GB/s a rank, between nodes
    latency: float = 20.0  # us of an exchange
    peak: float = 312.0  # TFLOP/s a rank, dense, 16 bits
    gemm: float = 0.4  # share of it that the experts' grouped matmuls reach
    attention: float = 0.3  # share of it that the rest of a layer reaches
    memory: float = 80.0  # GiB a rank

    def __post_init__(self) -> None:
        for name in ("nodes", "ranks_per_node", "ranks_per_nic"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"cluster.{name}={value}: has to be at least 1")
        for name in ("intra", "inter", "peak", "memory"):
            if not (value := getattr(self, name)) > 0:
                raise UserError(f"cluster.{name}={value}: has to be above 0")
        for name in ("gemm", "attention"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise UserError(f"cluster.{name}={value}: a share of cluster.peak, has to be above 0 and at most 1")
        if self.latency < 0:
            raise UserError(f"cluster.latency={self.latency}: microseconds, has to be 0 or more")
        if self.ranks_per_node % self.ranks_per_nic:
            raise UserError(
                f"cluster.ranks_per_nic={self.ranks_per_nic} does not divide cluster.ranks_per_node="
                f"{self.ranks_per_node}: use one of {divisors(self.ranks_per_node)}"
            )

    def check(self, ranks: int) -> None:
        """Raises ``UserError`` unless ``ranks`` fill whole nodes that there are, or a part of one."""
        node, most = self.ranks_per_node, self.nodes * self.ranks_per_node
        if ranks < 1:
            raise UserError(f"ranks={ranks}: has to be at least 1")
        if ranks > most:
            raise UserError(
                f"ranks={ranks}: the cluster has {self.nodes} x {node} = {most}; use {most} or fewer, or set "
                f"cluster.nodes={-(-ranks // node)}"
            )
        if ranks > node and ranks % node:
            raise UserError(
                f"ranks={ranks} does not fill nodes of cluster.ranks_per_node={node}: use {ranks // node * node} or "
                f"{-(-ranks // node) * node}"
            )
        if ranks < node and node % ranks:
            raise UserError(
                f"ranks={ranks} does not divide cluster.ranks_per_node={node}: use one of {divisors(node)}, or several "
                f"nodes"
            )

    def node(self, ranks: int) -> int:
        """Of that many ranks those of one node."""
        return min(ranks, self.ranks_per_node)

    def exchange(self, bytes_RR: Tensor) -> float:
        """us of an all-to-all in which rank r sends ``bytes_RR[r, p]`` to rank p; what it keeps is not sent."""
        us = self.links(bytes_RR)
        return us + self.latency if us else 0.0

    def links(self, bytes_RR: Tensor) -> float:
        """us that the slowest link works for, inside nodes or between them, which work side by side; no latency."""
        R = bytes_RR.shape[0]
        N, n, card = R // self.node(R), self.node(R), min(self.ranks_per_nic, self.node(R))
        bytes_RR = bytes_RR - torch.diag(bytes_RR.diagonal())
        near_Nnn = bytes_RR.view(N, n, N, n).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        near, far = 0.0, 0.0
        for near_Nn, all_R in ((near_Nnn.sum(2), bytes_RR.sum(1)), (near_Nnn.sum(1), bytes_RR.sum(0))):  # out, in
            near = max(near, float(near_Nn.max()))
            far = max(far, float((all_R - near_Nn.flatten()).view(-1, card).sum(1).max()))
        return max(near / self.intra, far / (card * self.inter)) / 1e3

    def relay(self, moved_RE: Tensor, owner_E: Tensor, size: float) -> float:
        """us to bring ranks the experts of ``moved_RE`` (R, E bool), ``size`` bytes each, from their owners: each
        enters a node once, leaves none more than once, and spreads inside it; no latency."""
        R, E = moved_RE.shape
        n = self.node(R)
        enters_NE = moved_RE.view(R // n, n, E).any(1) & (owner_E // n != torch.arange(R // n)[:, None])
        far, near = int(enters_NE.sum(1).max()), int(moved_RE.sum(1).max())
        leaves_N = torch.zeros(R // n, dtype=torch.int64).scatter_add_(0, owner_E // n, enters_NE.any(0).long())
        far = max(far, int(leaves_N.max()))
        return size * max(far / (n * self.inter), near / self.intra) / 1e3
