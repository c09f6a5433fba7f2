"""The trainer's sparse products on a GPU: Triton kernels, each with a plain PyTorch twin of the same signature.

1. ``ops`` is what the trainer calls. An operation runs as a Triton kernel where ``available`` says it can, else as its twin in
   ``oracles``.
2. ``gather`` (decode, error, dots), ``select`` (k largest), ``segments`` (weight gradients), ``update`` (Adam with the decoder's
   constraint) and ``counts`` hold the kernels. They are imported at the first use, so that this package needs no Triton.
3. ``functions`` makes them differentiable, for any architecture. ``graph`` replays work on a GPU as one CUDA graph.

What the tests show: each kernel equals its twin and float64, in Triton's interpreter on a CPU or, where there is one, on a GPU,
and compiles for Hopper. How fast each is: ``benchmarks/kernels.py``; its table of an H200 is in results/reference/benchmarks.
"""
