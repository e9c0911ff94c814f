"""Tools that find wrong kernels without a GPU: sanitizer, conformance suite, compile matrix."""
