"""Blocks of a decoder over kernels.ops: token mixers and the mixture of experts.  No device, path or thread in here."""
