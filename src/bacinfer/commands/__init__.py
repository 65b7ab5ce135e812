"""The command lines, one file a command; nothing imports them."""
