"""How compressed weights are written down: pure functions between a dense weight and its canonical tensors."""
