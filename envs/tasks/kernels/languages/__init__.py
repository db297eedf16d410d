"""The languages of the kernels task beside C, which stands in programs/compiling.py: a file each, joined after it.

A language says how a signature is written in the prompt, and makes kernel.so of a model's code (`Language` in
programs/compiling.py). Reference, shapes, runner, judge and clock are the same for all, so grades can be compared.

There is no CUDA and no Triton. The sandbox shows no device node, and the filter in front of a kernel refuses ioctl,
with which every CUDA library begins; the judge's memory is the host's, with a page behind each array that stops what
reads too far, and its clock is the processor's. All four would have to be others on a GPU (device memory with guard
words, device events as the clock), and a kernel that may talk to a driver needs a boundary that this sandbox is not.
"""
