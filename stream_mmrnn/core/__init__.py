"""What every room stands on: values, settings, time, errors, topics and the wire format."""
