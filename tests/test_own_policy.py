"""A whole policy of one's own, without any package of robotics: defined, analysed, made fast and measured."""

from __future__ import annotations

import torch
from torch import nn

import bacinfer


class MyPolicy(nn.Module):
    num_inference_steps = 50

    def __init__(self):
        super().__init__()
        layer = nn.TransformerDecoderLayer(32, 4, 128, batch_first=True, norm_first=True)
        self.model = nn.TransformerDecoder(layer, 4)
        self.time = nn.Embedding(self.num_inference_steps, 32)

    def predict_action(self, obs):  # {"obs": [B, 2, 32]} to actions [B, 16, 32]
        x = torch.randn(len(obs["obs"]), 16, 32)
        for k in range(self.num_inference_steps):
            x = x - 0.1 * self.model(x, obs["obs"] + self.time.weight[k])
        return {"action": x}


def test_own_policy(capsys) -> None:
    policy = MyPolicy().eval()
    observations = [{"obs": torch.randn(1, 2, 32)} for _ in range(4)]
    plan = bacinfer.find_plan(policy, observations, num_updates=10, num_bu_blocks=2)
    bacinfer.apply(policy, plan)  # from here on policy.predict_action is fast
    print(bacinfer.measure(policy, {"bac": plan}, observations))
    assert "bac" in capsys.readouterr().out
