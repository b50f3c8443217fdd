"""pruning: see docs/ARCHITECTURE.md."""
