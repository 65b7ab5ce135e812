"""Fast diffusion policies without retraining: block-wise adaptive caching (BAC, arXiv 2506.13456), in one line."""

from bacinfer._installation import __version__  # first: it refuses systems that are not supported
from bacinfer.core.apply import apply, refresh, remove, summary
from bacinfer.core.blocks import ResidualBlock, register_layer, unregister_layer
from bacinfer.core.bubbling import bubbling_union
from bacinfer.core.diffusion_cache_wrapper import FastDiffusionPolicy
from bacinfer.core.handle import PolicyHandle
from bacinfer.core.plan import SamplingPlan
from bacinfer.core.schedule import CacheSchedule
from bacinfer.core.summary import CacheSummary

__all__ = [
    "CacheSchedule",
    "CacheSummary",
    "FastDiffusionPolicy",
    "PolicyHandle",
    "ResidualBlock",
    "SamplingPlan",
    "__version__",
    "apply",
    "bubbling_union",
    "refresh",
    "register_layer",
    "remove",
    "summary",
    "unregister_layer",
]
