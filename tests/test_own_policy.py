"""A whole policy of one's own, without any package of robotics: defined, analysed, made fast and measured."""

from __future__ import annotations

import subprocess
import sys

SNIPPET = """\
import bacinfer
import torch
from torch import nn


class MyPolicy(nn.Module):
    num_inference_steps = 50

    def __init__(self):
        super().__init__()
        layer = nn.TransformerDecoderLayer(32, 4, 128, batch_first=True, norm_first=True)
        self.model, self.time = nn.TransformerDecoder(layer, 4), nn.Embedding(50, 32)

    def predict_action(self, obs):  # from {"obs": [B, 2, 32]} to actions [B, 16, 32]
        x = torch.randn(len(obs["obs"]), 16, 32)
        for k in range(50):
            x = x + (self.model(x, obs["obs"] + self.time.weight[k]) - x) / 50
        return {"action": x}


policy, observations = MyPolicy().eval(), [{"obs": torch.randn(1, 2, 32)} for _ in range(8)]
plan = bacinfer.find_plan(policy, observations, num_updates=10, num_bu_blocks=2)
bacinfer.apply(policy, plan)  # from here on policy.predict_action is fast
print(bacinfer.summary(policy), bacinfer.measure(policy, {"bac": plan}, observations), sep="\\n\\n")
"""


def test_a_policy_of_ones_own() -> None:
    assert len([line for line in SNIPPET.splitlines() if line]) < 25
    code = SNIPPET + "assert not {'hydra', 'diffusers', 'gymnasium'} & set(__import__('sys').modules)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mode plan, engine eager" in done.stdout
    plain, bac = (line.split() for line in done.stdout.splitlines() if line.startswith(("plain ", "bac ")))
    assert float(bac[1]) > 0
    assert plain[-1] == "-"
    assert bac[-1] == "eager"
