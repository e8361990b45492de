"""How fast a linear layer is, beside others: each is checked before it is timed (`octavo bench`)."""
