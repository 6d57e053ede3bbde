"""What a call is, what it sends and how its answer is read: pure, with no I/O, threads or event loops."""
