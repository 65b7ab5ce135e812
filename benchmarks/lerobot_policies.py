"""What plans save of a call of LeRobot's policies, at their published sizes with random weights.

    python benchmarks/lerobot_policies.py multi_task_dit xvla smolvla

Needs lerobot (see shell/environments/lerobot.sh). Weights are random, so that actions mean nothing; times do not depend
on them. Vision-language models are made from their published sizes too; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE

import bacinfer.lerobot
from bacinfer import CacheSchedule, Sampler, SamplingPlan
from bacinfer.core.apply import prepared
from bacinfer.measurement import latency


def features(size: int, num_cameras: int) -> dict[str, Any]:
    images = {f"observation.images.{i}": PolicyFeature(FeatureType.VISUAL, (3, size, size)) for i in range(num_cameras)}
    return {
        "input_features": {OBS_STATE: PolicyFeature(FeatureType.STATE, (14,)), **images},
        "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (14,))},
        "device": "cpu",
    }


def multi_task_dit() -> Any:
    """Its default configuration, with two cameras and CLIP ViT-B/16."""
    from lerobot.policies.multi_task_dit import MultiTaskDiTConfig, MultiTaskDiTPolicy
    from transformers import CLIPConfig, CLIPModel

    with tempfile.TemporaryDirectory(prefix="clip") as clip:
        CLIPModel(CLIPConfig(vision_config={"patch_size": 16})).save_pretrained(clip)
        encoders = {"vision_encoder_name": clip, "text_encoder_name": clip}
        return MultiTaskDiTPolicy(MultiTaskDiTConfig(**features(224, num_cameras=2), **encoders))


def xvla() -> Any:
    """Its default configuration, with two cameras and Florence-2 large."""
    from lerobot.policies.xvla.configuration_xvla import XVLAConfig
    from lerobot.policies.xvla.modeling_xvla import XVLAPolicy

    vision = {
        "embed_dim": [256, 512, 1024, 2048],
        "depths": [1, 1, 9, 1],
        "num_heads": [8, 16, 32, 64],
        "num_groups": [8, 16, 32, 64],
        "projection_dim": 1024,
    }
    florence = {"vision_config": vision, "text_config": {"vocab_size": 51289, "d_model": 1024}}
    return XVLAPolicy(XVLAConfig(**features(224, num_cameras=2), florence_config=florence))


def smolvla() -> Any:
    """Its default configuration, with two cameras and SmolVLM2 500M."""
    from lerobot.policies.smolvla import smolvlm_with_expert
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from transformers import SmolVLMConfig

    text = {
        "model_type": "llama",
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "head_dim": 64,
        "vocab_size": 49280,
    }
    vision = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    }
    vlm = SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=4)
    processor = SimpleNamespace(tokenizer=SimpleNamespace(fake_image_token_id=1, global_image_token_id=2))
    auto_config, auto_processor = smolvlm_with_expert.AutoConfig, smolvlm_with_expert.AutoProcessor
    with (
        mock.patch.object(auto_config, "from_pretrained", return_value=vlm),
        mock.patch.object(auto_processor, "from_pretrained", return_value=processor),
    ):
        return SmolVLAPolicy(SmolVLAConfig(**features(512, num_cameras=2), load_vlm_weights=False))


POLICIES = {"multi_task_dit": multi_task_dit, "xvla": xvla, "smolvla": smolvla}
INTERVALS = {"multi_task_dit": 10}  # between updates; elsewhere K = 10
DEFAULT_INTERVAL = 2
NUM_WARMUP_CALLS = 1  # of seconds each


def observation(policy: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    images = {
        key: torch.rand(1, *feature.shape, generator=generator) for key, feature in policy.config.image_features.items()
    }
    return {
        OBS_STATE: torch.rand(1, 14, generator=generator),
        OBS_LANGUAGE_TOKENS: torch.randint(3, 1000, (1, 32), generator=generator),
        OBS_LANGUAGE_ATTENTION_MASK: torch.ones(1, 32, dtype=torch.bool),
        **images,
    }


def share_of_the_denoising_model(policy: Any, observation: dict[str, Any]) -> float:
    """The part of a plain call's time that lies in the K calls of the denoising model."""
    handle = bacinfer.lerobot.handle(policy)
    bacinfer.apply(handle, SamplingPlan(), engine="eager")  # everything is computed, by the model that is timed
    spent, starts = [0.0], [0.0]

    def start(*_: Any) -> None:
        starts[0] = time.perf_counter()

    def stop(*_: Any) -> None:
        spent[0] += time.perf_counter() - starts[0]

    hooks = [handle.model.register_forward_pre_hook(start), handle.model.register_forward_hook(stop)]
    begin = time.perf_counter()
    handle(observation)
    share = spent[0] / (time.perf_counter() - begin)
    for hook in hooks:
        hook.remove()
    bacinfer.remove(handle)
    return share


def report(name: str, num_calls: int) -> None:
    policy = POLICIES[name]().eval()
    seen = observation(policy)
    found = bacinfer.lerobot.summary(policy)
    K = found.num_inference_steps
    handle = bacinfer.lerobot.handle(policy)
    interval = INTERVALS.get(name, DEFAULT_INTERVAL)
    plans = {
        f"every {interval} steps": SamplingPlan(CacheSchedule.periodic(found.blocks, K, interval)),
        "half the steps": SamplingPlan(sampler=Sampler("own", K // 2)),
    }
    if handle.scheduler is not None:
        plans["ddim:10"] = SamplingPlan(sampler=Sampler("ddim", 10))
    share = share_of_the_denoising_model(policy, seen)
    print(f"\n{name}: K = {K}, {share:.0%} of a call in the denoising model, {torch.get_num_threads()} threads")
    variants = {("plain", "-"): None}
    variants |= {(plan, "eager"): applied for plan, applied in prepared(handle, plans, engine="eager").items()}
    engine = "onednn" if handle.loop is None else "fused"  # programs know the loop
    faster = prepared(handle, {"everything": SamplingPlan(), **plans}, engine=engine)
    variants |= {(plan, engine): applied for plan, applied in faster.items()}
    with mock.patch.object(latency, "NUM_WARMUP_CALLS", NUM_WARMUP_CALLS):
        latencies = latency.measure_latencies(handle, seen, variants, num_calls)
    for (plan, engine), found in latencies.items():
        speedup = latencies["plain", "-"].p50 / found.p50
        parts = latency.divided(found.encoder, found.denoising)
        print(
            f"{plan:15}  {engine:6}  {1e3 * found.p50:8.1f} ms  {speedup:5.2f}x  encoder + denoising, ms: {parts}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="+", choices=POLICIES)
    parser.add_argument("--num_calls", type=int, default=3, help="how many calls of each are timed (default: 3)")
    args = parser.parse_args()
    torch.manual_seed(0)
    for name in args.policies:
        report(name, args.num_calls)


if __name__ == "__main__":
    main()
