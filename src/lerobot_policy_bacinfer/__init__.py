"""A plugin of LeRobot's: policies that run by a plan of bacinfer's, which their checkpoints hold.

LeRobot imports it by its name's prefix. For each type of policy that bacinfer supports there is one more, such as
``multi_task_dit_bac``; `bacinfer lerobot export` writes checkpoints of them.
"""

from lerobot_policy_bacinfer import configuration_bac  # registers the types

__all__ = ["configuration_bac"]
