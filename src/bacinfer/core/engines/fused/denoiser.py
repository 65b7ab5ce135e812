"""The denoising transformer of Diffusion Policy, recognised by its structure, and its weights as a program wants them.

`TransformerForDiffusion` in the package diffusion_policy, and what is built like it: tokens of the noisy trajectory
pass a stack of pre-norm layers, either decoder layers that attend to a condition (a token for the timestep, then one
for each observation) or encoder layers with the timestep as their first token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bacinfer.core.blocks import Block
from bacinfer.core.engines.base import UnsupportedPolicyError
from bacinfer.core.engines.fused.affine import Affine

_ATTRIBUTES = (
    *("input_emb", "pos_emb", "time_emb", "cond_obs_emb", "cond_pos_emb"),
    *("encoder", "decoder", "mask", "memory_mask", "ln_f", "head"),
)


@dataclass(frozen=True)
class Denoiser:
    """A model that was recognised.

    Attributes:
        model: the module itself.
        stack: the `nn.TransformerDecoder` or `nn.TransformerEncoder` that holds the residual blocks.
        blocks: its residual blocks, in the order of the forward.
    """

    model: Any
    stack: Any
    blocks: tuple[Block, ...]

    @property
    def num_heads(self) -> int:
        """Heads of every attention."""
        return self.stack.layers[0].self_attn.num_heads

    @property
    def encoder_only(self) -> bool:
        """The timestep is the first token of the stack, and there is no condition."""
        return self.model.decoder is None

    @property
    def condition_is_token_wise(self) -> bool:
        """No token of the condition depends on another one, so that of the timestep is the same in every call."""
        encoder = self.model.encoder
        return isinstance(encoder, nn.Sequential) and all(_is_token_wise(module) for module in encoder)

    @property
    def weight(self) -> Tensor:
        """One of the dtype and on the device of all."""
        return self.model.pos_emb

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def input(self) -> nn.Linear:
        """From the trajectory's numbers to tokens."""
        return self.model.input_emb

    @property
    def positions(self) -> Tensor | None:
        """[1, at least N, D], which are added to the tokens."""
        return self.model.pos_emb

    @property
    def stack_norm(self) -> nn.LayerNorm | None:
        return self.stack.norm

    @property
    def final_norm(self) -> nn.LayerNorm | None:
        return self.model.ln_f

    @property
    def head(self) -> nn.Linear:
        """From tokens to the model's output."""
        return self.model.head

    @property
    def mask(self) -> Tensor | None:
        """Of self-attention [N, N], to be added to the logits."""
        return self.model.mask

    @property
    def memory_mask(self) -> Tensor | None:
        """Of cross-attention [N, at least J]."""
        return self.model.memory_mask

    def takes(self, condition: Tensor | None) -> bool:
        """Whether the model's output depends on a call's condition."""
        return condition is not None and self.model.cond_obs_emb is not None

    def num_condition_tokens(self, condition: Tensor | None) -> int:
        """J, with the timestep's."""
        return 1 + (0 if condition is None else condition.shape[1])

    def time_tokens(self, timesteps: Tensor) -> Tensor:
        """The timesteps' tokens with their position, before a condition's encoder or the stack: [K, D]."""
        positions = self.model.pos_emb if self.encoder_only else self.model.cond_pos_emb
        return self.model.time_emb(timesteps).to(positions.dtype) + positions[0, 0]

    def block_weights(self, block: Block, dtype: torch.dtype) -> BlockWeights:
        """A block's weights, packed for products in `dtype`."""
        weights, number = _WEIGHTS[block.kind]
        if block.adapter.layer_class is nn.TransformerEncoderLayer and block.kind == "ff_block":
            number = 2
        return weights.of(block.layer, Norm(getattr(block.layer, f"norm{number}"), dtype), dtype)


