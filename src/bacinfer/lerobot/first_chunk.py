"""Calling a policy once, outside of any episode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lerobot.policies.pretrained import PreTrainedPolicy
    from torch import Tensor


class FirstChunk:
    """The action chunk [B, T, D] at an observation that is the first of its episode.

    The policy's queues are left as they were.
    """

    def __init__(self, policy: PreTrainedPolicy) -> None:
        self.policy = policy

    def __call__(self, observation: Mapping[str, Any]) -> Tensor:
        attributes = dict(vars(self.policy))
        self.policy.reset()  # makes new queues
        try:
            return self.sample(dict(observation))
        finally:
            vars(self.policy).update(attributes)

    def sample(self, batch: dict[str, Any]) -> Tensor:
        return self.policy.predict_action_chunk(batch)
