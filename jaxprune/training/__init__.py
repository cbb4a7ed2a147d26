"""Fine-tuning and distillation, resumable at any step."""
