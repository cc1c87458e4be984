"""One file a question: its configuration, its run, its findings."""
