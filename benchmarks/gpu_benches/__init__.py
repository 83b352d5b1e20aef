"""What `make gpu` measures, and the page made of it.

prepare      compiles what will be measured; kernels, layers, decode, fences, candidates  what is measured
kernel_sets  which kernels are timed one by one, and their floors
limits       the device's own speed, in the same rounds; page  benchmarks/README.md
"""
