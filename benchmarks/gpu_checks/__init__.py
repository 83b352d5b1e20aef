"""What `make gpu` proves on a device: `numerics` (right results) and `behaviour` (how they come about)."""
