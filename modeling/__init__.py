"""Floor 1: segments -> packed batch -> logits. Single-device model code; everything here is packed."""
