"""LeRobot's policies from tiny configurations with random weights, and observations for them.

Nothing is downloaded: see `tiny_lerobot_parts`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import nn

from tiny_lerobot_parts import STATE, tiny_parts, write_clip, write_wan

MOVES, WORDS = 2, 5
IMAGE = "observation.images.top"
PUSHT_IMAGE = "observation.image"


def features(size: int | None) -> dict[str, Any]:
    """The features of a configuration, with a square picture of `size`, if any."""
    inputs = {OBS_STATE: PolicyFeature(FeatureType.STATE, (STATE,))}
    if size is not None:
        inputs[IMAGE] = PolicyFeature(FeatureType.VISUAL, (3, size, size))
    return {"input_features": inputs, "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (MOVES,))}}


def observation(policy: nn.Module, batch: int = 2, seed: int = 1) -> dict[str, Any]:
    """What the policy's preprocessor would return."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {
        OBS_STATE: torch.rand(batch, STATE, generator=generator),
        OBS_LANGUAGE_TOKENS: torch.randint(3, 20, (batch, WORDS), generator=generator),
        OBS_LANGUAGE_ATTENTION_MASK: torch.ones(batch, WORDS, dtype=torch.bool),
        "task": ["push"] * batch,
        "state": torch.rand(batch, 1, STATE, generator=generator),  # as GR00T's preprocessor names it
        "embodiment_id": torch.zeros(batch, dtype=torch.long),
    }
    for name, feature in policy.config.image_features.items():
        found[name] = torch.rand(batch, *feature.shape, generator=generator)
    return found


def made(config: Any, directory: Path) -> Any:
    """The policy of a configuration in eval mode; weights that start at zero, such as those of gates, get others."""
    from lerobot.policies.factory import get_policy_class

    with tiny_parts(config.type, directory):
        torch.manual_seed(0)
        policy = get_policy_class(config.type)(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1, generator=generator)
    return policy.eval()


def multi_task_dit(directory: Path, **settings: Any) -> Any:
    from lerobot.policies.multi_task_dit import MultiTaskDiTConfig

    clip = str(write_clip(directory))
    config = MultiTaskDiTConfig(
        device="cpu",
        horizon=8,
        n_action_steps=6,
        hidden_dim=16,
        num_layers=2,
        num_heads=2,
        timestep_embed_dim=16,
        vision_encoder_name=clip,
        text_encoder_name=clip,
        **{"num_inference_steps": 10, "num_integration_steps": 10, **features(size=None), **settings},
    )
    return made(config, directory)


def xvla(directory: Path, **settings: Any) -> Any:
    from lerobot.policies.xvla.configuration_xvla import XVLAConfig

    vision = {
        "embed_dim": [16] * 4,
        "num_heads": [2] * 4,
        "num_groups": [2] * 4,
        "depths": [1] * 4,
        "window_size": 2,
        "projection_dim": 16,
    }
    text = {
        "vocab_size": 30,
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
    }
    config = XVLAConfig(
        **features(size=64),
        device="cpu",
        florence_config={"vision_config": vision, "text_config": text},
        chunk_size=8,
        n_action_steps=8,
        hidden_size=16,
        depth=2,
        num_heads=2,
        len_soft_prompts=2,
        max_len_seq=64,
        action_mode="auto",
        max_action_dim=4,
        max_state_dim=STATE,
        **settings,
    )
    return made(config, directory)


def smolvla(directory: Path, **settings: Any) -> Any:
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

    config = SmolVLAConfig(
        **features(size=32),
        device="cpu",
        load_vlm_weights=False,
        vlm_model_name="tiny",
        num_vlm_layers=4,
        num_expert_layers=0,
        resize_imgs_with_padding=(32, 32),
        chunk_size=8,
        n_action_steps=8,
        max_state_dim=STATE,
        max_action_dim=4,
        **settings,
    )
    return made(config, directory)


def pi0(directory: Path, **settings: Any) -> Any:
    from lerobot.policies.pi0.configuration_pi0 import PI0Config

    return _pi(PI0Config, directory, settings)


def pi05(directory: Path, **settings: Any) -> Any:
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    return _pi(PI05Config, directory, settings)


def _pi(config_class: Any, directory: Path, settings: dict[str, Any]) -> Any:
    config = config_class(
        **features(size=32),
        device="cpu",
        dtype="float32",
        image_resolution=(32, 32),
        chunk_size=8,
        n_action_steps=8,
        max_state_dim=STATE,
        max_action_dim=4,
        **settings,
    )
    return made(config, directory)


