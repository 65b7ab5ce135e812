"""Finding schedules offline: residuals, similarities, update steps, blocks for bubbling union."""
