"""What runs inside a policy: schedules, the blocks they apply to, and the engines that execute them."""
