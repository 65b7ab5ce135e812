"""Block-wise adaptive caching (BAC, arXiv 2506.13456) for transformer diffusion policies."""

from bacinfer.core.blocks import ResidualBlock, register_layer, unregister_layer
from bacinfer.core.bubbling import bubbling_union
from bacinfer.core.diffusion_cache_wrapper import FastDiffusionPolicy
from bacinfer.core.schedule import CacheSchedule
from bacinfer.core.summary import CacheSummary

__all__ = [
    "CacheSchedule",
    "CacheSummary",
    "FastDiffusionPolicy",
    "ResidualBlock",
    "bubbling_union",
    "register_layer",
    "unregister_layer",
]
