"""What a policy costs and what it does: latency, FLOPs, memory, action error, and the statistics of scores."""
