"""What a million sessions would take: a simulation on measured figures -> docs/scale.md."""
