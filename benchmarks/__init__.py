"""Benchmarks: luasession beside its peers and beside the limit, in one run."""
