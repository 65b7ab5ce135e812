"""What the demonstrations' values are mapped to before a policy is trained on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bacinfer.policies.reference import LinearNormalizer
from bacinfer.training.dataset import TrainingData


def fit_normalizer(
    demonstrations: TrainingData, normalize_obs: str, obs_gain: float | Sequence[float] = 1.0
) -> LinearNormalizer:
    """Maps the actions' range to [-1, 1], and the observations' too (``range``) or their standard deviation (``std``).

    The latter keeps rare extremes from squeezing what is common into a small part of [-1, 1]. The observations become
    [-`obs_gain`, `obs_gain`] instead: weights start small, and where millimetres in a wide range matter, a larger gain
    spares most of the steps in which they would have to grow. One gain for each number of an observation can hide some
    of them (0) or give all the same unit; else what hardly varies is enlarged until it tells episodes apart. Pictures
    (uint8) are mapped from 0 to 1, which is how the policy takes them.

    Raises:
        ValueError: another word; a gain that is negative, none that is positive, or not as many as numbers.
    """
    gain = torch.as_tensor(list(obs_gain) if isinstance(obs_gain, Sequence) else obs_gain, dtype=torch.float32)
    if gain.min() < 0 or gain.max() == 0:
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
        width = vectors[name].shape[-1]
        if gain.numel() not in (1, width):
            raise ValueError(
                f"training.obs_gain has {gain.numel()} numbers: expected one, or {width}, as many as an observation has"
            )
        for affine in ("scale", "offset"):
            normalizer.params_dict[name][affine].mul_(gain)
    for name in demonstrations.fields.keys() - vectors.keys():
        normalizer.add_image(name)
    return normalizer
