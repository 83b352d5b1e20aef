"""What `make gpu-bench` measures: `kernels` against their floors, `layers` beside a peer, and the page made of it."""
