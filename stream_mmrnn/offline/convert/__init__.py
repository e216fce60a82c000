"""Other people's programs and formats: Foxglove, Rerun, Lab Streaming Layer, XDF, and plain files."""
