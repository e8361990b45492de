"""Models and texts, and the ways to run a model's linear layers."""
