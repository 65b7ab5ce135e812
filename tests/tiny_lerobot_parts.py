"""What tiny policies of LeRobot's are made of, for what is downloaded, or as large as LeRobot's code says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

STATE = 4


@contextmanager
def tiny_parts(policy_type: str, directory: Path) -> Iterator[None]:
    """Inside, LeRobot makes policies of a type with tiny parts; what those are read from is in `directory`."""
    with ExitStack() as stack:
        for part in _PARTS.get(policy_type, _no_others)(directory):
            stack.enter_context(part)
        yield


Parts = Sequence[AbstractContextManager[Any]]


def _no_others(directory: Path) -> Parts:
    return ()


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


def _smolvla(directory: Path) -> Parts:
    from lerobot.policies.smolvla import smolvlm_with_expert
    from transformers import SmolVLMConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    vlm = SmolVLMConfig(
        text_config={"model_type": "llama", **sizes, "vocab_size": 60, "num_key_value_heads": 1, "head_dim": 8},
        vision_config={**sizes, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16},
        scale_factor=2,
        image_token_id=50,
        pad_token_id=0,
    )
    processor = SimpleNamespace(tokenizer=SimpleNamespace(fake_image_token_id=51, global_image_token_id=52))
    return (
        mock.patch.object(smolvlm_with_expert.AutoConfig, "from_pretrained", return_value=vlm),
        mock.patch.object(smolvlm_with_expert.AutoProcessor, "from_pretrained", return_value=processor),
    )


def _pi0(directory: Path) -> Parts:
    from lerobot.policies.pi0 import modeling_pi0

    return _pi(modeling_pi0)


def _pi05(directory: Path) -> Parts:
    from lerobot.policies.pi05 import modeling_pi05

    return _pi(modeling_pi05)


def _pi(module: Any) -> Parts:
    from transformers.models.auto import CONFIG_MAPPING
    from transformers.models.paligemma import modeling_paligemma

    def gemma(variant: str) -> Any:
        return module.GemmaConfig(width=32, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=16)

    def paligemma() -> Any:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 16}
        return CONFIG_MAPPING["paligemma"](vision_config={"model_type": "siglip_vision_model", **sizes})

    return (
        mock.patch.object(module, "CONFIG_MAPPING", {"paligemma": paligemma, "gemma": CONFIG_MAPPING["gemma"]}),
        mock.patch.object(module, "get_gemma_config", gemma),
        mock.patch.object(modeling_paligemma, "PaliGemmaMultiModalProjector", _Projector),
    )


class _Projector(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


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


class _QwenOfVLAJEPA(nn.Module):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.model = _LanguageModel()

    def expand_tokenizer(self) -> tuple[list[str], list[int], int]:
        return ["<action>"], [1], 2

    def to_pixel_values(self, images: Tensor) -> Tensor:
        return images

    def build_inputs(self, images: list[Any], **_: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.full((len(images), 6), 2)}


class _LanguageModel(_Features):
    """Whose last layer is listened to."""

    config = SimpleNamespace(hidden_size=16)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity()])

    @property
    def model(self) -> Any:
        return SimpleNamespace(language_model=self)

    def forward(self, input_ids: Tensor, **_: Any) -> None:
        self.layers[-1](self.of(len(input_ids)))


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


def _evo1(directory: Path) -> Parts:
    from lerobot.policies.evo1 import evo1_model

    return (mock.patch.object(evo1_model, "InternVL3Embedder", _InternVL),)


def _vla_jepa(directory: Path) -> Parts:
    from lerobot.policies.vla_jepa import modeling_vla_jepa

    return (mock.patch.object(modeling_vla_jepa, "Qwen3VLInterface", _QwenOfVLAJEPA),)


def _groot(directory: Path) -> Parts:
    from lerobot.policies.groot import modeling_groot
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

    return (mock.patch.object(modeling_groot.GR00TN17, "from_pretrained", tiny),)


def _fastwam(directory: Path) -> Parts:
    from lerobot.policies.fastwam.wan import components

    return (mock.patch.object(components, "WAN22_DIFFUSERS_MODEL_ID", str(write_wan(directory))),)


_PARTS: dict[str, Callable[[Path], Parts]] = {
    "smolvla": _smolvla,
    "pi0": _pi0,
    "pi05": _pi05,
    "evo1": _evo1,
    "groot": _groot,
    "vla_jepa": _vla_jepa,
    "fastwam": _fastwam,
}
