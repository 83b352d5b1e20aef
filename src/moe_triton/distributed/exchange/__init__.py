"""The exchange of rows between ranks: all-to-all around the local experts, and the detection of failed ranks."""
