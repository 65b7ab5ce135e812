"""What the demonstrations' values are mapped to before a policy is trained on them."""

from __future__ import annotations

import torch

from bacinfer.policies.reference import LinearNormalizer
from bacinfer.training.dataset import TrainingData


def fit_normalizer(demonstrations: TrainingData, normalize_obs: str, obs_gain: float = 1.0) -> LinearNormalizer:
    """Maps the actions' range to [-1, 1], and the observations' too (``range``) or their standard deviation (``std``).

    The latter keeps rare extremes from squeezing what is common into a small part of [-1, 1]. The observations become
    [-`obs_gain`, `obs_gain`] instead: weights start small, and where millimetres in a wide range matter, a larger gain
    spares most of the steps in which they would have to grow. Pictures (uint8) are mapped from 0 to 1, which is how the
    policy takes them.

    Raises:
        ValueError: another word, or a gain that is not positive.
    """
    if obs_gain <= 0:
        raise ValueError(f"training.obs_gain is {obs_gain}: expected more than 0")
    vectors = {name: values for name, values in demonstrations.fields.items() if values.dtype != torch.uint8}
    if normalize_obs == "range":
        normalizer = LinearNormalizer.fit(vectors)
    elif normalize_obs == "std":
        means = {name: (values.mean(0), values.std(0)) for name, values in vectors.items() if name != "action"}
        ranges = {name: (mean - std, mean + std) for name, (mean, std) in means.items()}
        normalizer = LinearNormalizer.from_ranges({**ranges, "action": vectors["action"].aminmax(dim=0)})
    else:
        raise ValueError(f"training.normalize_obs is {normalize_obs!r}; known: range, std")
    for name in vectors.keys() - {"action"}:
        for affine in ("scale", "offset"):
            normalizer.params_dict[name][affine].mul_(obs_gain)
    for name in demonstrations.fields.keys() - vectors.keys():
        normalizer.add_image(name)
    return normalizer
