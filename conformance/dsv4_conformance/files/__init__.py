"""Arrays and calls as files. What they mean is decided by who writes them."""
