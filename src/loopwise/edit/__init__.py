"""Growth and surgery: edits of depth and width, in memory, on disk and between training stages."""
