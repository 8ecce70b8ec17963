"""The learned strategist: a graph network over a model's layers that chooses one candidate, or none."""
