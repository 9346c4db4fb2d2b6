"""From text to batches: read, tokenize, store, buckets (once, on disk), then plan and feed (every epoch)."""
