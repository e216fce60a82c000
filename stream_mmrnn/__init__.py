"""A streaming real-time sequence predictor."""
