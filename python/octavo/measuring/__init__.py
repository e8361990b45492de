"""What `octavo demo`, `octavo eval` and `octavo analyze` share: the paper's schemes, watching a model, output."""
