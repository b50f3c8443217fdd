"""io: see docs/ARCHITECTURE.md."""
