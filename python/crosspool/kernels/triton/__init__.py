"""The GPU's kernels for attention and FFN parts, in Triton, for bfloat16 and float32.

All of them may be captured into a CUDA graph, also into one that a device launches: they make
kernel nodes only, do not synchronise with the host, allocate nothing (outputs and workspaces are
passed in), and their grids depend on shapes alone. What changes from step to step and from layer to
layer is read from device memory:

- ``layer`` is int32 [1]; per-layer weights are a
:class:`~crosspool.kernels.triton.tables.TensorTable`, so one captured graph serves every layer of a
kind; - ``batch`` is a :class:`~crosspool.kernels.triton.batch.DeviceBatch`: its ``count`` says how
many of the bucket's rows are there. Rows past it are neither read nor written, and none of their KV
is; - rows of activations are contiguous, [bucket, width]; the bucket is their first dimension.

Sums run in float32 and are rounded to the model's dtype where a result is stored.

inputs.py a step's inputs; norm.py embeddings, RMSNorm, residual sums; linear.py products with few
rows; gqa.py and mla.py what lies between projections and attention; attention.py paged attention;
router.py, expert_plan.py and experts.py the FFN part, in this order; argmax.py and sampling.py the
tokens.
"""
