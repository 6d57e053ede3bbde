"""The HTTP API: JSON in, JSON and problems out."""
