"""Data-free knowledge distillation on the server (arXiv 2511.00655, section 3)."""
