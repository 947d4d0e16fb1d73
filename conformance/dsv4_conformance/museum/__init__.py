"""Wrong backends that must be caught, and honest variants that must not."""
