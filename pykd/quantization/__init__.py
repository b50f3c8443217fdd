"""quantization: see docs/ARCHITECTURE.md."""
