"""Where tensors are and who computes: devices, memory, processes, and what is kept of an interrupted run."""
