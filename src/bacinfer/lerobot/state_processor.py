"""A step of a policy's preprocessor: what an environment says of itself becomes a part of the state."""

from __future__ import annotations

from typing import Any

import torch
from lerobot.configs.types import FeatureType, PipelineFeatureType, PolicyFeature
from lerobot.processor import ObservationProcessorStep
from lerobot.utils.constants import OBS_ENV_STATE, OBS_STATE

Features = dict[PipelineFeatureType, dict[str, PolicyFeature]]


class AppendEnvironmentState(ObservationProcessorStep):
    """Appends ``observation.environment_state`` to ``observation.state``, both [..., D].

    For policies that read the state alone, such as ``multi_task_dit``, where LeRobot's Push-T has the pusher's position
    in the one and the block's corners in the other. A checkpoint names this class, so that it needs no registration.
    """

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        missing = [name for name in (OBS_STATE, OBS_ENV_STATE) if name not in observation]
        if missing:
            raise ValueError(
                f"the policy's state is made of {OBS_STATE} and {OBS_ENV_STATE}, but {' and '.join(missing)} was not "
                f"observed: LeRobot's Push-T shows both with obs_type=environment_state_agent_pos"
            )
        rest = {name: value for name, value in observation.items() if name != OBS_ENV_STATE}
        return {**rest, OBS_STATE: torch.cat([observation[OBS_STATE], observation[OBS_ENV_STATE]], dim=-1)}

    def transform_features(self, features: Features) -> Features:
        seen = dict(features[PipelineFeatureType.OBSERVATION])
        size = seen[OBS_STATE].shape[0] + seen.pop(OBS_ENV_STATE).shape[0]
        seen[OBS_STATE] = PolicyFeature(FeatureType.STATE, (size,))
        return {**features, PipelineFeatureType.OBSERVATION: seen}
