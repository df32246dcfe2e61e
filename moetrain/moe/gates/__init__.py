"""Gates: parameters -> logits, one file each."""
