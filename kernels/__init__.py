"""Triton kernels, one operation stem a file; each file ends in its table, ``KERNELS``.

They know torch tensors, a parameter object with the fields of ``csrc/common/params.h`` and the current stream, nothing
else: no kernel imports another part of the package. With ``TRITON_INTERPRET=1`` set before the import they run on CPU
tensors in Triton's interpreter.
"""
