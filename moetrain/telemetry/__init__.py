"""What a run tells: meters, sinks (console, JSONL, logs per rank), the picture of expert load."""
