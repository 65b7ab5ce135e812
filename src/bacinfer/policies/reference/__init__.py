"""Stand-ins for Diffusion Policy's classes: compact, with the state-dict names of its checkpoints."""

from bacinfer.policies.reference.image_policy import DiffusionTransformerHybridImagePolicy
from bacinfer.policies.reference.lowdim_policy import DiffusionTransformerLowdimPolicy
from bacinfer.policies.reference.normalizer import LinearNormalizer
from bacinfer.policies.reference.transformer import TransformerForDiffusion

# by the name that checkpoints have for the class
STAND_INS = {
    "diffusion_policy.policy.diffusion_transformer_lowdim_policy.DiffusionTransformerLowdimPolicy": (
        DiffusionTransformerLowdimPolicy
    ),
    "diffusion_policy.policy.diffusion_transformer_hybrid_image_policy.DiffusionTransformerHybridImagePolicy": (
        DiffusionTransformerHybridImagePolicy
    ),
    "diffusion_policy.model.diffusion.transformer_for_diffusion.TransformerForDiffusion": TransformerForDiffusion,
}

__all__ = [
    "STAND_INS",
    "DiffusionTransformerHybridImagePolicy",
    "DiffusionTransformerLowdimPolicy",
    "LinearNormalizer",
    "TransformerForDiffusion",
]
