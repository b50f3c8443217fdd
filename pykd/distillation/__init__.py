"""distillation: see docs/ARCHITECTURE.md."""
