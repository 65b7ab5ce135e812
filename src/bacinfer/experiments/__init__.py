"""Methods evaluated on checkpoints: from a method to a plan, to a run, to a row of results."""
