"""A tiny diffusion policy of the shape that the cache expects, with a sampler of three lines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 16


def decoder_model(num_layers: int = 3, norm_first: bool = True) -> nn.Module:
    layer = nn.TransformerDecoderLayer(
        WIDTH, 2, 4 * WIDTH, dropout=0.1, activation="gelu", batch_first=True, norm_first=norm_first
    )
    return DecoderModel(nn.TransformerDecoder(layer, num_layers))


def encoder_model(num_layers: int = 3, norm_first: bool = True) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        WIDTH, 2, 4 * WIDTH, dropout=0.1, activation="gelu", batch_first=True, norm_first=norm_first
    )
    return EncoderModel(nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False))


def _randomise(model: nn.Module) -> None:
    """Copies of one layer are all alike; tests need layers that differ."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


class DecoderModel(nn.Module):
    def __init__(self, decoder: nn.TransformerDecoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.time_emb = nn.Embedding(1000, WIDTH)

    def forward(self, sample: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        length = sample.shape[1]
        mask = torch.triu(torch.full((length, length), float("-inf"), dtype=sample.dtype, device=sample.device), 1)
        memory = cond + self.time_emb(timestep)
        return self.decoder(sample, memory, tgt_mask=mask)


class EncoderModel(nn.Module):
    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.time_emb = nn.Embedding(1000, WIDTH)

    def forward(self, sample: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        tokens = torch.cat([cond + self.time_emb(timestep), sample], dim=1)
        length = tokens.shape[1]
        mask = torch.triu(torch.full((length, length), float("-inf"), dtype=sample.dtype, device=sample.device), 1)
        return self.encoder(tokens, mask)[:, cond.shape[1] :]


class TinyPolicy(nn.Module):
    """Denoises [B, 4, WIDTH] from K random steps; obs [B, 2, WIDTH]."""

    def __init__(self, model: nn.Module | None = None, num_inference_steps: int = 10) -> None:
        super().__init__()
        self.model = decoder_model() if model is None else model
        self.num_inference_steps = num_inference_steps
        _randomise(self)
        self.eval()

    def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        obs = obs_dict["obs"]
        x = torch.randn(len(obs), 4, WIDTH, dtype=obs.dtype, device=obs.device)
        for k in reversed(range(self.num_inference_steps)):
            x = 0.9 * x - 0.2 * self.model(x, torch.tensor(k), obs) + 0.05 * torch.randn_like(x)
        return {"action": x[:, 1:3], "action_pred": x}


def observation(batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"obs": torch.randn(batch, 2, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)}


def act(policy: Any, obs: dict[str, Tensor] | None = None, seed: int = 1) -> Tensor:
    """The whole action trajectory [B, 4, WIDTH] of one call, with the noise of `seed`."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return policy.predict_action(observation() if obs is None else obs)["action_pred"]
