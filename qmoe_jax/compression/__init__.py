"""A whole compression: what is planned, streamed, committed and reported."""
