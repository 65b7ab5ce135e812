"""LeRobot's policies from tiny configurations with random weights, and observations for them.

Nothing is downloaded: vision-language models are made from configurations too, or stand for themselves.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn

STATE, MOVES, WORDS = 4, 2, 5
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


def with_random_weights(policy: nn.Module) -> Any:
    """In eval mode; weights that start at zero, such as those of gates, get others."""
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1, generator=generator)
    return policy.eval()


def write_clip(directory: Path) -> Path:
    """A tiny CLIP as `from_pretrained` reads it, with a tokenizer of letters."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    path = directory / "clip"
    if not path.exists():
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
        words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
        text = {**sizes, "vocab_size": len(words), "max_position_embeddings": 77, **ends}
        vision = {**sizes, "image_size": 32, "patch_size": 16}
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(path)
        CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[]).save_pretrained(path)
    return path


def multi_task_dit(directory: Path, **settings: Any) -> Any:
    from lerobot.policies.multi_task_dit import MultiTaskDiTConfig, MultiTaskDiTPolicy

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
    torch.manual_seed(0)
    return with_random_weights(MultiTaskDiTPolicy(config))


def xvla(directory: Path, **settings: Any) -> Any:
    from lerobot.policies.xvla.configuration_xvla import XVLAConfig
    from lerobot.policies.xvla.modeling_xvla import XVLAPolicy

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
    torch.manual_seed(0)
    return with_random_weights(XVLAPolicy(config))


def smolvla(directory: Path, **settings: Any) -> Any:
    from lerobot.policies.smolvla import smolvlm_with_expert
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from transformers import SmolVLMConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    vlm = SmolVLMConfig(
        text_config={"model_type": "llama", **sizes, "vocab_size": 60, "num_key_value_heads": 1, "head_dim": 8},
        vision_config={**sizes, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16},
        scale_factor=2,
        image_token_id=50,
        pad_token_id=0,
    )
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
    processor = SimpleNamespace(tokenizer=SimpleNamespace(fake_image_token_id=51, global_image_token_id=52))
    torch.manual_seed(0)
    with (
        mock.patch.object(smolvlm_with_expert.AutoConfig, "from_pretrained", return_value=vlm),
        mock.patch.object(smolvlm_with_expert.AutoProcessor, "from_pretrained", return_value=processor),
    ):
        return with_random_weights(SmolVLAPolicy(config))


def pi0(directory: Path, **settings: Any) -> Any:
    from lerobot.policies.pi0 import modeling_pi0
    from lerobot.policies.pi0.configuration_pi0 import PI0Config

    return _pi(modeling_pi0, PI0Config, modeling_pi0.PI0Policy, settings)


def pi05(directory: Path, **settings: Any) -> Any:
    from lerobot.policies.pi05 import modeling_pi05
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    return _pi(modeling_pi05, PI05Config, modeling_pi05.PI05Policy, settings)


def _pi(module: Any, config_class: Any, policy_class: Any, settings: dict[str, Any]) -> Any:
    """The sizes of the vision-language model stand in the code: smaller ones are put there."""
    from transformers.models.auto import CONFIG_MAPPING

    def gemma(variant: str) -> Any:
        return module.GemmaConfig(width=32, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=16)

    def paligemma() -> Any:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 16}
        return CONFIG_MAPPING["paligemma"](vision_config={"model_type": "siglip_vision_model", **sizes})

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
    small = {"paligemma": paligemma, "gemma": CONFIG_MAPPING["gemma"]}
    torch.manual_seed(0)
    with mock.patch.object(module, "CONFIG_MAPPING", small), mock.patch.object(module, "get_gemma_config", gemma):
        policy = policy_class(config)
    policy.model.paligemma_with_expert.paligemma.model.multi_modal_projector.linear = nn.Linear(32, 32)
    return with_random_weights(policy)


