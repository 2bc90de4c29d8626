"""One file for each kind of mixer: its module, and what it does to its state."""
