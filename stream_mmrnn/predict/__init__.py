"""From features to predictions: the aligner, the step engine, and `predict`, the generator between them."""