class _Features(nn.Module):
    """Stands for a vision-language model: the same features for any observation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.features = nn.Parameter(torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(2)))

    def of(self, batch: int) -> Tensor:
        return self.features.expand(batch, -1, -1)


class _InternVL(_Features):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {name: nn.Identity() for name in ("language_model", "vision_tower", "multi_modal_projector")}
        )

    def get_fused_image_text_embedding_batched(self, camera_images: list[Tensor], **_: Any) -> tuple[Tensor, Tensor]:
        batch = len(camera_images[0])
        return self.of(batch), torch.ones(batch, 6, dtype=torch.bool)


class _QwenOfVLAJEPA(_Features):
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=16))

    def expand_tokenizer(self) -> tuple[list[str], list[int], int]:
        return ["<action>"], [1], 2

    def to_pixel_values(self, images: Tensor) -> Tensor:
        return images

    def build_inputs(self, images: list[Any], **_: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.full((len(images), 6), 2)}


class _QwenOfGR00T(_Features):
    def prepare_input(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs

    def forward(self, inputs: dict[str, Any]) -> Any:
        from transformers import BatchFeature

        features = self.of(len(inputs["state"]))
        everywhere = torch.ones(features.shape[:2], dtype=torch.bool)
        return BatchFeature(
            data={
                "backbone_features": features,
                "backbone_attention_mask": everywhere,
                "image_mask": torch.arange(6).expand_as(everywhere) < 4,
            }
        )


def evo1(directory: Path, **settings: Any) -> Any:
    from lerobot.policies.evo1 import evo1_model
    from lerobot.policies.evo1.configuration_evo1 import Evo1Config
    from lerobot.policies.evo1.modeling_evo1 import Evo1Policy

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
    torch.manual_seed(0)
    with mock.patch.object(evo1_model, "InternVL3Embedder", _InternVL):
        return with_random_weights(Evo1Policy(config))


def vla_jepa(directory: Path, **settings: Any) -> Any:
    from lerobot.policies.vla_jepa import modeling_vla_jepa
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
    torch.manual_seed(0)
    with mock.patch.object(modeling_vla_jepa, "Qwen3VLInterface", _QwenOfVLAJEPA):
        policy = modeling_vla_jepa.VLAJEPAPolicy(config)
    policy.model._qwen_last_decoder_hidden = partial(_hidden, policy.model.qwen)
    return with_random_weights(policy)


def _hidden(qwen: _QwenOfVLAJEPA, inputs: dict[str, Tensor]) -> Tensor:
    return qwen.of(len(inputs["input_ids"]))


def groot(directory: Path, **settings: Any) -> Any:
    from lerobot.policies.groot import modeling_groot
    from lerobot.policies.groot.configuration_groot import GrootConfig
    from lerobot.policies.groot.groot_n1_7 import GR00TN17, GR00TN17ActionHead, GR00TN17Config

    head = GR00TN17Config(
        hidden_size=16,
        input_embedding_dim=16,
        backbone_embedding_dim=16,
        action_horizon=8,
        max_action_dim=4,
        max_state_dim=STATE,
        vl_self_attention_cfg=None,
    )
    head.diffusion_model_cfg = {
        **head.diffusion_model_cfg,
        "num_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "output_dim": 16,
    }

    def tiny(*args: Any, **kwargs: Any) -> Any:
        model = GR00TN17.__new__(GR00TN17)
        nn.Module.__init__(model)
        model.config, model.backbone, model.action_head = head, _QwenOfGR00T(), GR00TN17ActionHead(head)
        return model

    config = GrootConfig(
        **features(size=32), device="cpu", use_bf16=False, chunk_size=8, n_action_steps=8, max_action_dim=4, **settings
    )
    torch.manual_seed(0)
    with mock.patch.object(modeling_groot.GR00TN17, "from_pretrained", tiny):
        return with_random_weights(modeling_groot.GrootPolicy(config))


def write_wan(directory: Path) -> Path:
    """The encoders of a tiny Wan as `from_pretrained` reads them: of pictures, and of words."""
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    path = directory / "wan"
    if not path.exists():
        torch.manual_seed(0)
        AutoencoderKLWan(
            base_dim=4,
            z_dim=48,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1] * 48,
            latents_std=[0.9] * 48,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
        ).save_pretrained(path / "vae")
        UMT5EncoderModel(
            UMT5Config(vocab_size=200, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ).save_pretrained(path / "text_encoder")
    return path


def fastwam(directory: Path, **settings: Any) -> Any:
    from lerobot.policies.fastwam.configuration_fastwam import FastWAMConfig
    from lerobot.policies.fastwam.modeling_fastwam import FastWAMPolicy
    from lerobot.policies.fastwam.wan import components

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
    torch.manual_seed(0)
    with mock.patch.object(components, "WAN22_DIFFUSERS_MODEL_ID", wan):
        return with_random_weights(FastWAMPolicy(config))


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
