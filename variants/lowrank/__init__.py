"""The low-rank site that every method with a rank shares, and its products."""
