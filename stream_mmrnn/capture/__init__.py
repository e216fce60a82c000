"""From a device to features: sources, encoders, and `capture`, the generator between them."""
