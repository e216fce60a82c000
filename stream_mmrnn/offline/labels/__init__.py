"""Labels of recordings in the formats of annotation programs, in both directions."""
