"""Floor 1: segments -> packed batch -> logits. Single-device code; everything is packed."""