def read_denoiser(model: Any, blocks: Sequence[Block]) -> Denoiser:
    """Recognises a model by its structure; raises UnsupportedPolicyError if it is built otherwise."""
    missing = [name for name in _ATTRIBUTES if not hasattr(model, name)]
    if missing:
        raise UnsupportedPolicyError(f"its {type(model).__name__} has no {', '.join(missing)}")
    denoiser = Denoiser(model, model.encoder if model.decoder is None else model.decoder, tuple(blocks))
    _check_stack(denoiser)
    for name in ("input_emb", "head", *(["cond_obs_emb"] if model.cond_obs_emb is not None else [])):
        check_class(getattr(model, name), nn.Linear, name)
    check_class(model.ln_f, nn.LayerNorm, "ln_f")
    if model.input_emb.in_features != model.head.out_features:
        raise UnsupportedPolicyError("its model predicts something of another width than the trajectory")
    return denoiser


def _check_stack(denoiser: Denoiser) -> None:
    stack = denoiser.stack
    if not isinstance(stack, (nn.TransformerDecoder, nn.TransformerEncoder)):
        raise UnsupportedPolicyError(f"its layers are in a {type(stack).__name__}")
    layers = list(dict.fromkeys(block.layer for block in denoiser.blocks))
    if layers != list(stack.layers):
        raise UnsupportedPolicyError("it has residual blocks outside of its transformer stack")
    for block in denoiser.blocks:
        layer: Any = block.layer
        if block.adapter.layer_class not in (nn.TransformerDecoderLayer, nn.TransformerEncoderLayer):
            raise UnsupportedPolicyError(f"its {block.layer_name} is a {type(layer).__name__}")
        if not layer.norm_first:
            raise UnsupportedPolicyError(f"its {block.layer_name} is post-norm, so cached residuals cannot be summed")
        for name in ("linear1", "linear2"):
            check_class(getattr(layer, name), nn.Linear, f"{block.layer_name}.{name}")
        for name in ("self_attn", *(["multihead_attn"] if hasattr(layer, "multihead_attn") else [])):
            check_attention(getattr(layer, name), f"{block.layer_name}.{name}", denoiser.num_heads)


def check_attention(attention: Any, name: str, num_heads: int) -> None:
    check_class(attention, nn.MultiheadAttention, name)
    usual = attention._qkv_same_embed_dim and attention.bias_k is None and not attention.add_zero_attn
    if not (usual and attention.batch_first and attention.num_heads == num_heads):
        raise UnsupportedPolicyError(f"its {name} has separate projections, extra keys or another number of heads")


def check_class(module: Any, expected: type[nn.Module], name: str) -> None:
    if not isinstance(module, expected) or type(module).forward is not expected.forward:
        raise UnsupportedPolicyError(f"its {name} is a {type(module).__name__}, not a {expected.__name__}")


def _is_token_wise(module: nn.Module) -> bool:
    activation = type(module).__module__ == nn.Mish.__module__ and not isinstance(module, nn.MultiheadAttention)
    return activation or isinstance(module, (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity))


# -- weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """Layer normalisation in the residual stream's dtype, its result in the dtype of the products."""

    module: nn.LayerNorm
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        module = self.module
        return torch.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps).to(self.dtype)


@dataclass(frozen=True)
class SelfAttentionWeights:
    norm: Norm
    qkv: Affine  # [D, 3 D]
    out: Affine  # [D, D]
    rotation: Tensor | None = None  # of queries and keys by their position: cosines and sines [2, at least N, D / H]

    @classmethod
    def of(cls, layer: Any, norm: Norm, dtype: torch.dtype) -> SelfAttentionWeights:
        attention = layer.self_attn
        qkv = Affine.of(attention.in_proj_weight, attention.in_proj_bias, dtype)
        out = Affine.of(attention.out_proj.weight, attention.out_proj.bias, dtype)
        return cls(norm, qkv, out)


