"""Records -> contexts: parquet rows become examples, examples become lists of segments."""
