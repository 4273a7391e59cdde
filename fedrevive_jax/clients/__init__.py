"""What a client does: its samples as inputs, local training, evaluation."""
