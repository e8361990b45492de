"""How fast a linear layer is, and others are: each is checked before it is timed (`octavo bench`)."""
