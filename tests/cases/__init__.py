"""One table of cases an operation, and the adapter that lets every test of kernels run it."""
