"""What users upload and what jobs leave for them: files and multi-part uploads, streamed to disk."""
