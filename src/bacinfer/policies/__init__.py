"""From a checkpoint to a policy."""

from bacinfer.policies.checkpoint import (
    Checkpoint,
    build_policy,
    load_policy,
    read_checkpoint,
    write_checkpoint,
)

__all__ = ["Checkpoint", "build_policy", "load_policy", "read_checkpoint", "write_checkpoint"]
