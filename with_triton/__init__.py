"""What all Triton kernels of this package share: ``trial`` tells whether one can be used, ``launch`` runs it."""
