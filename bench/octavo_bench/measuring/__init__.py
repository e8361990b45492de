"""What `octavo demo`, `eval`, `analyze` and `bench` share: schemes, watching a model, timing, output."""