@dataclass(frozen=True)
class FeedForwardWeights:
    norm: Norm
    first: Affine  # [D, 4 D]
    activation: Callable[[Tensor], Tensor]
    second: Affine  # [4 D, D]

    @classmethod
    def of(cls, layer: Any, norm: Norm, dtype: torch.dtype) -> FeedForwardWeights:
        first = Affine.of(layer.linear1.weight, layer.linear1.bias, dtype)
        return cls(norm, first, layer.activation, Affine.of(layer.linear2.weight, layer.linear2.bias, dtype))


@dataclass(frozen=True)
class FoldedTokens:
    """Condition tokens as cross-attention meets them, n of them.

    The attention logit of a query x for head h and token j is ``(W_q x + b_q)_h · k_jh = x · logits_jh + offset_jh``,
    and what it adds to the output is its probability times ``values_jh``: both projections of the trajectory's
    tokens [D, D] become products with a few vectors, since products may be grouped in any order.

    Attributes:
        vectors: [2, n, H, D], logits and values.
        offset: [n, H].
    """

    vectors: Tensor
    offset: Tensor


@dataclass(frozen=True)
class CrossAttentionWeights:
    norm: Norm
    key_value: Affine  # [D, 2 D], in single precision or what the weights have
    query: Tensor  # [H, D / H, D], with the scale of the logits
    query_bias: Tensor  # [H, D / H], likewise
    out: Tensor  # [H, D / H, D]
    out_bias: Tensor  # [D]

    @classmethod
    def of(cls, layer: Any, norm: Norm, dtype: torch.dtype) -> CrossAttentionWeights:
        attention = layer.multihead_attn
        width, heads = attention.embed_dim, attention.num_heads
        weight, bias = attention.in_proj_weight.detach(), attention.in_proj_bias
        bias = weight.new_zeros(3 * width) if bias is None else bias.detach()
        scale = (width // heads) ** -0.5
        out = Affine.of(attention.out_proj.weight, attention.out_proj.bias, dtype)
        return cls(
            norm=norm,
            key_value=Affine.of(weight[width:], bias[width:], weight.dtype),
            query=scale * weight[:width].view(heads, -1, width),
            query_bias=scale * bias[:width].view(heads, -1),
            out=attention.out_proj.weight.detach().t().reshape(heads, -1, width).contiguous(),
            out_bias=out.bias,
        )

    def fold(self, tokens: Tensor) -> FoldedTokens:
        """The tokens [n, D] of a condition as this block meets them."""
        heads, head_width, width = self.query.shape
        key, value = self.key_value(tokens).view(-1, 2, heads, head_width).unbind(1)  # [n, H, D / H]
        vectors = tokens.new_empty(2, len(tokens), heads, width)
        torch.bmm(key.transpose(0, 1), self.query, out=vectors[0].transpose(0, 1))
        torch.bmm(value.transpose(0, 1), self.out, out=vectors[1].transpose(0, 1))
        return FoldedTokens(vectors, (key * self.query_bias).sum(-1))


BlockWeights = SelfAttentionWeights | CrossAttentionWeights | FeedForwardWeights

_WEIGHTS: dict[str, tuple[Any, int]] = {  # of a decoder layer: the class, and the number of the norm before the block
    "sa_block": (SelfAttentionWeights, 1),
    "mha_block": (CrossAttentionWeights, 2),
    "ff_block": (FeedForwardWeights, 3),
}


def num_bytes(part: Any) -> int:
    """Memory of the tensors in packed parts, without those that are the model's own."""
    if isinstance(part, Tensor):
        return part.nbytes
    if isinstance(part, dict):
        part = list(part.values())
    if isinstance(part, list):
        return sum(map(num_bytes, part))
    if isinstance(part, Affine):
        return num_bytes([value for name, value in vars(part).items() if name not in ("weight", "bias")])
    return num_bytes(list(vars(part).values())) if is_dataclass(part) else 0
