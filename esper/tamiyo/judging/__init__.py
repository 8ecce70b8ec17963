"""What a policy is worth: many arms on the same hosts and data, at equal FLOPs and at equal steps."""
