"""Agreement between the ranks of a save or load: JSON to rank 0 and back, and an exception of one raised on all."""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from moetrain.checkpoint.folders import DamagedError
from moetrain.checkpoint.life import SupersededError
from moetrain.config import UserError

_KINDS = {"damaged": DamagedError, "superseded": SupersededError, "user": UserError}
"""The narrowest first."""


class Wire:
    """The ranks of ``group`` (CPU collectives, e.g. gloo), or this process alone if it is ``None``."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world = 1 if group is None else dist.get_world_size(group)
        if group is not None and "cpu:" not in str(dist.get_backend_config(group)):
            raise ValueError(f"checkpoints need a group with CPU collectives, not {dist.get_backend_config(group)}")

    def together(self, mine: Callable[[], Any], lead: Callable[[list[Any]], Any]) -> Any:
        """Each rank computes ``mine``, rank 0 ``lead`` of the list of all; every rank gets that result.

        Both return JSON data. Raises on every rank what was raised on any: the original where it was raised,
        elsewhere the same kind of ``UserError`` with the same words, or ``RuntimeError`` naming the rank.
        """
        failure: Exception | None = None
        try:
            answer: Any = {"value": mine()}
        except Exception as error:
            failure, answer = error, _describe(error)
        answers = self._gather(answer)
        verdict: Any = None
        if answers is not None:
            failed = [(rank, answer["error"]) for rank, answer in enumerate(answers) if "error" in answer]
            if failed:
                verdict = {"rank": failed[0][0], "error": failed[0][1]}
            else:
                try:
                    verdict = {"value": lead([answer["value"] for answer in answers])}
                except Exception as error:
                    failure, verdict = error, {"rank": 0} | _describe(error)
        verdict = self._broadcast(verdict)
        if failure is not None:
            raise failure
        if "error" in verdict:
            kind, text = verdict["error"]
            raise _KINDS[kind](text) if kind else RuntimeError(f"rank {verdict['rank']}: {text}")
        return verdict["value"]

    def decide(self, lead: Callable[[], Any]) -> Any:
        """What rank 0 finds, on every rank; raises as ``together``."""
        return self.together(lambda: None, lambda _: lead())

    def _gather(self, data: Any) -> list[Any] | None:
        if self.group is None:
            return [data]
        payload = _pack(data)
        longest = torch.tensor([payload.numel()])
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self.group)
        padded = torch.zeros(8 + int(longest.item()), dtype=torch.uint8)
        padded[:8] = torch.tensor([payload.numel()]).view(torch.uint8)
        padded[8 : 8 + payload.numel()] = payload
        parts = [torch.empty_like(padded) for _ in range(self.world)] if self.rank == 0 else None
        dist.gather(padded, parts, group=self.group, group_dst=0)
        return None if parts is None else [_unpack(part[8 : 8 + int(part[:8].view(torch.int64))]) for part in parts]

    def _broadcast(self, data: Any) -> Any:
        if self.group is None:
            return data
        payload = _pack(data)
        length = torch.tensor([payload.numel()])
        dist.broadcast(length, group=self.group, group_src=0)
        if self.rank != 0:
            payload = torch.empty(int(length.item()), dtype=torch.uint8)
        dist.broadcast(payload, group=self.group, group_src=0)
        return data if self.rank == 0 else _unpack(payload)


def _describe(error: Exception) -> dict[str, Any]:
    kind = next((kind for kind, of in _KINDS.items() if isinstance(error, of)), "")
    return {"error": [kind, str(error) if kind else f"{type(error).__name__}: {error}"]}


def _pack(data: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(data, separators=(",", ":")).encode()), dtype=torch.uint8)


def _unpack(payload: torch.Tensor) -> Any:
    return json.loads(payload.numpy().tobytes())
