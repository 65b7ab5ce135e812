"""Where the sweep was, for the commands that name it there."""