def evo1(directory: Path, **settings: Any) -> Any:
    from lerobot.policies.evo1.configuration_evo1 import Evo1Config

    config = Evo1Config(
        **features(size=32),
        device="cpu",
        use_amp=False,
        chunk_size=8,
        n_action_steps=8,
        max_state_dim=STATE,
        max_action_dim=4,
        max_views=1,
        embed_dim=16,
        hidden_dim=16,
        state_hidden_dim=16,
        num_heads=2,
        num_layers=2,
        **settings,
    )
    return made(config, directory)


def vla_jepa(directory: Path, **settings: Any) -> Any:
    from lerobot.policies.vla_jepa.configuration_vla_jepa import VLAJEPAConfig

    config = VLAJEPAConfig(
        **features(size=32),
        device="cpu",
        enable_world_model=False,
        chunk_size=8,
        n_action_steps=8,
        action_dim=MOVES,
        state_dim=STATE,
        action_model_type="DiT-test",
        action_hidden_size=16,
        action_num_layers=2,
        action_num_heads=None,
        action_attention_head_dim=None,
        **settings,
    )
    return made(config, directory)


def groot(directory: Path, **settings: Any) -> Any:
    from lerobot.policies.groot.configuration_groot import GrootConfig

    config = GrootConfig(
        **features(size=32), device="cpu", use_bf16=False, chunk_size=8, n_action_steps=8, max_action_dim=4, **settings
    )
    return made(config, directory)


def fastwam(directory: Path, **settings: Any) -> Any:
    from lerobot.policies.fastwam.configuration_fastwam import FastWAMConfig

    wan = str(write_wan(directory))
    sizes = {"ffn_dim": 16, "num_heads": 2, "attn_head_dim": 8, "num_layers": 2, "text_dim": 16, "freq_dim": 16}
    sizes["eps"] = 1e-6
    video = {"patch_size": [1, 2, 2], "in_dim": 48, "out_dim": 48, "hidden_dim": 16, "seperated_timestep": True}
    config = FastWAMConfig(
        **features(size=32),
        device="cpu",
        action_dim=MOVES,
        proprio_dim=STATE,
        action_horizon=8,
        n_action_steps=8,
        num_video_frames=9,
        action_video_freq_ratio=2,
        image_size=(32, 32),
        tokenizer_model_id=str(write_clip(directory)),
        tokenizer_max_len=8,
        text_encoder_model_id=wan,
        video_dit_config={**sizes, **video, "video_attention_mask_mode": "first_frame_causal"},
        action_dit_config={**sizes, "action_dim": MOVES, "hidden_dim": 12},
        **{"torch_dtype": "float32", **settings},
    )
    return made(config, directory)


def write_pusht_checkpoint(directory: Path) -> Path:
    """A policy for LeRobot's Push-T, with its processors, in ``directory/checkpoint``."""
    from lerobot.policies.factory import make_pre_post_processors

    policy = multi_task_dit(
        directory,
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
            PUSHT_IMAGE: PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
        },
        image_resize_shape=(32, 32),
        image_crop_shape=None,
    )
    policy.save_pretrained(directory / "checkpoint")
    statistics = {
        name: {
            kind: torch.full(shape, value)
            for kind, value in (("min", 0.0), ("max", 512.0), ("mean", 0.5), ("std", 1.0))
        }
        for name, shape in (("observation.state", (2,)), (PUSHT_IMAGE, (3, 1, 1)), ("action", (2,)))
    }
    for processor in make_pre_post_processors(policy.config, dataset_stats=statistics):
        processor.save_pretrained(directory / "checkpoint")
    return directory / "checkpoint"


def write_pusht_dataset(root: Path) -> Path:
    """Two episodes of nothing."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features: dict[str, Any] = {
        "observation.state": {"dtype": "float32", "shape": (2,), "names": None},
        PUSHT_IMAGE: {"dtype": "image", "shape": (96, 96, 3), "names": ["height", "width", "channels"]},
        "action": {"dtype": "float32", "shape": (2,), "names": None},
    }
    dataset = LeRobotDataset.create("bacinfer/pusht", fps=10, features=features, root=root, use_videos=False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for _ in range(9):
            state = 512 * torch.rand(2, generator=generator)
            picture = torch.randint(256, (96, 96, 3), generator=generator, dtype=torch.uint8)
            dataset.add_frame(
                {"observation.state": state, "action": state, PUSHT_IMAGE: picture.numpy(), "task": "push the T"}
            )
        dataset.save_episode()
    dataset.finalize()
    return root
